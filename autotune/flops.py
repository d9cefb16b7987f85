"""Floating point operations that a sample's training takes by the model's own arithmetic: no padding, nothing
recomputed. Model FLOP utilisation (Chowdhery et al. 2022, appendix B) is their rate over the device's own.

Counted by torch's FlopCounterMode (a product of m x k and k x n is 2mkn) on tensors without data.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autotune.strategy import Precision
from autotune.workloads.base import Workload

_MATMUL: dict[Precision, str] = {"bf16_weights": "bf16"}
"""Precisions whose matrix products are another's."""


def flops_per_sample(workload: Workload) -> float | None:
    """Forward and backward pass of a training sample, on average over the training set; None where the model does not
    run without data.

    Attention is quadratic in the length: counted at the shortest, the median and the longest, and carried to all.
    """
    lengths = np.asarray(workload.train.lengths)
    order = np.argsort(lengths, kind="stable")
    chosen = {int(lengths[index]): int(index) for index in (order[0], order[len(order) // 2], order[-1])}
    try:
        counted = {length: _counted(workload, index, length) for length, index in chosen.items()}
    except Exception:  # noqa: BLE001 - models fail without data in many ways; the figure is then left out
        return None
    fit = np.polyfit(list(counted), list(counted.values()), len(counted) - 1)
    return float(np.polyval(fit, lengths).mean())


def matmul_capability(precision: Precision) -> str:
    """The probe's line that has the rate of a precision's matrix products."""
    return f"matmul.{_MATMUL.get(precision, precision)}"


def _counted(workload: Workload, index: int, length: int) -> float:
    micro = workload.collate(workload.train, np.array([index]), length)
    with torch.device("meta"):
        model = workload.build_model()
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in micro.inputs.items()}
    with FlopCounterMode(display=False) as counter:
        workload.loss(model(**inputs), micro.targets.to("meta")).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())
