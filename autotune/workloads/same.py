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
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from autotune.errors import words_of
from autotune.models.blocks import find_blocks, set_checkpoint
from autotune.workloads import draws
from autotune.workloads.seen import (
    gradients_of,
    micro_of,
    numbers,
    outputs_of,
    set_training,
    unchanged,
    without_dropout,
)

if TYPE_CHECKING:
    from autotune.data.batching import Indices, MicroBatch
    from autotune.workloads.base import Workload

_SAME, _SAME_IN_16_BITS = 1e-3, 5e-2
"""Losses and gradients that are summed in another order in fp32 come far closer, as do weights of 16 bits to the other;
a token's weight of another makes tenths."""
_NOISE = 1e-5
"""A parameter whose gradient is so small a share of all is not compared: what is zero but for rounding is noise."""
_ENOUGH_S, _FEWEST, _ENOUGH, _MOST = 0.25, 4, 16, 64
"""Of the batch so many samples are looked at as the model trains in so many seconds, within the first two bounds; up to
the last where so few do not run."""
TARGETS = "the targets"
"""What a batch's targets go by among its inputs; no argument can be called so."""
_PADDING = (0, 1)
"""Tokens that texts are often padded with, and losses then leave out."""
_MARKS = (-100, 0, 255)
"""Values that often mean ``none``: losses leave such targets out (``ignore_index``), models such tokens."""

_NO_MEAN = "a batch's loss is not the mean of its samples' losses: another split would train otherwise"
_OTHER_EACH_TIME = "two passes over the same batch differ, and not by torch's random numbers"
_UNSURE = "whether another split trains the same cannot be told"


class Outcome(NamedTuple):
    """What came of a forward and backward pass over some micro batches."""

    loss: float
    """Summed over the samples."""
    gradients: dict[str, Tensor]
    """Of that, by parameter."""
    changes: dict[str, Tensor]
    """What the passes changed of the model's tensors, by name: running means, code books, queues."""
    tolerance: float
    """How far two of these may be apart to be the same."""


def split_refusal(workload: Workload, model: nn.Module) -> str | None:
    """Why micro batches would train something else than the batch as a whole, or why that cannot be told; None where
    loss, gradients and what the model keeps are the same."""
    try:
        samples = _spread(workload, _FEWEST)
        whole, seconds, seen = _first(workload, model, samples)
        is_slow = whole is not None and seconds * _FEWEST > _ENOUGH_S * len(samples)
        if not is_slow:  # or five of the batch may be looked for in it
            count = _MOST if whole is None else min(_ENOUGH, int(_ENOUGH_S * len(samples) / seconds))
            samples = _spread(workload, count)
            whole, _, seen = _first(workload, model, samples)
        if len(samples) < 2:
            return None
        splits = _splits(samples, _keys(workload))[: 2 if is_slow else None]
        draw = None
        if seen:
            with draws.Draws() as noted:
                _trained(workload, model, splits[0][:1])
            found = draws.places(seen, noted.shapes, len(samples), len(splits[0][0]))
            draw = functools.partial(draws.BySample, places=found)
        if whole is None or draw is not None:
            whole = _trained(workload, model, [samples], draw=draw)
        is_flat = not any(float(gradient.abs().max()) for gradient in whole.gradients.values() if gradient.numel())
        if not math.isfinite(whole.loss) or is_flat:
            return f"{_UNSURE}: its loss has no gradient here"
        for _, counter in _counters(workload, model, samples[:2]):
            return f"every forward pass changes {counter}, and every micro batch is one"
    except Exception as exc:  # noqa: BLE001 - whatever the user's code raises
        return f"{_UNSURE}: {words_of(exc)}"
    for halves in splits:
        try:
            apart = _trained(workload, model, halves, draw=draw)
        except Exception as exc:  # noqa: BLE001 - as above
            return f"a part of the batch does not run by itself: {words_of(exc)}"
        if (name := _changed_otherwise(whole, apart)) is not None:
            return f"every forward pass changes {name}, and every micro batch is one"
        if _differ(whole, apart):
            if _differ(whole, _trained(workload, model, [samples], draw=draw)):
                return f"{_UNSURE}: {_OTHER_EACH_TIME}"
            return _NO_MEAN
    for mark in _PADDING:  # which an example batch may lack, and others have
        with contextlib.suppress(Exception):  # a value that the model does not take
            edit = functools.partial(_with_padding, samples[0], mark)
            if edit(samples, micro := micro_of(workload, samples)) is micro:
                break  # nothing to be padded
            whole, apart = (_trained(workload, model, parts, draw=draw, edit=edit) for parts in ([samples], splits[0]))
            if _differ(whole, apart):
                return f"{_NO_MEAN} where targets are padded with {mark}"
    return None


