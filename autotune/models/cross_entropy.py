"""Cross-entropy of many classes in half precision: computed in fp32, but of a few rows at a time.

A language model's logits are its largest tensor. Written out, their fp32 copy, its logarithmic softmax and that one's
gradient are in memory at once, each twice the size of the logits; here only the logits and their own gradient are,
and the softmax is computed once more in the backward pass.

Shapes: N rows, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PART_BYTES = 2**28
"""Of fp32 logits at a time."""
_IGNORED = -100
"""A target that does not count, as in ``F.cross_entropy``."""


def takes_parts(logits_NV: Tensor, targets_N: Tensor) -> bool:
    """Whether there is something to gain: logits in half precision, more of them than one part, targets that are
    classes. A compiler fuses the written-out form on its own; deterministic algorithms are torch's to choose."""
    return (
        not torch.compiler.is_compiling()
        and logits_NV.dtype in (torch.bfloat16, torch.float16)
        and 4 * logits_NV.numel() > PART_BYTES
        and not targets_N.is_floating_point()
        and not torch.are_deterministic_algorithms_enabled()
    )


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """What ``F.cross_entropy(logits.float(), targets, reduction="sum")`` gives, in fp32."""
    found: Tensor = _Summed.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return found


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        num_rows = _rows_of_a_part(logits_NV)
        parts = zip(torch.split(logits_NV, num_rows), torch.split(targets_N, num_rows), strict=True)
        return torch.stack(
            [F.cross_entropy(part_NV.float(), target_N, reduction="sum") for part_NV, target_N in parts]
        ).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N = ctx.saved_tensors
        targets_N = targets_N.long()
        grad_NV = torch.empty_like(logits_NV)
        parts = (torch.split(tensor, _rows_of_a_part(logits_NV)) for tensor in (logits_NV, targets_N, grad_NV))
        for part_NV, target_N, out_NV in zip(*parts, strict=True):
            counts_N1 = (target_N != _IGNORED)[:, None]
            target_N1 = target_N.clamp(min=0)[:, None]
            softmax_NV = torch.softmax(part_NV, -1, dtype=torch.float32)
            softmax_NV.scatter_(1, target_N1, softmax_NV.gather(1, target_N1) - 1)
            torch.mul(softmax_NV, grad * counts_N1, out=out_NV)
        return grad_NV, None


def _rows_of_a_part(logits_NV: Tensor) -> int:
    return max(1, PART_BYTES // (4 * logits_NV.shape[-1]))
