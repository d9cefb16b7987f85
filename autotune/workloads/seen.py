"""What is found out about a workload's model by running it on a few of its samples, on the CPU."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from autotune.errors import UsageError, words_of
from autotune.models.attention import SDPA_KERNELS, KernelsSeen, SelfAttention, set_attention, settable
from autotune.strategy import Attention

if TYPE_CHECKING:
    from autotune.data.batching import Indices, MicroBatch
    from autotune.workloads.base import Workload

_SAME = 1e-3
"""Gradients that are summed in another order in fp32 come far closer; a token's weight of another makes tenths."""
_LEFT_OUT = -100
"""The target that torch's losses leave out (``ignore_index``)."""


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
            _outputs(model, _micro(workload, np.array([np.argmin(workload.train.lengths)])))

    return settable(model, forward)


def check_runs(workload: Workload, model: nn.Module) -> None:
    """Raises UsageError, with the user's own error, where a workload of a model and a batch does not get to a loss."""
    micro = _micro(workload, _extremes(workload))
    doing = "its batch"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
            outputs = _outputs(model, micro)
            doing = "the loss of its output and the targets"
            workload.loss(outputs, micro.targets)
    except Exception as exc:
        raise UsageError(f"{workload.name} fails on {doing}: {words_of(exc)}") from exc


def is_masked(workload: Workload, model: nn.Module) -> bool:
    """Whether the model's attention is told of padding, by two samples of different lengths; where that cannot be seen,
    as if it were."""
    micro, kernels = _micro(workload, _extremes(workload)), KernelsSeen()
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), evaluating(model), kernels:
        _outputs(model, micro)
    return kernels.have_mask or not kernels.counts


def refused_kernels(workload: Workload, model: nn.Module) -> dict[Attention, str]:
    """The kernels, of those that can be pinned, that do not run this model's training, and what torch says: one with
    dropout on its weights, for example, runs in few. autotune's own attention has none: the probe says it all."""
    if any(isinstance(module, SelfAttention) for module in model.modules()):
        return {}
    micro, refused = _micro(workload, _extremes(workload)), dict[Attention, str]()
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            _outputs(model, micro)
    except Exception:  # noqa: BLE001 - whatever the user's code raises: no kernel is to blame
        return {}
    for attention in SDPA_KERNELS:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with set_attention(model, attention):
                    _outputs(model, micro)
            except Exception as exc:  # noqa: BLE001 - the reason, whatever it is
                reason = next((str(one.message) for one in caught if "not used" not in str(one.message)), str(exc))
                refused[attention] = reason.splitlines()[0].partition(" (Triggered")[0]
    return refused


def is_split_exact(workload: Workload, model: nn.Module) -> bool:
    """Whether two samples' gradient together is the sum of their gradients apart: not where the loss is a mean over
    tokens that differ in number, nor where it is a sum and a mean is expected. The two are those of which fewest and
    most counts. Also where that cannot be said: the model does not run here, or draws numbers."""
    few = _extremes(workload)
    try:
        with torch.random.fork_rng(devices=[]), evaluating(model):
            whole, *parts = (_micro(workload, indices, few) for indices in (few, few[:1], few[1:]))
            first, second = (_gradient(workload, model, whole, seed) for seed in (0, 1))
            apart = torch.stack([_gradient(workload, model, part, 0) for part in parts]).sum(0)
    except Exception:  # noqa: BLE001 - whatever the user's code raises
        return True
    size = float(first.norm())
    if not math.isfinite(size) or float((first - second).norm()) > _SAME * size:
        return True
    return float((first - apart).norm()) <= _SAME * size


def _extremes(workload: Workload) -> Indices:
    """The two samples of a batch of which fewest and most counts: tokens, and targets that are not left out."""
    indices = np.arange(min(workload.recipe.global_batch, workload.num_train))
    micro = workload.collate(workload.train, indices, workload.max_tokens)
    counts = workload.train.lengths[indices].astype(np.int64)
    for tensor in (*micro.inputs.values(), micro.targets):
        if isinstance(tensor, Tensor) and tensor.dim() > 1 and not tensor.is_floating_point():
            counts = counts + tensor.ne(_LEFT_OUT).flatten(1).sum(1).numpy()
    order = np.argsort(counts, kind="stable")
    return indices[order[[0, -1]]] if len(order) > 1 else indices


def _micro(workload: Workload, indices: Indices, padded_as: Indices | None = None) -> MicroBatch:
    """The samples, padded to the longest of them, or of others."""
    width = workload.train.lengths[indices if padded_as is None else padded_as].max()
    return workload.collate(workload.train, indices, int(width))


def _outputs(model: nn.Module, micro: MicroBatch) -> Any:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in micro.inputs.items()}
    return model(**inputs)


def _gradient(workload: Workload, model: nn.Module, micro: MicroBatch, seed: int) -> Tensor:
    """Of the samples' summed loss, all parameters in one row."""
    torch.manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = workload.loss(_outputs(model, micro), micro.targets)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])
