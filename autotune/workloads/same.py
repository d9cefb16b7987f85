"""Whether a training stays what it is when a batch is cut up, when a part is computed again, when padding is cut off:
found out on the CPU, by doing so with a few samples of a user's own model."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.errors import words_of
from autotune.models.blocks import set_checkpoint
from autotune.workloads.seen import evaluating, micro_of, outputs_of, unchanged

if TYPE_CHECKING:
    from autotune.data.batching import Indices, MicroBatch
    from autotune.workloads.base import Workload

_SAME = 1e-3
"""Losses and gradients that are summed in another order in fp32 come far closer; a token's weight of another makes
tenths."""
_ENOUGH_S, _FEWEST, _MOST = 0.5, 4, 64
"""Of the batch so many samples are looked at as the model trains in so many seconds, within these bounds."""
_NO_MEAN = "a batch's loss is not the mean of its samples' losses: another split would train otherwise"
_TARGETS = "the targets"  # no argument can be called so
_PADDING = (0, 1)
"""Tokens that texts are often padded with, and losses then leave out."""
_MARKS = (-100, 0, 255)
"""Values that often mean ``none``: losses leave such targets out (``ignore_index``), models such tokens."""


class Outcome(NamedTuple):
    """What came of a forward and backward pass over some micro batches."""

    loss: float
    """Summed over the samples."""
    gradient: Tensor
    """Of that, all parameters in one row."""
    changes: dict[str, Tensor]
    """What the forward passes changed of the model's tensors, by name: running means, code books, queues."""