def mixing_refusal(workload: Workload, model: nn.Module) -> str | None:
    """Why it counts which samples are in a batch together, as where each is told from the others; None where a batch's
    gradient is made of its halves', as where some samples weigh more, or where that cannot be told."""
    try:
        samples = _spread(workload, _FEWEST)
        halves = _splits(samples, _keys(workload))[0]
        with without_dropout(model), draws.Draws() as noted:
            whole, again, *parts = (_trained(workload, model, [part]) for part in (samples, samples, *halves))
    except Exception:  # noqa: BLE001 - whatever the user's code raises
        return None
    if noted.shapes or len(samples) < 2 or _differ(whole, again) or _is_made_of(parts, whole):
        return None
    return "which samples are in a batch together counts: its gradient is not made of its samples'"


def _is_made_of(parts: Sequence[Outcome], whole: Outcome) -> bool:
    """Whether the gradient is a sum of the parts', each weighed by no less than nothing, or that cannot be told, as
    where a part's is no number: least squares, by their products alone, as gradients may be large."""

    def product(one: Outcome, other: Outcome) -> float:
        return sum(
            float(gradient.flatten().double() @ other.gradients[name].flatten().double())
            for name, gradient in one.gradients.items()
            if name in other.gradients
        )

    products = np.array([[product(one, other) for other in parts] for one in parts])
    with_whole = np.array([product(part, whole) for part in parts])
    if not np.isfinite(products).all():
        return True
    weights = np.linalg.lstsq(products, with_whole, rcond=None)[0].clip(min=0)
    square = product(whole, whole)
    left = square - 2 * weights @ with_whole + weights @ products @ weights
    return bool(left <= (10 * whole.tolerance) ** 2 * square)


