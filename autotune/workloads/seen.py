"""What is found out about a workload's model by running it on a few of its samples, on the CPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from autotune.models.attention import SDPA_KERNELS, SelfAttention, set_attention, settable
from autotune.strategy import Attention

if TYPE_CHECKING:
    from autotune.data.batching import Indices, MicroBatch
    from autotune.workloads.base import Workload

_FEW = 4
_SAME = 1e-3
"""Sums of fp32 losses in another order, and under another padding, come far closer."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def attentions(workload: Workload, model: nn.Module) -> tuple[Attention, ...]:
    """What the model's attention can be switched to, its own way first."""

    def forward() -> None:
        # without gradients torch's own encoder takes another way
        with torch.random.fork_rng(devices=[]), evaluating(model):
            _outputs(model, _micro(workload, _shortest(workload)))

    return settable(model, forward)


def refused_kernels(workload: Workload, model: nn.Module) -> dict[Attention, str]:
    """The kernels, of those that can be pinned, that do not run this model's training, and what torch says: one with
    dropout on its weights, for example, runs in few. autotune's own attention has none: the probe says it all."""
    if any(isinstance(module, SelfAttention) for module in model.modules()):
        return {}
    micro, refused = _micro(workload, _shortest(workload)), dict[Attention, str]()
    was_training = model.training
    for attention in SDPA_KERNELS:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with set_attention(model, attention):
                    _outputs(model.train(), micro)
            except RuntimeError as exc:
                reason = next((str(one.message) for one in caught if "not used" not in str(one.message)), str(exc))
                refused[attention] = reason.splitlines()[0].partition(" (Triggered")[0]
    model.train(was_training)
    return refused


def is_split_exact(workload: Workload, model: nn.Module) -> bool:
    """Whether the loss of some samples together is the sum of their losses apart: a mean over tokens that differ in
    number is not, nor is a sum where a mean is expected. Also where the model does not run here: training will say."""
    few = np.arange(min(_FEW, workload.num_train))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
            together, *apart = (_loss(workload, model, indices) for indices in (few, *few[:, None]))
    except Exception:  # noqa: BLE001 - whatever the user's code raises
        return True
    return abs(together - sum(apart)) <= _SAME * max(abs(together), 1e-6)


def _shortest(workload: Workload) -> Indices:
    return np.array([int(np.argmin(workload.train.lengths))])


def _micro(workload: Workload, indices: Indices) -> MicroBatch:
    return workload.collate(workload.train, indices, int(workload.train.lengths[indices].max()))


def _outputs(model: nn.Module, micro: MicroBatch) -> Any:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in micro.inputs.items()}
    return model(**inputs)


def _loss(workload: Workload, model: nn.Module, indices: Indices) -> float:
    micro = _micro(workload, indices)
    return float(workload.loss(_outputs(model, micro), micro.targets))
