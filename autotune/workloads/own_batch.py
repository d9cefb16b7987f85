"""A batch of a user's own, as a set of samples, and the example batch as an epoch."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autotune.data.batching import Indices, MicroBatch, Rounding, plan_batch, rounded
from autotune.errors import UsageError, kind_of
from autotune.strategy import Strategy
from autotune.workloads.same import TARGETS, are_target_tokens

MASK = "attention_mask"
"""The input that says which tokens are real, as Hugging Face's models call it."""


class Takes(NamedTuple):
    """What a model's forward takes."""

    names: tuple[str, ...]
    """Its arguments."""
    anything: bool
    """Whether it takes others by name."""
    has_targets: bool = True
    """Whether the last part of a batch, or the only one that has another name, is not for the model but the loss."""

    @classmethod
    def of(cls, model: nn.Module) -> Takes:
        """By the forward's signature."""
        refuse_wrapped(model)
        try:
            found = inspect.signature(model.forward).parameters.values()
        except ValueError as exc:
            raise UsageError(
                f"the arguments of {type(model).__name__}'s forward cannot be read; give no traced one"
            ) from exc
        names = tuple(one.name for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
        return cls(names, any(one.kind == one.VAR_KEYWORD for one in found))


def refuse_wrapped(model: nn.Module) -> None:
    """Raises UsageError for a model that is compiled already, or wrapped for several devices."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UsageError("a DataParallel model is for several devices; give its module")
    if hasattr(model, "_orig_mod"):
        raise UsageError("the model is compiled already; give it as it was, torch.compile is one of the knobs")


class Batch:
    """A batch as a set of samples: named model inputs, and targets where the model does not compute its own loss.

    ``raw`` is what a DataLoader gives: a tensor, tensors for the model's arguments in their order with the targets
    last, or a dict by argument, in which tensors that are no argument are the targets, and what is no tensor and no
    argument is left out. Targets are a tensor, or a tuple, list or dict of several. Raises UsageError where their sizes
    differ, or an argument is anything else.
    """

    def __init__(self, raw: Any, takes: Takes, label: str, of_whole: Mapping[str, Any] | None = None) -> None:
        """``of_whole`` are inputs that are the whole batch's, and go with each part of it."""
        self._raw = raw
        if isinstance(raw, Mapping):
            named = {str(name): value for name, value in raw.items()}
            others = {name: value for name, value in named.items() if name not in takes.names}
            unknown = [name for name, value in others.items() if isinstance(value, Tensor)]
            unknown = unknown or [name for name, value in others.items() if _has_rows_of(value, named)]
            if unknown and not takes.anything:
                several = {name: named.pop(name) for name in unknown}
                named[TARGETS] = several if len(several) > 1 else several[unknown[0]]
        else:
            parts, targets = list(raw) if isinstance(raw, Sequence) else [raw], []
            if len(parts) > 1 and takes.has_targets:
                num_inputs = min(len(parts) - 1, len(takes.names) or len(parts))
                parts, targets = parts[:num_inputs], parts[num_inputs:]
            if len(parts) > len(takes.names):
                raise UsageError(
                    f"a batch of {label} has {len(parts)} inputs, the model's forward names {len(takes.names)} "
                    f"arguments ({', '.join(takes.names)}); give the batch as a dict by argument"
                )
            named = dict(zip(takes.names, parts, strict=False))
            if targets:
                named[TARGETS] = tuple(targets) if len(targets) > 1 else targets[0]
        for name, value in list(named.items()):
            tensors = _tensors(value) if name == TARGETS else [value]
            if tensors and all(
                isinstance(one, Tensor) and one.dim() and one.layout == torch.strided for one in tensors
            ):
                continue
            if tensors and all(isinstance(one, Tensor) for one in tensors):
                kind = "sparse" if all(one.dim() for one in tensors) else "a single number"
                raise UsageError(
                    f"{name} in a batch of {label} is {kind}; a batch holds tensors with a row for each sample: make "
                    "it the model's, or the loss's"
                )
            if value is None or (isinstance(raw, Mapping) and name not in takes.names):
                del named[name]  # nothing, or not the model's
            else:
                raise UsageError(
                    f"{name} in a batch of {label} is {kind_of(value)}; a batch holds tensors with a row for each "
                    "sample: several targets are a tuple or a dict of tensors, several inputs are arguments of forward"
                )
        self.targets = named.pop(TARGETS, None)
        targets = _tensors(self.targets)
        self.inputs: dict[str, Tensor] = named
        # for decoding; in training it is of no use, and recomputation does not go with it
        self._settings: dict[str, Any] = {"use_cache": False} if "use_cache" in takes.names else {}
        self._settings |= of_whole or {}
        sizes = {len(tensor) for tensor in (*self.inputs.values(), *targets)}
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
        self.tells_padding = mask is not None
        """Whether a mask says what counts; else the lengths are the width."""
        if mask is not None:
            counts = mask.ne(0)
            self.lengths = (counts * torch.arange(1, self.width + 1)).amax(1).clamp(min=1).numpy().astype(np.int64)
            for name, tensor in (*self.inputs.items(), *((TARGETS, target) for target in targets)):
                if are_target_tokens(name, tensor) and tensor.shape[1] == self.width:
                    self.lengths = np.maximum(self.lengths, _lengths_of(tensor))
            self._num_tokens = counts.sum(1).numpy().astype(np.int64)

    def micro(self, rows: Indices, width: int) -> MicroBatch:
        """Some samples, cut to ``width`` tokens where they have tokens."""
        chosen = torch.from_numpy(rows)

        def part(tensor: Tensor) -> Tensor:
            cut: Tensor = self._cut(tensor[chosen], width)
            return cut

        return MicroBatch(
            inputs={**{name: part(tensor) for name, tensor in self.inputs.items()}, **self._settings},
            targets=torch.empty(len(rows), 0) if self.targets is None else tree_map(part, self.targets),
            num_samples=len(rows),
            num_tokens=int(self._num_tokens[rows].sum()),
        )

    def trimmed(self, rounding: Rounding) -> Any:
        """The whole as it was given, cut to its longest sample, rounded up."""
        cut = functools.partial(self._cut, width=self.longest(rounding))
        if not isinstance(self._raw, MutableMapping):
            return tree_map(cut, self._raw)
        whole = copy.copy(self._raw)  # a tokenizer's batch is more than its parts
        whole.update({name: tree_map(cut, value) for name, value in whole.items()})
        return whole

    def longest(self, rounding: Rounding) -> int:
        """Tokens of the longest sample, rounded up, but never more than there are."""
        return min(self.width, rounded(int(self.lengths.max()), rounding.width))

    def _cut(self, value: Any, width: int) -> Any:
        if not isinstance(value, Tensor) or self.width == 1 or value.dim() == 1 or value.shape[1] != self.width:
            return value
        return value[:, :width].contiguous()  # which losses may view otherwise

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


def _tensors(value: Any) -> list[Any]:
    """Of a tensor, or a tuple, list or dict of some; nothing where something else is among them."""
    leaves = tree_leaves(value)
    return leaves if all(isinstance(leaf, Tensor) for leaf in leaves) else []


def _has_rows_of(value: Any, named: Mapping[str, Any]) -> bool:
    """Whether these are tensors, with a row for each sample of a batch."""
    sizes = {len(other) for other in named.values() if isinstance(other, Tensor) and other.dim()}
    return bool(found := _tensors(value)) and {len(one) if one.dim() else None for one in found} == sizes


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
        self.width = batch.width
        """Tokens that the batch is padded to."""
        self.lengths: Indices = np.resize(batch.lengths, count)

    def collate(self, indices: Indices, width: int) -> MicroBatch:
        """A micro batch of them."""
        return self._batch.micro(indices % self._batch.size, width)

    def some(self, count: int) -> Repeated:
        """So many of them."""
        return Repeated(self._batch, min(count, len(self.lengths)))


class Trimmed:
    """A collate function, whose batches lose the padding that no sample of them needs; loader processes can be given
    it."""

    def __init__(self, collate: Callable[[list[Any]], Any], takes: Takes, label: str, rounding: Rounding) -> None:
        self.collate, self._takes, self._label, self._rounding = collate, takes, label, rounding

    def __call__(self, samples: list[Any]) -> Any:
        return Batch(self.collate(samples), self._takes, self._label).trimmed(self._rounding)
