"""The loss of a user's own workload, a mean made a sum, and the model that it and its optimizer belong to."""

from __future__ import annotations

import dis
import functools
import itertools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autotune.data.batching import MicroBatch
from autotune.errors import UsageError, kind_of

MeanLoss = Callable[..., Tensor]
"""Takes the model's output and the targets, and gives the mean over a batch."""
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
"""Takes a model's parameters."""
_KEPT = "_autotune_kept"
"""What a model keeps under that it was made with."""


class _Kept:
    """What was made with a model, and is gone with it; a copy of the model on disk, or in another process, has none."""

    def __init__(self, label: str, loss: MeanLoss | None, optimizer: MakeOptimizer | None) -> None:
        self.label, self.loss, self.optimizer = label, loss, optimizer

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def read_by(loss: Any) -> list[Tensor]:
    """The parameters that a loss reads, as far as can be seen: its own, those in its closure, in its arguments that are
    filled in, in what it is a method of, and in the globals that it names."""
    found: list[Tensor] = []
    seen = set[int]()
    left = [loss]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, str | int | float | type):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found += value.parameters()
        elif isinstance(value, Tensor):
            found += [value] if isinstance(value, nn.Parameter) else []
        elif isinstance(value, functools.partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += itertools.islice(value, 1000)  # more are data
        elif isinstance(value, types.MethodType):
            left += [value.__self__, value.__func__]
        elif isinstance(value, types.FunctionType):
            # by name, so that an attribute is not taken for a global
            named = {step.argval for step in dis.get_instructions(value) if step.opname == "LOAD_GLOBAL"}
            left += [value.__globals__[name] for name in named if name in value.__globals__]
            left += [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
            left += value.__defaults__ or ()
        elif not isinstance(value, types.ModuleType | types.BuiltinFunctionType):
            left += getattr(value, "__dict__", {}).values()
    return found


class OwnLoss:
    """The loss that a user's function gives with a model, if any: each model that the function makes has its own."""

    def __init__(self, label: str, loss: MeanLoss | None, model: nn.Module) -> None:
        """Raises UsageError where the loss has something to be trained that the model has not."""
        own, read = set(map(id, model.parameters())), read_by(loss)
        if any(parameter.requires_grad and id(parameter) not in own for parameter in read):
            raise UsageError(
                f"the loss of {label} reads parameters that no optimizer here would train: make them the model's, or "
                "freeze them (requires_grad_(False))"
            )
        self._label = label
        self._reads_model = any(id(parameter) in own for parameter in read)

    def keep(self, model: nn.Module, loss: MeanLoss | None, optimizer: MakeOptimizer | None) -> None:
        """A model that the function made, and the loss and what makes the optimizer that came with it."""
        object.__setattr__(model, _KEPT, _Kept(self._label, loss, optimizer))

    def optimizer(self, model: nn.Module) -> MakeOptimizer | None:
        """What makes the optimizer of a model that the function made; None for one of the user's own."""
        kept = getattr(model, _KEPT, None)
        return kept.optimizer if kept is not None and kept.label == self._label else None

    def of(self, model: nn.Module) -> Callable[[Any, Any], Tensor] | None:
        """The loss, summed, that a model was made with; None for one of the user's own. Raises UsageError where that
        needs one of its own."""
        kept = getattr(model, _KEPT, None)
        if kept is not None and kept.label == self._label:
            return functools.partial(summed, kept.loss)
        if self._reads_model:
            raise UsageError(
                f"the loss of {self._label} reads a model that the function made, not this one; give apply this one's: "
                "apply(model, loss=...)"
            )
        return None


def summed(mean_loss: MeanLoss | None, output: Any, targets: Any) -> Tensor:
    """The batch's loss summed over its samples, from a mean: the user's, the model's own, or the targets' kind's."""
    num_samples = len(tree_leaves(targets)[0])
    if mean_loss is not None:
        mean = mean_loss(output, targets)
        if not isinstance(mean, Tensor) or mean.numel() != 1:
            what = f"{list(mean.shape)} numbers" if isinstance(mean, Tensor) else kind_of(mean)
            raise TypeError(f"the loss gives {what}; it should give one, a batch's mean, as torch's losses do")
        return mean.reshape(()) * num_samples
    own = _own_loss(output, has_targets=any(target.numel() for target in tree_leaves(targets)))
    if own is not None:
        return _long(own) * num_samples
    if not isinstance(targets, Tensor):
        names = f" ({', '.join(targets)})" if isinstance(targets, Mapping) else ""
        raise TypeError(
            f"the batch has several targets{names}, and the model gives no loss; give one that takes them: (model, "
            "batch, loss), called as loss(output, targets)"
        )
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model gives {kind_of(output)} without a loss; give (model, batch, loss), or, where its forward "
            "computes the loss from the targets, the batch as a dict by argument"
        )
    if not targets.numel():
        raise TypeError(
            "the model gives no loss, and the batch has no targets: they come last in a tuple, or are the one tensor "
            "of a dict that forward does not name; or give (model, batch, loss)"
        )
    if targets.is_floating_point():
        if output.shape != targets.shape:
            raise TypeError(
                f"the model gives {list(output.shape)}, and the targets are {list(targets.shape)}: the mean squared "
                "error needs two of one shape; squeeze or reshape one of them, or give (model, batch, loss)"
            )
        return F.mse_loss(_long(output), targets) * num_samples
    if output.dim() == targets.dim() + 1 and output.shape[:-1] == targets.shape:  # classes last, as for tokens
        output = output.movedim(-1, 1)
    num_classes = output.shape[1] if output.dim() > 1 else 1
    if num_classes == 1:
        raise TypeError(
            f"the targets are whole numbers, which are taken for classes, and the model gives {list(output.shape)}, "
            "one score for each; give (model, batch, loss)"
        )
    try:
        return F.cross_entropy(_long(output), targets) * num_samples
    except IndexError as exc:
        raise IndexError(f"{exc} The model scores {num_classes} classes, from 0 to {num_classes - 1}") from exc


def gives_loss(output: Any) -> bool:
    """Whether a model that was given its targets gives the loss."""
    return _own_loss(output, has_targets=False) is not None


def _own_loss(output: Any, has_targets: bool) -> Tensor | None:
    """The loss that a model gives by itself: ``output.loss``, or a number that is all of its output; or the only one of
    several, unless there are targets that it was not given, which make it a part of the loss at most."""
    found: Tensor | None = None if isinstance(output, Tensor) else _attribute(output, "loss")
    if found is not None:
        return found
    several = output if isinstance(output, tuple | list) and not has_targets else []
    numbers = [part for part in (output, *several) if isinstance(part, Tensor) and part.dim() == 0]
    return numbers[0] if len(numbers) == 1 else None


def scores_classes(mean_loss: MeanLoss | None) -> bool:
    """Whether a model's output may be taken for scores of classes: under cross-entropy, or a loss of its own."""
    return mean_loss is None or mean_loss is F.cross_entropy or type(mean_loss) is nn.CrossEntropyLoss


def num_classified(output: Any, micro: MicroBatch) -> Tensor:
    """Samples whose class has the largest score, where a model scores classes: its output, or ``output.logits``, is
    [B, C], and its argument ``labels``, or else the targets, are whole numbers [B], none below 0, which means none.
    Elsewhere no number."""
    logits = output if isinstance(output, Tensor) else _attribute(output, "logits")
    classes = micro.inputs.get("labels", micro.targets)
    is_scored = isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] > 1
    if not is_scored or not isinstance(classes, Tensor) or classes.dim() != 1 or classes.is_floating_point():
        return torch.full((), math.nan, device=tree_leaves(micro.targets)[0].device)
    correct: Tensor = (logits.argmax(-1) == classes).sum()
    return torch.where((classes < 0).any(), math.nan, correct)


def _attribute(output: Any, name: str) -> Any:
    """Of what a model gives, a mapping or another object; None where it has none of that name."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _long(tensor: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
