"""Floating point operations that a sample's training takes by the model's own arithmetic: no padding, nothing
recomputed. Model FLOP utilisation (Chowdhery et al. 2022, appendix B) is their rate over the device's own.

Counted by torch's FlopCounterMode (a product of m x k and k x n is 2mkn) on tensors without data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from autotune.cost import BY_TOKENS, Cost
from autotune.strategy import Precision
from autotune.workloads.base import Workload

_MATMUL: dict[Precision, str] = {"bf16_weights": "bf16"}
"""Precisions whose matrix products are another's."""


class Flops(NamedTuple):
    """Operations, or why they could not be counted."""

    per_sample: float | None
    reason: str = "ok"
    cost: Cost = BY_TOKENS
    """How they go with a sample's length; by tokens where that is not known."""


def flops_of(workload: Workload) -> Flops:
    """Forward and backward pass of a training sample, on average over the training set.

    Attention is quadratic in the length: counted at the shortest, the median and the longest, and carried to all.
    """
    lengths = np.asarray(workload.looked_at.lengths)
    order = np.argsort(lengths, kind="stable")
    chosen = {int(lengths[index]): int(index) for index in (order[0], order[len(order) // 2], order[-1])}
    try:
        counted = {length: _counted(workload, index, length) for length, index in chosen.items()}
    except Exception as exc:  # noqa: BLE001 - any model's own code, run without data: what it says is the reason
        return Flops(None, f"the model does not run without data: {type(exc).__name__}: {str(exc).split(chr(10))[0]}")
    fit = np.polyfit(list(counted), list(counted.values()), len(counted) - 1)
    per_square, per_token = fit[:2].tolist() if len(fit) == 3 else (0.0, 1.0)
    is_known = per_token > 0 and per_square >= 0
    cost = Cost(0.0, 1.0, per_square / per_token) if is_known else BY_TOKENS
    return Flops(float(np.polyval(fit, np.asarray(workload.train.lengths)).mean()), cost=cost)


def matmul_capability(precision: Precision) -> str:
    """The probe's line that has the rate of a precision's matrix products."""
    return f"matmul.{_MATMUL.get(precision, precision)}"


def _counted(workload: Workload, index: int, length: int) -> float:
    micro = workload.collate(workload.looked_at, np.array([index]), length)
    with torch.device("meta"):
        model = workload.build_model()
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in micro.inputs.items()}
    with FlopCounterMode(display=False) as counter:
        targets = tree_map(lambda tensor: tensor.to("meta"), micro.targets)
        workload.loss_for(model)(model(**inputs), targets).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())
