"""A user's own workload: a function in ``my_train.py:workload`` or ``package.module:workload``.

It gives a Workload, or only a model and an example batch (and a loss, where the model has none of its own): then the
batch is the recipe's global batch, taken again and again, and all that tuning needs is found from the two. Every
process calls the function anew, so that it must give the same each time.
"""

from __future__ import annotations

import copy
import dataclasses
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from autotune.data.batching import Indices, MicroBatch, Part, Rounding, plan_batch, rounded
from autotune.errors import UsageError, words_of
from autotune.strategy import Attention, Strategy
from autotune.workloads.base import Recipe, Workload, WorkloadRef
from autotune.workloads.same import TARGETS, are_target_tokens

EPOCH_BATCHES, TEST_BATCHES = 1000, 50
"""An example batch stands for an epoch of so many, and for a test set of so many."""
RECIPE = Recipe(learning_rate=1e-4, weight_decay=0.01, warmup_steps=100, clip_norm=None, global_batch=1, epochs=1)
"""What the recipe is but for the global batch, where there is only a model and a batch."""
MASK = "attention_mask"
"""The input that says which tokens are real, as Hugging Face's models call it."""

MeanLoss = Callable[..., Tensor]


class Custom:
    """What a workload module provides, from a user's function (or from what it would give)."""

    def __init__(self, spec: str, label: str, made: Any) -> None:
        self._spec, self._label = spec, label
        self._make: Callable[[], Any] = made if callable(made) else lambda: copy.deepcopy(made)

    @functools.cached_property
    def _workload(self) -> Workload:
        return workload_of(self._label, self._make)

    @property
    def RECIPE(self) -> Recipe:  # noqa: N802 - as modules name it
        """The workload's recipe."""
        return self._workload.recipe

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """What the model's attention can be switched to."""
        return self._workload.attentions

    @property
    def trim_refusal(self) -> str | None:
        """Why the model's samples keep their padding."""
        return self._workload.trim_refusal

    @property
    def num_parameters(self) -> int:
        """The model's."""
        return self._workload.num_parameters

    def prepare(self, data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
        """Calls the function once. Raises UsageError where what it gives is no workload, or for ``data``."""
        on_progress(f"calling {self._label}")
        if data is not None:
            raise UsageError(f"--data is for the built-in workloads; {self._label} brings its own")
        return WorkloadRef(name=self._spec, folder="", source=self._workload.source, limit=limit)

    def open_workload(self, ref: WorkloadRef) -> Workload:
        """The workload; with a limit, at most so many samples of each split."""
        workload, limit = self._workload, ref.limit
        if limit is None:
            return workload
        return dataclasses.replace(workload, train=_limited(workload.train, limit), test=_limited(workload.test, limit))


def workload_of(label: str, make: Callable[[], Any]) -> Workload:
    """The workload that a function gives, or that follows from its model and its example batch.

    Raises UsageError with what is wrong.
    """
    try:
        made = make()
    except UsageError:
        raise
    except Exception as exc:
        raise UsageError(f"{label} failed: {words_of(exc)}") from exc
    if isinstance(made, Workload):
        return made
    if not (isinstance(made, Sequence) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise UsageError(
            f"{label} gives {_kind(made)}; it should give a Workload, or (model, batch), or (model, batch, loss)"
        )
    model, raw, *losses = made
    loss = losses[0] if losses else None
    own, read = set(map(id, model.parameters())), read_by(loss)
    if any(parameter.requires_grad and id(parameter) not in own for parameter in read):
        raise UsageError(
            f"the loss of {label} reads parameters that no optimizer here would train: make them the model's, or "
            "freeze them (requires_grad_(False))"
        )
    reads_model = any(id(parameter) in own for parameter in read)
    takes = Takes.of(model)
    batch = Batch(raw, takes, label)

    def build_model() -> nn.Module:
        built: nn.Module
        built, _, *losses = make()
        object.__setattr__(built, _LOSS, _Kept(label, losses[0] if losses else None))
        return built

    def loss_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor] | None:
        kept = getattr(model, _LOSS, None)
        if kept is not None and kept.label == label:
            return functools.partial(summed, kept.loss)
        if reads_model:
            raise UsageError(
                f"the loss of {label} reads a model that the function made, not this one; give apply this one's: "
                "apply(model, loss=...)"
            )
        return None

    recipe = Recipe(
        **{field: getattr(RECIPE, field) for field in RECIPE.__struct_fields__ if field != "global_batch"},
        global_batch=batch.size,
    )
    return Workload(
        name=label,
        recipe=recipe,
        source=f"an example batch of {batch.size}, {EPOCH_BATCHES:,} times an epoch",
        build_model=build_model,
        loss=functools.partial(summed, loss),
        loss_of=loss_of,
        num_correct=None,
        train=Repeated(batch, EPOCH_BATCHES * batch.size),
        test=Repeated(batch, TEST_BATCHES * batch.size),
        max_tokens=batch.width,
        collate=lambda data, indices, width: data.collate(indices, width),
        split=lambda raw, strategy, rounding: Batch(raw, takes, label).split(strategy, rounding),
        is_masked=None,
        of_dataset=lambda dataset, strategy, rounding: Mapped(
            dataset, takes, label, batch.width, rounding if strategy.padding != "max" else None
        ),
    )


_LOSS = "_autotune_loss"
"""What a model keeps the loss under that it was made with."""


class _Kept:
    """A loss beside its model, and gone with it; a copy of the model on disk, or in another process, has none."""

    def __init__(self, label: str, loss: MeanLoss | None) -> None:
        self.label, self.loss = label, loss

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


class Takes(NamedTuple):
    """What a model's forward takes."""

    names: tuple[str, ...]
    """Its arguments."""
    anything: bool
    """Whether it takes others by name."""

    @classmethod
    def of(cls, model: nn.Module) -> Takes:
        """By the forward's signature."""
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UsageError("a DataParallel model is for several devices; give its module")
        if hasattr(model, "_orig_mod"):
            raise UsageError("the model is compiled already; give it as it was, torch.compile is one of the knobs")
        try:
            found = inspect.signature(model.forward).parameters.values()
        except ValueError as exc:
            raise UsageError(
                f"the arguments of {type(model).__name__}'s forward cannot be read; give no traced one"
            ) from exc
        names = tuple(one.name for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
        return cls(names, any(one.kind == one.VAR_KEYWORD for one in found))


class Batch:
    """A batch as a set of samples: named model inputs, and targets where the model does not compute its own loss.

    ``raw`` is what a DataLoader gives: a tensor, tensors for the model's arguments in their order with the targets
    last, or a dict by argument, in which a single tensor that is no argument is the targets, and what is no tensor and
    no argument is left out. Raises UsageError where their sizes differ, or an argument is anything else.
    """

    def __init__(self, raw: Any, takes: Takes, label: str) -> None:
        if isinstance(raw, Mapping):
            named = {str(name): value for name, value in raw.items()}
            unknown = [name for name, value in named.items() if isinstance(value, Tensor) and name not in takes.names]
            if len(unknown) == 1 and not takes.anything:
                named[TARGETS] = named.pop(unknown[0])
        else:
            parts = list(raw) if isinstance(raw, Sequence) else [raw]
            *parts, targets = parts if len(parts) > 1 else [*parts, None]
            if len(parts) > len(takes.names):
                raise UsageError(
                    f"a batch of {label} has {len(parts)} inputs, the model's forward names {len(takes.names)} "
                    f"arguments ({', '.join(takes.names)}); give the batch as a dict by argument"
                )
            named = dict(zip(takes.names, parts, strict=False))
            if targets is not None:
                named[TARGETS] = targets
        for name, value in list(named.items()):
            if isinstance(value, Tensor) and value.dim() and value.layout == torch.strided:
                continue
            if isinstance(value, Tensor):
                kind = "a single number" if not value.dim() else "sparse"
                raise UsageError(
                    f"{name} in a batch of {label} is {kind}; a batch holds tensors with a row for each sample: make "
                    "it the model's, or the loss's"
                )
            if value is None or (isinstance(raw, Mapping) and name not in takes.names):
                del named[name]  # nothing, or not the model's
            else:
                raise UsageError(
                    f"{name} in a batch of {label} is {_kind(value)}; a batch holds tensors with a row for each "
                    "sample: several targets are one tensor (torch.stack), or arguments of a forward that gives a loss"
                )
        self.targets = named.pop(TARGETS, None)
        self.inputs: dict[str, Tensor] = named
        # for decoding; in training it is of no use, and recomputation does not go with it
        self._settings = {"use_cache": False} if "use_cache" in takes.names else {}
        tensors = [*self.inputs.values(), *([] if self.targets is None else [self.targets])]
        sizes = {len(tensor) for tensor in tensors if tensor.dim()}
        if len(sizes) != 1:
            found = ", ".join(map(str, sorted(sizes))) or "no tensor"
            raise UsageError(
                f"a batch of {label} should hold tensors with a row for each sample, as many in all; it has {found}: "
                "pad what differs in length, and give what is not of the samples to the model"
            )
        self.size: int = sizes.pop()
        mask = mask if (mask := self.inputs.get(MASK)) is not None and mask.dim() == 2 else None
        ids = [value for value in self.inputs.values() if value.dim() == 2 and not value.is_floating_point()]
        self.width = int(mask.shape[1]) if mask is not None else int(ids[0].shape[1]) if ids else 1
        self.lengths: Indices = np.full(self.size, self.width, dtype=np.int64)
        """Up to the last token that counts: padding on the left cannot be cut off."""
        self._num_tokens = self.lengths
        if mask is not None:
            counts = mask.ne(0)
            self.lengths = (counts * torch.arange(1, self.width + 1)).amax(1).clamp(min=1).numpy().astype(np.int64)
            for name, tensor in {**self.inputs, TARGETS: self.targets}.items():
                if are_target_tokens(name, tensor) and tensor.shape[1] == self.width:
                    self.lengths = np.maximum(self.lengths, _lengths_of(tensor))
            self._num_tokens = counts.sum(1).numpy().astype(np.int64)

    def micro(self, rows: Indices, width: int) -> MicroBatch:
        """Some samples, cut to ``width`` tokens where they have tokens."""
        chosen = torch.from_numpy(rows)

        def part(tensor: Tensor) -> Tensor:
            tensor = tensor[chosen]
            has_tokens = self.width > 1 and tensor.dim() > 1 and tensor.shape[1] == self.width
            return tensor[:, :width].contiguous() if has_tokens else tensor  # which losses may view otherwise

        return MicroBatch(
            inputs={**{name: part(tensor) for name, tensor in self.inputs.items()}, **self._settings},
            targets=torch.empty(len(rows), 0) if self.targets is None else part(self.targets),
            num_samples=len(rows),
            num_tokens=int(self._num_tokens[rows].sum()),
        )

    def split(self, strategy: Strategy, rounding: Rounding) -> list[MicroBatch]:
        """All samples in the strategy's micro batches, padded as it says."""
        planned = plan_batch(
            np.arange(self.size),
            self.lengths,
            micro_batch=strategy.micro_batch,
            padding=strategy.padding,
            max_tokens=self.width,
            rounding=rounding,
        )
        return [self.micro(rows, width) for rows, width in zip(planned.micro_batches, planned.widths, strict=True)]


def _lengths_of(tokens: Tensor) -> Indices:
    """Up to where rows end in what losses leave out, -100; where there is none of it, in one value repeated."""
    is_marked = bool(tokens.eq(-100).any())
    is_token = tokens.ne(-100) if is_marked else tokens.ne(tokens[:, -1:])
    is_token = is_token.reshape(*tokens.shape[:2], -1).any(2)
    lengths = (is_token * torch.arange(1, tokens.shape[1] + 1)).amax(1)
    if not is_marked:
        lengths[lengths == tokens.shape[1] - 1] += 1  # a last one by itself is no padding
    return lengths.numpy().astype(np.int64)


class Repeated:
    """A batch's samples over and over: as many as an epoch has."""

    def __init__(self, batch: Batch, count: int) -> None:
        self._batch = batch
        self.lengths: Indices = np.resize(batch.lengths, count)

    def collate(self, indices: Indices, width: int) -> MicroBatch:
        """A micro batch of them."""
        return self._batch.micro(indices % self._batch.size, width)

    def first(self, count: int) -> Repeated:
        """The first of them."""
        return Repeated(self._batch, min(count, len(self.lengths)))


class Mapped:
    """A torch map-style dataset, whose samples are collated as its DataLoader would. How long they are is not known
    before they are read: they all count as ``width`` tokens, and those of a micro batch are padded to the longest of
    them, rounded up, where there is a ``rounding``."""

    def __init__(self, dataset: Any, takes: Takes, label: str, width: int, rounding: Rounding | None) -> None:
        self._dataset, self._takes, self._label, self._rounding = dataset, takes, label, rounding
        self.lengths: Indices = np.full(len(dataset), width, dtype=np.int64)

    def collate(self, indices: Indices, _: int) -> MicroBatch:
        """A micro batch of them, as wide as they are."""
        batch = Batch(default_collate([self._dataset[int(index)] for index in indices]), self._takes, self._label)
        width = batch.width
        if self._rounding is not None:
            width = min(width, rounded(int(batch.lengths.max()), self._rounding.width))
        return batch.micro(np.arange(batch.size), width)


def _limited(data: Any, limit: int) -> Any:
    return data.first(limit) if isinstance(data, Repeated) else Part(data, limit)


def summed(mean_loss: MeanLoss | None, output: Any, targets: Tensor) -> Tensor:
    """The batch's loss summed over its samples, from a mean: the user's, the model's own, or the targets' kind's."""
    num_samples = len(targets)
    if mean_loss is not None:
        return mean_loss(output, targets) * num_samples
    own: Tensor | None = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if own is not None:
        return _long(own) * num_samples
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model gives {_kind(output)} without a loss; give (model, batch, loss), or, where its forward "
            "computes the loss from the targets, the batch as a dict by argument"
        )
    if output.dim() == 0:
        return _long(output) * num_samples
    if not targets.numel():
        raise TypeError(
            "the model gives no loss, and the batch has no targets: they come last in a tuple, or are the one tensor "
            "of a dict that forward does not name; or give (model, batch, loss)"
        )
    if targets.is_floating_point():
        return F.mse_loss(_long(output), targets) * num_samples
    if output.dim() == targets.dim() + 1 and output.shape[:-1] == targets.shape:  # classes last, as for tokens
        output = output.movedim(-1, 1)
    return F.cross_entropy(_long(output), targets) * num_samples


def _long(tensor: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _kind(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__
