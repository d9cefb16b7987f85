"""Multi-head self-attention with a switchable backend. What each backend computes is the same, but for the approximate
ones (sparse.py); how is not.

Shapes: B batch, T tokens, D model width, H heads, K width of a head.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.models.flash import PACKAGES, Kernel, Row, attend_packed, attend_unpadded, native, packaged
from autotune.models.sparse import attend_sparsely
from autotune.strategy import APPROXIMATE, WINDOW, Attention

SDPA_KERNELS: dict[Attention, SDPBackend] = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
WHOLE_ROW: tuple[Attention, ...] = ("sdpa", "sdpa_flash")
"""Those that have all sequences of a packed row taken by one kernel of torch's, where there is one."""


def attend(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    mask_B11T: Tensor | None,
    backend: Attention,
    kernel: Kernel | None = None,
    *,
    is_causal: bool = False,
    window: int = WINDOW,
) -> Tensor:
    """Softmax attention, BHTK. ``mask_B11T`` is true at the keys that count; None where all do. ``kernel`` is
    ``flash_attn``'s, where it is known already. Causal, no query sees what comes after it; ``window`` is how many
    tokens the approximate ones see near it.

    Raises RuntimeError where the pinned kernel refuses these tensors, or is not installed.
    """
    if backend == "eager":
        scores_BHTT = q_BHTK @ k_BHTK.transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
        mask = _also_causal(mask_B11T, q_BHTK) if is_causal else mask_B11T
        if mask is not None:
            scores_BHTT = scores_BHTT.masked_fill(~mask, float("-inf"))
        attended_BHTK: Tensor = scores_BHTT.softmax(-1).to(v_BHTK.dtype) @ v_BHTK
        return attended_BHTK
    if backend in APPROXIMATE["attention"]:
        return attend_sparsely(q_BHTK, k_BHTK, v_BHTK, mask_B11T, backend, is_causal=is_causal, block=window)
    if backend == "flash_attn":
        kernel = kernel or packaged(q_BHTK.device.type, q_BHTK.dtype).kernel
        return attend_unpadded(q_BHTK, k_BHTK, v_BHTK, mask_B11T, kernel, is_causal=is_causal)
    if is_causal and mask_B11T is not None:
        mask_B11T, is_causal = _also_causal(mask_B11T, q_BHTK), False
    pinned = sdpa_kernel(SDPA_KERNELS[backend]) if backend in SDPA_KERNELS else contextlib.nullcontext()
    with pinned:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask_B11T, is_causal=is_causal)


def _also_causal(mask_B11T: Tensor | None, q_BHTK: Tensor) -> Tensor:
    """What a query sees of the keys that count, B1TT or TT: nothing after itself."""
    T = q_BHTK.shape[2]
    before_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).tril()
    return before_TT if mask_B11T is None else mask_B11T & before_TT