def recompute_refusal(workload: Workload, model: nn.Module) -> str | None:
    """Why blocks that are computed again would train something else; None where they do not, or nothing can be told."""
    try:
        samples = _spread(workload, _FEWEST // 2)
        plain = _trained(workload, model, [samples])
    except Exception:  # noqa: BLE001 - the reason is shown elsewhere
        return None
    in_blocks = {id(module) for block in find_blocks(model) for module in block.modules()}
    counters = [name for module, name in _counters(workload, model, samples) if id(module) in in_blocks]
    if counters:
        return f"a block's forward pass changes {counters[0]}, and would do so again"
    for granularity in ("every_block", "selective"):
        try:
            set_checkpoint(model, granularity)
            found = _trained(workload, model, [samples])
        except Exception as exc:  # noqa: BLE001 - whatever the user's code raises
            return f"fails when it is computed again: {words_of(exc)}"
        finally:
            set_checkpoint(model, "none")
        if (name := _changed_otherwise(plain, found)) is not None:
            return f"a block's forward pass changes {name}, and would do so again"
        if math.isfinite(plain.loss) and _differ(plain, found):
            if _differ(plain, _trained(workload, model, [samples])):
                return f"whether it trains the same computed again cannot be told: {_OTHER_EACH_TIME}"
            return "what is computed again gives another gradient"
    return None


def trim_refusal(workload: Workload, model: nn.Module) -> str | None:
    """Why samples whose padding is cut off would train something else; None where they do not, or nothing can be
    told."""
    lengths = workload.looked_at.lengths[: workload.recipe.global_batch]
    samples = np.sort(np.argsort(lengths, kind="stable")[:2])
    width = int(lengths[samples].max())
    if width >= workload.looked_at_tokens:
        return None
    trained = functools.partial(_trained, workload, model, [samples], draw=lambda part: draws.Constant())
    with without_dropout(model):
        try:
            whole = trained(width=workload.looked_at_tokens)
        except Exception:  # noqa: BLE001 - the reason is shown elsewhere
            return None
        try:
            trimmed = trained(width=width)
        except Exception as exc:  # noqa: BLE001 - whatever the user's code raises
            return f"fails on samples that are cut to their {width} tokens: {words_of(exc)}"
    if (name := _changed_otherwise(whole, trimmed)) is not None:
        return f"samples whose padding is cut off change {name} otherwise"
    return "samples whose padding is cut off train otherwise" if _differ(whole, trimmed) else None


def _counters(workload: Workload, model: nn.Module, samples: Indices) -> list[tuple[nn.Module, str]]:
    """Numbers that modules keep as plain attributes and that a second pass over the same samples changes again, by
    their modules and names. Where the samples do not run by themselves nothing is known."""
    micro, found = micro_of(workload, samples), []
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.no_grad(), unchanged(model):
        outputs_of(model, micro)
        before = numbers(model)
        outputs_of(model, micro)
        names = {id(module): name for name, module in model.named_modules()}
        for (module, attribute), value in numbers(model).items():
            if before.get((module, attribute)) != value:
                found.append((module, f"{names[id(module)]}.{attribute}".removeprefix(".")))
    return found


def _first(
    workload: Workload, model: nn.Module, samples: Indices
) -> tuple[Outcome | None, float, list[tuple[int, ...]]]:
    """What comes of the samples as a whole, None where they do not run; in how many seconds; and the shapes that
    numbers were drawn for."""
    start_s = time.perf_counter()
    with draws.Draws() as noted:
        try:
            found = _trained(workload, model, [samples])
        except Exception:  # noqa: BLE001 - more of them may run
            return None, math.inf, []
    return found, time.perf_counter() - start_s, noted.shapes


def _splits(samples: Indices, keys: Sequence[Indices]) -> list[tuple[Indices, Indices]]:
    """The samples in two halves: every other one, and so that the halves differ by a key."""
    orders = [np.concatenate([samples[::2], samples[1::2]])]
    orders += [samples[np.argsort(key[samples], kind="stable")] for key in keys]
    half = (len(samples) + 1) // 2
    found = {frozenset(map(frozenset, (order[:half].tolist(), order[half:].tolist()))): order for order in orders}
    return [(order[:half], order[half:]) for order in found.values()]


def _with_padding(sample: int, mark: int, part: Indices, micro: MicroBatch) -> MicroBatch:
    """The micro batch with half of a sample's target tokens padding; itself where it has none of its."""
    targets, structure = tree_flatten(micro.targets)
    named = {**micro.inputs, **{f"{TARGETS} {place}": tensor for place, tensor in enumerate(targets)}}
    found = {name: tensor for name, tensor in named.items() if are_target_tokens(name, tensor)}
    if sample not in part or not found:
        return micro
    for name, tensor in found.items():
        named[name] = tensor.clone()
        named[name][int(np.flatnonzero(part == sample)[0]), tensor.shape[1] // 2 :] = mark
    targets = [named.pop(f"{TARGETS} {place}") for place in range(len(targets))]
    return micro._replace(targets=tree_unflatten(targets, structure), inputs=named)


def are_target_tokens(name: str, tensor: Any) -> bool:
    """Whether these are tokens to be predicted, by what they are called."""
    is_named = isinstance(tensor, Tensor) and ("label" in name or "target" in name)
    return is_named and tensor.dim() > 1 and not tensor.is_floating_point() and tensor.numel() > 0


def _trained(
    workload: Workload,
    model: nn.Module,
    parts: Sequence[Indices],
    *,
    width: int | None = None,
    draw: Callable[[list[int]], draws.Draws] | None = None,
    edit: Callable[[Indices, MicroBatch], MicroBatch] = lambda part, micro: micro,
) -> Outcome:
    """The outcome of training these parts, of which ``edit`` makes others, as ``apply`` would; the model is left as it
    was. ``draw`` sees to the random numbers of the samples of a part."""
    loss_of, loss_sum, gradients = workload.loss_for(model), 0.0, dict[str, Tensor]()
    set_training(model)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]), unchanged(model, parameters=True) as before:
        torch.manual_seed(0)
        for part in parts:
            micro = edit(part, micro_of(workload, part, width))
            with contextlib.nullcontext() if draw is None else draw(part.tolist()):
                loss = loss_of(outputs_of(model, micro), micro.targets)
                found = gradients_of(loss, model)
            loss_sum += float(loss.detach())
            for name, gradient in found.items():
                gradient = gradient.to_dense() if gradient.is_sparse else gradient
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        changes = {
            name: (tensor.detach() - before[name]).flatten()
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
            if name in before and tensor.shape == before[name].shape and not tensor.detach().equal(before[name])
        }
    is_short = bool(dtypes & {torch.bfloat16, torch.float16})
    return Outcome(loss_sum, gradients, changes, _SAME_IN_16_BITS if is_short else _SAME)