class _Drawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Each sample draws the same random numbers whatever samples are beside it: an operator that draws is run for each
    sample's rows by themselves, seeded by the sample and by how many drew before. What is drawn for the batch as a
    whole (``randperm``) is as seeded, and so another's for another batch."""

    def __init__(self, samples: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._samples, self._num_drawn = samples, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes other operators on."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **kwargs)
        self._num_drawn += 1
        place, rows = self._by_sample(args)
        found = []
        for index, sample in enumerate(self._samples if rows else [0]):
            torch.default_generator.manual_seed(1000 * self._num_drawn + sample)

            def own(value: Any, start: int = index * rows) -> Any:
                is_by_sample = rows and isinstance(value, Tensor) and value.dim()
                has_rows = is_by_sample and len(value) == rows * len(self._samples)
                return value[start : start + rows] if has_rows else value

            own_args = [own(value) for value in args]
            if rows and not isinstance(args[place], Tensor):
                own_args[place] = [rows, *args[place][1:]]
            found.append(function(*own_args, **{name: own(value) for name, value in kwargs.items()}))
        if not rows:
            return found[0]
        if function._schema.is_mutable:
            return args[place]
        return tuple(map(_joined, zip(*found, strict=True))) if isinstance(found[0], tuple) else _joined(found)

    def _by_sample(self, args: Sequence[Any]) -> tuple[int, int]:
        """Which argument has rows of every sample, a tensor or a size, and how many of each; 0 where none has."""
        for place, value in enumerate(args):
            size = value.shape if isinstance(value, Tensor) else value
            if isinstance(size, Sequence) and len(size) and isinstance(size[0], int):
                rows, rest = divmod(size[0], len(self._samples))
                if rows and not rest:
                    return place, rows
        return 0, 0


def _joined(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]


def split_refusal(workload: Workload, model: nn.Module) -> str | None:
    """Why micro batches would train something else than the batch as a whole, or why that cannot be told; None where
    loss, gradient and what the model keeps are the same."""
    try:
        samples, whole = _whole(workload, model)
        if len(samples) < 2:
            return None
        if not math.isfinite(whole.loss) or not float(whole.gradient.norm()):
            return "its loss has no gradient here: whether another split trains the same cannot be told"
    except Exception as exc:  # noqa: BLE001 - whatever the user's code raises
        return f"whether another split trains the same cannot be told: {words_of(exc)}"
    splits = _splits(samples, _keys(workload))
    for halves in splits:
        try:
            apart = _trained(workload, model, halves)
        except Exception as exc:  # noqa: BLE001 - as above
            return f"a part of the batch does not run by itself: {words_of(exc)}"
        if (name := _changed_otherwise(whole, apart)) is not None:
            return f"every forward pass changes {name}, and every micro batch is one"
        if _difference(whole, apart):
            if _difference(whole, _trained(workload, model, [samples])):
                return "it draws numbers that are not torch's: whether another split trains the same cannot be told"
            return _NO_MEAN
    for mark in _PADDING:  # which an example batch may lack, and others have
        with contextlib.suppress(Exception):  # a value that the model does not take
            edit = functools.partial(_with_padding, samples[0], mark)
            if edit(samples, micro := micro_of(workload, samples)) is micro:
                break  # nothing to be padded
            whole, apart = (_trained(workload, model, parts, edit=edit) for parts in ([samples], splits[0]))
            if _difference(whole, apart):
                return f"{_NO_MEAN} where targets are padded with {mark}"
    return None


def _splits(samples: Indices, keys: Sequence[Indices]) -> list[tuple[Indices, Indices]]:
    """The samples in two halves: every other one, and so that the halves differ by a key; two such ways at most where
    there are few samples, as the model is slow then."""
    orders = [np.concatenate([samples[::2], samples[1::2]])]
    orders += [samples[np.argsort(key[samples], kind="stable")] for key in keys]
    half = (len(samples) + 1) // 2
    found = {frozenset(map(frozenset, (order[:half].tolist(), order[half:].tolist()))): order for order in orders}
    chosen = list(found.values())[: 2 if len(samples) <= _FEWEST else None]
    return [(order[:half], order[half:]) for order in chosen]


def _with_padding(sample: int, mark: int, part: Indices, micro: MicroBatch) -> MicroBatch:
    """The micro batch with half of a sample's target tokens padding; itself where it has none of its."""
    named = {**micro.inputs, _TARGETS: micro.targets}
    found = {name: tensor for name, tensor in named.items() if _are_target_tokens(name, tensor)}
    if sample not in part or not found:
        return micro
    for name, tensor in found.items():
        named[name] = tensor.clone()
        named[name][int(np.flatnonzero(part == sample)[0]), tensor.shape[1] // 2 :] = mark
    return micro._replace(targets=named.pop(_TARGETS), inputs=named)


def _are_target_tokens(name: str, tensor: Any) -> bool:
    is_named = isinstance(tensor, Tensor) and ("label" in name or "target" in name)
    return is_named and tensor.dim() > 1 and not tensor.is_floating_point() and tensor.numel() > 0


def recompute_refusal(workload: Workload, model: nn.Module) -> str | None:
    """Why blocks that are computed again would train something else; None where they do not, or nothing can be told."""
    samples = _spread(workload, 2)
    try:
        plain = _trained(workload, model, [samples], draws=False)
    except Exception:  # noqa: BLE001 - the reason is shown elsewhere
        return None
    try:
        set_checkpoint(model, "every_block")
        found = _trained(workload, model, [samples], draws=False)
    except Exception as exc:  # noqa: BLE001 - whatever the user's code raises
        return f"fails when it is computed again: {words_of(exc)}"
    finally:
        set_checkpoint(model, "none")
    if (name := _changed_otherwise(plain, found)) is not None:
        return f"a block's forward pass changes {name}, and would do so again"
    return "what is computed again gives another gradient" if _difference(plain, found) else None


def trim_refusal(workload: Workload, model: nn.Module) -> str | None:
    """Why samples whose padding is cut off would train something else; None where they do not, or nothing can be
    told."""
    from autotune.trace import without_dropout

    lengths = workload.train.lengths[: workload.recipe.global_batch]
    samples = np.sort(np.argsort(lengths, kind="stable")[:2])
    width = int(lengths[samples].max())
    if width >= workload.max_tokens:
        return None

    def trained(tokens: int) -> Outcome:
        return _trained(workload, model, [samples], width=tokens)

    with without_dropout(model), evaluating(model):
        try:
            whole = trained(workload.max_tokens)
        except Exception:  # noqa: BLE001 - the reason is shown elsewhere
            return None
        try:
            trimmed = trained(width)
        except Exception as exc:  # noqa: BLE001 - whatever the user's code raises
            return f"fails on samples that are cut to their {width} tokens: {words_of(exc)}"
    return "samples whose padding is cut off have another loss" if _difference(whole, trimmed) else None


def _trained(
    workload: Workload,
    model: nn.Module,
    parts: Sequence[Indices],
    *,
    width: int | None = None,
    draws: bool = True,
    edit: Callable[[Indices, MicroBatch], MicroBatch] = lambda part, micro: micro,
) -> Outcome:
    """The outcome of training these parts, of which ``edit`` makes others; the model is left as it was. ``draws``: each
    sample draws its own random numbers; where not, the batch draws them as ever."""
    loss_of = workload.loss_for(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss_sum, gradients = 0.0, {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    with torch.random.fork_rng(devices=[]), unchanged(model, parameters=True):
        torch.manual_seed(0)
        before = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        for part in parts:
            micro = edit(part, micro_of(workload, part, width))
            with _Drawn(part.tolist()) if draws else contextlib.nullcontext():
                loss = loss_of(outputs_of(model, micro), micro.targets)
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            loss_sum += float(loss.detach())
            for name, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    gradients[name] += gradient.to_dense() if gradient.is_sparse else gradient
        after = _tensors(model)
        changes = {
            name: (after[name] - tensor).flatten().double()
            for name, tensor in before.items()
            if name in after and after[name].shape == tensor.shape and not after[name].equal(tensor)
        }
    flat = [gradient.flatten() for gradient in gradients.values()]
    return Outcome(loss_sum, torch.cat(flat) if flat else torch.zeros(1), changes)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


def _difference(one: Outcome, other: Outcome) -> bool:
    """Whether they differ in loss or gradient."""
    far = float((one.gradient - other.gradient).norm()) > _SAME * float(one.gradient.norm())
    return far or not math.isclose(one.loss, other.loss, rel_tol=_SAME, abs_tol=1e-6)


def _changed_otherwise(one: Outcome, other: Outcome) -> str | None:
    """A tensor that the one changed in another way than the other."""
    for name in (*one.changes, *other.changes):
        own, others = one.changes.get(name), other.changes.get(name)
        if own is None or others is None or float((own - others).norm()) > _SAME * float(own.norm()):
            return name
    return None


def _whole(workload: Workload, model: nn.Module) -> tuple[Indices, Outcome]:
    """Samples to cut up, and what comes of them as a whole: all of the batch where that is quickly computed, or where
    a part does not run; else a few that lie far apart. Raises what the user's code does."""
    few = _spread(workload, _FEWEST)
    start_s = time.perf_counter()
    try:
        found = _trained(workload, model, [few])
        count = int(_ENOUGH_S * len(few) / (time.perf_counter() - start_s))
    except Exception:  # noqa: BLE001 - five of the batch may be looked for in it
        count = _MOST
    if count <= len(few):
        return few, found
    samples = _spread(workload, min(_MOST, count))
    return samples, _trained(workload, model, [samples])


def _spread(workload: Workload, count: int) -> Indices:
    """So many samples of a batch, in its order: those with the least and the most of each key, then some evenly."""
    num_samples = min(workload.recipe.global_batch, workload.num_train)
    if count >= num_samples:
        return np.arange(num_samples)
    orders = [np.argsort(key, kind="stable") for key in _keys(workload)]
    wanted = [int(order[end]) for order in orders for end in (0, -1)]
    even = np.linspace(0, num_samples - 1, count).round().astype(int).tolist()
    return np.sort(np.array(list(dict.fromkeys([*wanted, *even, *range(num_samples)]))[:count]))


def _keys(workload: Workload) -> list[Indices]:
    """By each of these the samples of a batch may be told apart: their class, how long they are, how much of them does
    not count."""
    indices = np.arange(min(workload.recipe.global_batch, workload.num_train))
    micro: MicroBatch = workload.collate(workload.train, indices, workload.max_tokens)
    classes: list[Indices] = []
    marks: list[Indices] = []
    for tensor in (*micro.inputs.values(), micro.targets):
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and not tensor.is_complex():
            classes += [tensor.numpy().astype(np.int64)] if tensor.dim() == 1 else []
            marks += [tensor.eq(mark).flatten(1).sum(1).numpy() for mark in _MARKS] if tensor.dim() > 1 else []
    keys = [*classes, workload.train.lengths[indices].astype(np.int64), *marks]
    return [key for key in keys if key.min() < key.max()] or keys[:1]