class SelfAttention(nn.Module):
    """Multi-head self-attention; ``backend`` may be changed at any time, the parameters do not depend on it.

    Dropout is on the output (in the block), not on the attention weights: the fused kernels differ in whether and how
    they drop those, so that no two backends would train the same.
    """

    def __init__(self, width: int, num_heads: int, *, is_causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.backend: Attention = "eager"
        self.window = WINDOW
        self.kernel: Kernel | None = None
        """What takes all sequences of a packed row at once; None where each goes by itself."""
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor | None, row: Row | None = None) -> Tensor:
        """Attended values, BTD. With ``row`` B is 1 and T all of its sequences, each attending to itself only."""
        B, T, D = x_BTD.shape
        qkv_3BHTK = self.qkv(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        if row is None:
            y_BHTK = attend(
                *(qkv_3BHTK[0], qkv_3BHTK[1], qkv_3BHTK[2], mask_B11T),
                self.backend,
                self.kernel,
                is_causal=self.is_causal,
                window=self.window,
            )
        elif self.kernel is not None:
            y_BHTK = attend_packed(qkv_3BHTK[0], qkv_3BHTK[1], qkv_3BHTK[2], row, self.kernel)
        else:
            assert row.lengths is not None
            sequences = qkv_3BHTK.split(list(row.lengths), 3)
            y_BHTK = torch.cat([attend(q, k, v, None, self.backend, window=self.window) for q, k, v in sequences], 2)
        out_BTD: Tensor = self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return out_BTD


def settable(model: nn.Module, forward: Callable[[], object]) -> tuple[Attention, ...]:
    """The backends that a model can be switched to, its own way first where it has but one.

    autotune's SelfAttention takes all; Hugging Face's ``set_attn_implementation`` and timm's ``fused_attn`` those of
    torch, and the first the flash-attn packages where the model says so.
    Of a model that only calls ``scaled_dot_product_attention``, which ``forward`` finds out by
    running it once, the kernel can be pinned: ``sdpa`` is its own way then. Of any other nothing can be changed:
    ``eager`` stands for its own way.
    """
    if (kind := _switches(model)) is not None:
        everything: tuple[Attention, ...] = get_args(Attention)
        if kind == "autotune":
            return everything
        parts = _of_transformers(model)
        takes_packages = bool(parts) and all(getattr(part, "_supports_flash_attn", False) for part in parts)
        left_out = APPROXIMATE["attention"] | (set() if takes_packages else {"flash_attn"})
        return tuple(attention for attention in everything if attention not in left_out)
    kernels = KernelsSeen()
    with kernels, contextlib.suppress(Exception):  # what the model cannot run here, training will say
        forward()
    if kernels.counts:
        return ("sdpa", *(kernel for kernel in get_args(Attention) if kernel in SDPA_KERNELS))
    return ("eager",)


def set_attention(
    model: nn.Module,
    backend: Attention,
    *,
    device_type: str = "cpu",
    dtype: torch.dtype = torch.float32,
    window: int = WINDOW,
) -> contextlib.AbstractContextManager[None]:
    """Switches the model's attention as far as the model goes; gives the context that its forward passes need for the
    rest: the pinned kernel, where the model does not pin it itself.

    Attention will be computed in ``dtype``. Raises RuntimeError where no flash-attn package runs and one is asked for,
    or the model stays as it is.
    """
    assert backend in get_args(Attention)
    kind, kernel, package = _switches(model), None, ""
    if backend == "flash_attn":
        package, kernel = packaged(device_type, dtype, torch.are_deterministic_algorithms_enabled())
    elif backend in WHOLE_ROW:
        kernel = native(device_type, dtype)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.backend, module.kernel, module.window = backend, kernel, window
        elif kind == "timm" and hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", backend != "eager")  # noqa: B010 - torch declares no such attribute
    for part in _of_transformers(model) if kind == "transformers" else ():
        name = _transformers_name(backend, package)
        part.set_attn_implementation(name)
        if part.config._attn_implementation != name:  # which versions before 5 only log
            raise RuntimeError(f"{type(part).__name__} cannot be switched to {name} attention once it is built")
    is_pinned = kind != "autotune" and backend in SDPA_KERNELS
    return _Pinned(SDPA_KERNELS[backend]) if is_pinned else contextlib.nullcontext()


def _transformers_name(backend: Attention, package: str) -> str:
    if backend == "flash_attn":
        if package not in PACKAGES:
            raise RuntimeError(f"transformers takes flash-attn's packages, and only torch's {package} runs here")
        return "flash_attention_3" if package == PACKAGES[0] else "flash_attention_2"
    return "eager" if backend == "eager" else "sdpa"


def _switches(model: nn.Module) -> str | None:
    """By whose switch the model's attention is changed; None where it has none."""
    modules = list(model.modules())
    if any(isinstance(module, SelfAttention) for module in modules):
        return "autotune"
    if _of_transformers(model):
        return "transformers"
    if any(isinstance(getattr(module, "fused_attn", None), bool) for module in modules):
        return "timm"
    return None


def _of_transformers(model: nn.Module) -> list[Any]:
    """The outermost of Hugging Face's models in it that have a switch; the model itself, or parts of a user's own."""
    if hasattr(type(model), "set_attn_implementation"):
        return [model] if getattr(model, "_supports_sdpa", False) else []
    return [found for child in model.children() for found in _of_transformers(child)]


class KernelsSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How often each kernel of scaled_dot_product_attention runs forward, by whatever function of torch's or the
    model's, and whether any is given a mask."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        """By the operator's name."""
        self.have_mask = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes every operator on."""
        kwargs = kwargs or {}
        if "scaled_dot_product" in function.name() and "backward" not in function.name():
            self.counts[function.name().removeprefix("aten::").partition(".")[0]] += 1
            # q, k, v come first; a mask or a bias of the scores is the next tensor, by place or by name
            self.have_mask |= any(isinstance(value, Tensor) for value in (*args[3:], *kwargs.values()))
        return function(*args, **kwargs)


_held = contextlib.ExitStack()


def hold(context: contextlib.AbstractContextManager[None]) -> None:
    """Enters what ``set_attention`` gave for all that this process runs until the next call: forward passes, and what
    somebody else's loop computes again in its backward pass."""
    _held.close()
    _held.enter_context(context)


class _Pinned(contextlib.AbstractContextManager[None]):
    """``sdpa_kernel`` for one kernel, that can be entered any number of times."""

    def __init__(self, kernel: SDPBackend) -> None:
        self._kernel = kernel

    def __enter__(self) -> None:
        self._entered = sdpa_kernel(self._kernel)
        self._entered.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._entered.__exit__(*exception)
