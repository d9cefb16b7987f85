"""What is found out about a workload's model by running it on a few of its samples, on the CPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from autotune.errors import UsageError, words_of
from autotune.models.attention import SDPA_KERNELS, KernelsSeen, SelfAttention, set_attention, settable
from autotune.strategy import Attention

if TYPE_CHECKING:
    from autotune.data.batching import Indices, MicroBatch
    from autotune.workloads.base import Workload


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


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout of every kind is off, in modules and in numbers that modules keep of their own."""
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            before.append((module, "p", module.p))
        # attention, recurrent layers and stochastic depth keep their rate in a number of their own
        rates = {name: value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)}
        before += [(module, name, value) for name, value in rates.items()]
    for module, name, _ in before:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextlib.contextmanager
def unchanged(model: nn.Module, *, parameters: bool = False) -> Iterator[dict[str, Tensor]]:
    """Afterwards the model's buffers hold what they did, and its ``parameters`` where asked for: some models change
    them in their forward pass. Gives what they hold, by name."""
    kept = numbers(model)
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    named = {**dict(model.named_buffers()), **(dict(model.named_parameters()) if parameters else {})}
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, tensor in named.items():
                if not tensor.equal(before[name]):
                    tensor.copy_(before[name])
        for module, name, buffer in buffers:
            module._buffers[name] = buffer  # what was put in its place
        for (module, name), value in kept.items():
            object.__setattr__(module, name, value)


def numbers(model: nn.Module) -> dict[tuple[nn.Module, str], int | float]:
    """What modules keep as plain attributes: counters, temperatures. What metrics count trains nothing."""
    return {
        (module, name): value
        for module in model.modules()
        if not any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)
        for name, value in vars(module).items()
        if isinstance(value, int | float) and name != "training"
    }


def set_training(model: nn.Module) -> None:
    """Training mode: as the model's own ``train`` sets it, where it has one; else a part that is not to be trained may
    be in evaluation mode on purpose."""
    if not model.training or type(model).train is not nn.Module.train:
        model.train()


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """By parameter's name, by a backward pass as training's; those that the parameters have stay as they are."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = [parameter.grad for parameter in trained.values()]
    for parameter in trained.values():
        parameter.grad = None
    try:
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    finally:
        for parameter, gradient in zip(trained.values(), before, strict=True):
            parameter.grad = gradient


@contextlib.contextmanager
def _looked_at(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and nothing that a forward pass changes stays so."""
    with torch.random.fork_rng(devices=[]), evaluating(model), unchanged(model):
        yield


def attentions(workload: Workload, model: nn.Module) -> tuple[Attention, ...]:
    """What the model's attention can be switched to, its own way first."""

    def forward() -> None:
        # without gradients torch's own encoder takes another way
        with _looked_at(model):
            outputs_of(model, micro_of(workload, _extremes(workload)[:1]))

    return settable(model, forward)


_HINTS = {
    "not attached to a `Trainer`": "; it is looked at without one: ask for what needs one under `if self._trainer:`",
    "argument": "; a batch that is a dict names the arguments",
}
"""What may help, by words of an error."""


def check_runs(workload: Workload, model: nn.Module) -> None:
    """Raises UsageError, with the user's own error, where a workload of a model and a batch does not get to a loss and
    its gradient: of two samples, or else, as some models take no fewer, of the whole batch."""
    loss_of = workload.loss_for(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"{workload.name} has no parameters to train: none has requires_grad")

    doing = ""

    def run(samples: Indices) -> None:
        nonlocal doing
        micro, doing = micro_of(workload, samples), "its batch"
        with torch.random.fork_rng(devices=[]), unchanged(model):
            outputs = outputs_of(model, micro)
            doing = "the loss of its output and the targets"
            loss = loss_of(outputs, micro.targets)
            doing = "the backward pass"
            found = gradients_of(loss, model)
        if workload.optimizer_of is None and any(gradient.is_sparse for gradient in found.values()):
            raise UsageError(
                f"{workload.name} has sparse gradients, which the recipe's AdamW does not take: leave sparse=True out, "
                "or give what makes an optimizer that does: (model, batch, loss, optimizer)"
            )

    with contextlib.suppress(Exception), evaluating(model):
        return run(_extremes(workload))
    set_training(model)
    try:
        return run(np.arange(workload.recipe.global_batch))
    except UsageError:
        raise
    except Exception as exc:
        hint = next((hint for words, hint in _HINTS.items() if words in str(exc)), "")
        raise UsageError(f"{workload.name} fails on {doing}: {words_of(exc)}{hint}") from exc


def is_masked(workload: Workload, model: nn.Module) -> bool:
    """Whether the model's attention is told of padding, by two samples of different lengths; where that cannot be seen,
    as if it were."""
    micro, kernels = micro_of(workload, _extremes(workload)), KernelsSeen()
    with contextlib.suppress(Exception), _looked_at(model), kernels:
        outputs_of(model, micro)
    return kernels.have_mask or not kernels.counts


def refused_kernels(workload: Workload, model: nn.Module) -> dict[Attention, str]:
    """The kernels, of those that can be pinned, that do not run this model's training, and what torch says: one with
    dropout on its weights, for example, runs in few. autotune's own attention has none: the probe says it all."""
    if any(isinstance(module, SelfAttention) for module in model.modules()):
        return {}
    micro, refused = micro_of(workload, _extremes(workload)), dict[Attention, str]()
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            outputs_of(model, micro)
    except Exception:  # noqa: BLE001 - whatever the user's code raises: no kernel is to blame
        return {}
    for attention in SDPA_KERNELS:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with set_attention(model, attention):
                    outputs_of(model, micro)
            except Exception as exc:  # noqa: BLE001 - the reason, whatever it is
                reason = next((str(one.message) for one in caught if "not used" not in str(one.message)), str(exc))
                refused[attention] = reason.splitlines()[0].partition(" (Triggered")[0]
    return refused


def _extremes(workload: Workload) -> Indices:
    """The shortest and the longest sample of a batch."""
    lengths = workload.looked_at.lengths[: workload.recipe.global_batch]
    order = np.argsort(lengths, kind="stable")
    return order[[0, -1]] if len(order) > 1 else order


def micro_of(workload: Workload, indices: Indices, width: int | None = None) -> MicroBatch:
    """The samples, padded to the longest of them; a user's own to the width that the batch has, or to another."""
    if width is None:
        is_own = workload.split is not None
        width = workload.looked_at_tokens if is_own else int(workload.looked_at.lengths[indices].max())
    return workload.collate(workload.looked_at, indices, width)


def outputs_of(model: nn.Module, micro: MicroBatch) -> Any:
    """What the model gives, wherever it is."""
    return model(**inputs_of(model, micro))


def inputs_of(model: nn.Module, micro: MicroBatch) -> dict[str, Any]:
    """What the model takes, where it is."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in micro.inputs.items()}
