"""Flash attention over sequences of different lengths that lie one after another, without padding: the flash-attn
packages' kernels, and torch's own. Which runs is found out once, when a setting is applied, outside any forward pass.

Shapes: B batch or number of sequences, T tokens of the longest, S tokens of all, H heads, K width of a head.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Kernel = Callable[..., Any]
"""Takes q, k, v [S, H, K], twice where each sequence begins and the last one ends [B + 1], twice the tokens of the
longest, and ``causal``; gives [S, H, K], or a tuple that begins with it."""
PACKAGES = ("flash_attn_interface", "flash_attn")
"""flash-attn 3's module, and 2's."""
IMPLEMENTATIONS = ("FA4", "FA3")
"""What torch >= 2.11 can have in its flash kernel's place."""
LONGEST_REST = 512
"""Tokens at most that may fill up a row behind its sequences: a kernel's grid is made for the longest there can be."""


class Found(NamedTuple):
    """A kernel that runs."""

    name: str
    """Its package, or torch's name of the implementation."""
    kernel: Kernel


class Row(NamedTuple):
    """Sequences that lie one after another."""

    bounds: Tensor
    """Where each begins and the last one ends, [B + 1], int32, on the device."""
    longest: int
    """No sequence is longer: kernels size their grid by it."""
    lengths: tuple[int, ...] | None
    """Tokens of each, where each goes by itself; no kernel that takes all at once needs them."""


@functools.cache
def packaged(device_type: str, dtype: torch.dtype, is_deterministic: bool = False) -> Found:
    """The first of flash-attn 3, flash-attn 2, and 4 and 3 through torch that imports and runs. Raises RuntimeError."""
    errors = []
    for name in (*PACKAGES, *IMPLEMENTATIONS):
        try:
            kernel = _package(name, is_deterministic) if name in PACKAGES else _torch_with(name)
            _try(kernel, device_type, dtype)
            return Found(name, kernel)
        except ImportError as exc:
            errors.append(f"{(exc.name or 'flash_attn').partition('.')[0]} is not installed")
        except Exception as exc:  # noqa: BLE001 - any way to fail is a reason, and the next may run
            errors.append((str(exc).strip().splitlines() or [type(exc).__name__])[0][:60])
        if name in IMPLEMENTATIONS:
            _restore_torch()
    raise RuntimeError("; ".join(dict.fromkeys(errors)))


@functools.cache
def native(device_type: str, dtype: torch.dtype) -> Kernel | None:
    """torch's own kernel for sequences of different lengths (torch >= 2.10, CUDA, 16 bits); None where it does not
    run."""
    if device_type != "cuda":
        return None
    try:
        kernel = _varlen_attn()
        _try(kernel, device_type, dtype)
    except (ImportError, AttributeError, RuntimeError, TypeError):
        return None
    return kernel


def attend_packed(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, row: Row, kernel: Kernel) -> Tensor:
    """Softmax attention of each of one row's sequences to itself; B is 1, the lengths sum to S."""
    qkv = [x_BHSK[0].transpose(0, 1) for x_BHSK in (q_BHSK, k_BHSK, v_BHSK)]
    return _called(kernel, qkv, row.bounds, row.longest).transpose(0, 1)[None]


def attend_unpadded(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    mask_B11T: Tensor | None,
    kernel: Kernel,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Softmax attention on the tokens that count alone; ``mask_B11T`` is true there. Elsewhere the result is zero.

    How many count is asked of the device, which is waited for.
    """
    B, H, T, K = q_BHTK.shape
    flat = [x_BHTK.transpose(1, 2).reshape(B * T, H, K) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK)]
    if mask_B11T is None:
        bounds = torch.arange(0, (B + 1) * T, T, device=q_BHTK.device, dtype=torch.int32)
        return _called(kernel, flat, bounds, T, is_causal=is_causal).view(B, T, H, K).transpose(1, 2)
    keep_BT = mask_B11T[:, 0, 0].expand(B, T)
    bounds = torch.nn.functional.pad(keep_BT.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    index_S = keep_BT.flatten().nonzero()[:, 0]
    out_SHK = _called(kernel, [x[index_S] for x in flat], bounds, T, is_causal=is_causal)
    out = torch.zeros_like(flat[0]).index_copy(0, index_S, out_SHK)
    return out.view(B, T, H, K).transpose(1, 2)


def _called(kernel: Kernel, qkv: Sequence[Tensor], bounds: Tensor, longest: int, *, is_causal: bool = False) -> Tensor:
    found = kernel(*qkv, bounds, bounds, longest, longest, causal=is_causal)
    out_SHK: Tensor = found[0] if isinstance(found, tuple) else found  # early releases of 3 give the statistics as well
    return out_SHK


@torch.enable_grad()
def _try(kernel: Kernel, device_type: str, dtype: torch.dtype) -> None:
    """Forward and backward, without drawing from anybody's random numbers."""
    qkv = [torch.ones(16, 1, 32, device=device_type, dtype=dtype, requires_grad=True) for _ in range(3)]
    bounds = torch.tensor([0, 6, 16], device=device_type, dtype=torch.int32)
    torch.autograd.grad(_called(kernel, qkv, bounds, 10).float().sum(), qkv)


def _package(name: str, is_deterministic: bool) -> Kernel:
    kernel: Kernel = importlib.import_module(name).flash_attn_varlen_func
    return functools.partial(kernel, deterministic=True) if is_deterministic else kernel


def _torch_with(implementation: str) -> Kernel:
    activate: Callable[[str], None] = torch.nn.attention.activate_flash_attention_impl
    activate(implementation)
    return _varlen_attn()


def _restore_torch() -> None:
    """torch's own flash kernel again."""
    if hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        torch.nn.attention.restore_flash_attention_impl()


def _varlen_attn() -> Kernel:
    """torch 2.10 calls it ``is_causal``; later releases have a window in its place."""
    kernel: Kernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if "is_causal" in inspect.signature(kernel).parameters:
        return lambda *args, causal: kernel(*args, is_causal=causal)
    return lambda *args, causal: kernel(*args, window_size=(-1, 0 if causal else -1))
