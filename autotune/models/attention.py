"""Multi-head self-attention with a switchable backend. What each backend computes is the same; how is not.

Shapes: B batch, T tokens, D model width, H heads, K width of a head.
"""

from __future__ import annotations

import contextlib
from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.strategy import Attention

SDPA_KERNELS: dict[Attention, SDPBackend] = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask_B11T: Tensor | None, backend: Attention) -> Tensor:
    """Softmax attention, BHTK. ``mask_B11T`` is true at the keys that count; None where all do.

    Raises RuntimeError where the pinned kernel refuses these tensors.
    """
    if backend == "eager":
        scores_BHTT = q_BHTK @ k_BHTK.transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
        if mask_B11T is not None:
            scores_BHTT = scores_BHTT.masked_fill(~mask_B11T, float("-inf"))
        attended_BHTK: Tensor = scores_BHTT.softmax(-1).to(v_BHTK.dtype) @ v_BHTK
        return attended_BHTK
    pinned = sdpa_kernel(SDPA_KERNELS[backend]) if backend in SDPA_KERNELS else contextlib.nullcontext()
    with pinned:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask_B11T)


class SelfAttention(nn.Module):
    """Multi-head self-attention; ``backend`` may be changed at any time, the parameters do not depend on it.

    Dropout is on the output (in the block), not on the attention weights: the fused kernels differ in whether and how
    they drop those, so that no two backends would train the same.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend: Attention = "eager"
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor | None) -> Tensor:
        """Attended values, BTD."""
        B, T, D = x_BTD.shape
        qkv_3BHTK = self.qkv(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        y_BHTK = attend(qkv_3BHTK[0], qkv_3BHTK[1], qkv_3BHTK[2], mask_B11T, self.backend)
        out_BTD: Tensor = self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return out_BTD


def set_attention(model: nn.Module, backend: Attention) -> int:
    """Switches every SelfAttention in the model; returns how many there were."""
    assert backend in get_args(Attention)
    modules = [module for module in model.modules() if isinstance(module, SelfAttention)]
    for module in modules:
        module.backend = backend
    return len(modules)