def _differ(one: Outcome, other: Outcome) -> bool:
    """Whether they differ in the loss or a parameter's gradient."""
    if not math.isclose(one.loss, other.loss, rel_tol=one.tolerance, abs_tol=1e-6):
        return True
    norms = {name: float(gradient.norm()) for name, gradient in one.gradients.items()}
    # what rounding to 16 bits does to a small gradient says nothing
    floor = (_NOISE if one.tolerance == _SAME else one.tolerance) * math.hypot(*norms.values())
    return any(
        name not in other.gradients or _are_apart(gradient, other.gradients[name], one.tolerance, floor)
        for name, gradient in one.gradients.items()
        if norms[name] > floor
    )


def _are_apart(one: Tensor, other: Tensor, tolerance: float, floor: float = 0.0) -> bool:
    return float((one - other).norm()) > max(tolerance * float(one.norm()), floor)


def _changed_otherwise(one: Outcome, other: Outcome) -> str | None:
    """A tensor that the one changed in another way than the other."""
    for name in (*one.changes, *other.changes):
        if not (name in one.changes and name in other.changes):
            return name
        own, others = one.changes[name], other.changes[name]
        if _are_apart(own.double(), others.double(), one.tolerance):
            return name
    return None


def _spread(workload: Workload, count: int) -> Indices:
    """So many samples of a batch, in its order: those with the least and the most of each key, then some evenly."""
    num_samples = min(workload.recipe.global_batch, len(workload.looked_at.lengths))
    if count >= num_samples:
        return np.arange(num_samples)
    orders = [np.argsort(key, kind="stable") for key in _keys(workload)]
    wanted = [int(order[end]) for order in orders for end in (0, -1)]
    even = np.linspace(0, num_samples - 1, count).round().astype(int).tolist()
    return np.sort(np.array(list(dict.fromkeys([*wanted, *even, *range(num_samples)]))[:count]))


def _keys(workload: Workload) -> list[Indices]:
    """By each of these the samples of a batch may be told apart: their class, how long they are, how much of them does
    not count."""
    indices = np.arange(min(workload.recipe.global_batch, len(workload.looked_at.lengths)))
    micro: MicroBatch = workload.collate(workload.looked_at, indices, workload.looked_at_tokens)
    classes: list[Indices] = []
    marks: list[Indices] = []
    for tensor in (*micro.inputs.values(), *tree_leaves(micro.targets)):
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and not tensor.is_complex():
            classes += [tensor.cpu().numpy().astype(np.int64)] if tensor.dim() == 1 else []
            marks += [tensor.eq(mark).flatten(1).sum(1).cpu().numpy() for mark in _MARKS] if tensor.dim() > 1 else []
    keys = [*classes, workload.looked_at.lengths[indices].astype(np.int64), *marks]
    return [key for key in keys if key.min() < key.max()] or keys[:1]
