"""Checks of attention kernels, torch's and the flash-attn packages', through the function that the models call.

Shapes: B batch, H heads, T tokens, K features a head.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from autotune.backends.base import Backend, torch_device
from autotune.checks.tools import (
    Figures,
    RefusalError,
    dtype_of,
    first_line,
    precision_set,
    random_tensor,
    require_finite,
)
from autotune.strategy import Attention, Precision

if TYPE_CHECKING:
    import torch

Attend = Callable[..., "torch.Tensor"]
"""Takes q, k, v [B, H, T, K] and the mask of real tokens [B, T] or None; gives [B, H, T, K]."""

B, H, T, K = 4, 8, 256, 32
LENGTHS = (256, 200, 140, 90)
"""Real tokens of the attention check's four sequences; the rest is padding."""

ATTENTION_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest error allowed against written-out fp32 attention, as a part of its largest value. Kernels that are right came
to at most 1e-6 in fp32, 1.4e-2 in bf16 and 2e-3 in fp16 (all kernels of an x86 CPU, torch 2.13)."""
_ATTENTION_S = 0.1
UNMASKED_MS = "unmasked_ms"
"""Forward and backward of a kernel that is refused for its mask alone: what models without one can have."""


def attention(backend: Backend, kernel: Attention, precision: Precision) -> Figures:
    """Milliseconds forward and backward of one kernel with a padding mask, as padded batches call it.

    Output and gradients must agree with written-out fp32 attention within TOLERANCES. A kernel that refuses the mask
    is refused, and the reason says whether it runs without one.
    """
    if kernel == "flash_attn" and backend.device_type != "cuda":
        raise RefusalError("needs a CUDA device")
    keep_BT = _padding_mask(backend)
    try:
        return _attention_figures(backend, functools.partial(_attend, kernel=kernel), precision, keep_BT)
    except RefusalError:
        raise
    except Exception as exc:
        if not kernel.startswith("sdpa"):
            raise
        try:
            figures = _attention_figures(backend, functools.partial(_attend, kernel=kernel), precision, None)
        except Exception:  # noqa: BLE001 - the first error is the reason
            raise exc from None
        raise RefusalError(
            f"{first_line(exc, 80)}; runs without a mask",
            {UNMASKED_MS: figures["forward_ms"] + figures["backward_ms"]},
        ) from exc


def packed(backend: Backend, precision: Precision) -> Figures:
    """Milliseconds forward and backward of torch's kernel for sequences of different lengths, which packed rows run
    in; taking them out of a padded batch included.

    Output and gradients must agree with written-out fp32 attention within TOLERANCES.
    """
    from autotune.models.flash import attend_unpadded, native

    kernel = native(backend.device_type, dtype_of(precision))
    if kernel is None:
        raise RefusalError("torch has no kernel here for sequences of different lengths")

    def attend_row(*qkv_BHTK: torch.Tensor) -> torch.Tensor:
        *qkv, keep_BT = qkv_BHTK
        return attend_unpadded(qkv[0], qkv[1], qkv[2], keep_BT[:, None, None, :], kernel)

    return _attention_figures(backend, attend_row, precision, _padding_mask(backend))


def _attention_figures(backend: Backend, attend: Attend, precision: Precision, keep_BT: torch.Tensor | None) -> Figures:
    """Checks once against written-out fp32, then times."""
    import torch

    dtype = dtype_of(precision)
    written_out: Attend = functools.partial(_attend, kernel="eager")
    qkv = [random_tensor(backend, (B, H, T, K), seed).to(dtype).requires_grad_() for seed in (1, 2, 3)]
    gradient_BHTK = random_tensor(backend, (B, H, T, K), 4).to(dtype)
    if keep_BT is not None:
        gradient_BHTK = gradient_BHTK * keep_BT[:, None, :, None]  # no loss comes from padding
    with precision_set(backend, "fp32"):
        output_BHTK = attend(*qkv, keep_BT)
        results = (output_BHTK, *torch.autograd.grad(output_BHTK, qkv, gradient_BHTK))
        exact_qkv = [tensor.detach().float().requires_grad_() for tensor in qkv]
        exact_BHTK = written_out(*exact_qkv, keep_BT)
        exacts = (exact_BHTK, *torch.autograd.grad(exact_BHTK, exact_qkv, gradient_BHTK.float()))
        if keep_BT is not None:  # what a padding token attends to counts for nothing, and kernels differ in it
            results, exacts = ((found[0] * keep_BT[:, None, :, None], *found[1:]) for found in (results, exacts))
        require_finite(*results)
        for what, result, exact in zip(("output", "dq", "dk", "dv"), results, exacts, strict=True):
            error = ((result.float() - exact).abs().max() / exact.abs().max()).item()
            if error > TOLERANCES[precision]:
                raise RefusalError(f"{what} is {error:.1g} off from fp32, more than {TOLERANCES[precision]:g}")
        forward_s = backward_s = float("inf")
        spent_s, num_runs = 0.0, 0
        while num_runs < 1 or spent_s < _ATTENTION_S:
            backend.synchronize()
            start_s = time.perf_counter()
            output_BHTK = attend(*qkv, keep_BT)
            backend.synchronize()
            middle_s = time.perf_counter()
            torch.autograd.grad(output_BHTK, qkv, gradient_BHTK)
            backend.synchronize()
            end_s = time.perf_counter()
            forward_s, backward_s = min(forward_s, middle_s - start_s), min(backward_s, end_s - middle_s)
            spent_s, num_runs = spent_s + end_s - start_s, num_runs + 1
    return {"forward_ms": 1e3 * forward_s, "backward_ms": 1e3 * backward_s}


def _attend(
    q_BHTK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor, keep_BT: torch.Tensor | None, *, kernel: Attention
) -> torch.Tensor:
    """The very function that the models call."""
    from autotune.models.attention import attend

    mask_B11T = None if keep_BT is None else keep_BT[:, None, None, :]
    return attend(q_BHTK, k_BHTK, v_BHTK, mask_B11T, kernel, window=T)  # a window that leaves nothing out is exact


def _padding_mask(backend: Backend) -> torch.Tensor:
    import torch

    lengths_B = torch.tensor(LENGTHS, device=torch_device(backend))
    return torch.arange(T, device=torch_device(backend))[None, :] < lengths_B[:, None]
