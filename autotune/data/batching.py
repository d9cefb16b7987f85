"""Which samples form a batch, and how wide it is padded. An epoch is planned from lengths alone; no tensors here
but in ``collate`` and ``pack``.

The optimizer's batches depend on the padding knob only (``buckets`` groups by length), never on how a global batch is
cut into micro batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autotune.models.flash import LONGEST_REST
from autotune.strategy import Padding, Strategy

BATCHES_PER_BUCKET_POOL = 50
"""Samples are sorted by length within random pools of this many global batches, as in Hugging Face's group_by_length
(transformers 4, trainer_pt_utils.get_length_grouped_indices)."""

_SORTED = ("longest", "buckets")
Indices = NDArray[np.int64]


class Rounding(NamedTuple):
    """What sizes are rounded up to a multiple of, in tokens: each size that comes up is a shape of its own."""

    width: int
    """Of padded sequences. Kernels prefer multiples of 8."""
    row: int
    """Of packed rows. A CPU makes a matmul kernel for each number of rows."""


FINE = Rounding(width=8, row=128)
COARSE = Rounding(width=32, row=LONGEST_REST)
"""On accelerators, whose libraries plan kernels for each shape that comes up, 0.1 s for cuDNN's attention (H200), and
where graphs are recorded for each."""


def rounding_of(strategy: Strategy, *, is_host: bool) -> Rounding:
    """What a strategy's batches are rounded up to, on the host or on an accelerator."""
    return COARSE if strategy.records_shapes or not is_host else FINE


class MicroBatch(NamedTuple):
    """One forward pass: tensors for the model, targets for the loss, and what they count for."""

    inputs: dict[str, Any]
    targets: Any
    """A tensor, or of a user's own a tuple, list or dict of several."""
    num_samples: int
    num_tokens: int
    """Real tokens, padding not counted."""


class PlannedBatch(NamedTuple):
    """One optimizer step: the samples of each micro batch and the width each is padded to."""

    micro_batches: tuple[Indices, ...]
    widths: tuple[int, ...]
    """Packed, the tokens of the row."""
    padded_tokens: int
    """Tokens that the device computes, padding included."""
    padded_squares: int
    """Width squared, summed over the samples: what the cost of attention grows with."""

    @property
    def num_samples(self) -> int:
        """Real samples."""
        return sum(len(indices) for indices in self.micro_batches)


class SequenceData(Protocol):
    """Labelled token sequences of different lengths."""

    @property
    def lengths(self) -> Indices:
        """Tokens in each sequence."""

    @property
    def labels(self) -> Indices:
        """Class of each sequence."""

    def ids(self, index: int) -> NDArray[np.uint16]:
        """Token ids of one sequence."""


class Part:
    """Some of a set's sequences, drawn once and for all by a seed."""

    def __init__(self, data: SequenceData, limit: int, seed: int = 0) -> None:
        chosen = np.random.default_rng(seed).permutation(len(data.lengths))[:limit]
        self._data = data
        self._chosen = chosen
        self.lengths: Indices = data.lengths[chosen]
        self.labels: Indices = data.labels[chosen]

    def ids(self, index: int) -> NDArray[np.uint16]:
        """Token ids of one sequence."""
        return self._data.ids(int(self._chosen[index]))


def plan_epoch(
    lengths: Indices,
    *,
    global_batch: int,
    micro_batch: int,
    padding: Padding,
    max_tokens: int,
    seed: int,
    rounding: Rounding = FINE,
    is_shuffled: bool = True,
    drops_last: bool = False,
) -> list[PlannedBatch]:
    """Every sample once, in batches whose order and (under ``buckets``) make-up depend on the seed; or in their order.

    The last batch may be short, or is left out if there are others: those samples, of any length, that come last.
    """
    count = len(lengths)
    order = np.random.default_rng(seed).permutation(count).astype(np.int64) if is_shuffled else np.arange(count)
    if drops_last and count > global_batch:
        order = order[: count - count % global_batch]
    batches = _bucketed(order, lengths, global_batch, seed) if padding == "buckets" else _cut(order, global_batch)
    return [
        plan_batch(batch, lengths, micro_batch=micro_batch, padding=padding, max_tokens=max_tokens, rounding=rounding)
        for batch in batches
    ]


def plan_evaluation(
    lengths: Indices, *, micro_batch: int, padding: Padding, max_tokens: int, rounding: Rounding = FINE
) -> list[PlannedBatch]:
    """Every sample once, one micro batch a step, sorted by length where that saves padding."""
    order = np.arange(len(lengths), dtype=np.int64)
    if padding in _SORTED:
        order = order[np.argsort(-lengths, kind="stable")]
    cut = _cut(order, micro_batch)
    return [
        plan_batch(batch, lengths, micro_batch=micro_batch, padding=padding, max_tokens=max_tokens, rounding=rounding)
        for batch in cut
    ]


def plan_batch(
    batch: Indices,
    lengths: Indices,
    *,
    micro_batch: int,
    padding: Padding,
    max_tokens: int,
    rounding: Rounding = FINE,
) -> PlannedBatch:
    """One optimizer step on the given samples; within a batch ``buckets`` pads as ``longest`` does."""
    if padding in _SORTED:
        batch = batch[np.argsort(-lengths[batch], kind="stable")]
    micro_batches = tuple(_cut(batch, micro_batch))
    if padding == "packed":
        rows = tuple(rounded(int(lengths[indices].sum()), rounding.row) for indices in micro_batches)
        return PlannedBatch(micro_batches, rows, sum(rows), int((lengths[batch] ** 2).sum()))
    if padding == "max":
        widths = (max_tokens,) * len(micro_batches)
    else:
        longest = (rounded(int(lengths[indices].max()), rounding.width) for indices in micro_batches)
        widths = tuple(min(max_tokens, width) for width in longest)
    computed = [(len(indices), width) for indices, width in zip(micro_batches, widths, strict=True)]
    return PlannedBatch(
        micro_batches, widths, sum(count * width for count, width in computed), sum(n * w**2 for n, w in computed)
    )


def num_steps(data: Any, global_batch: int) -> int:
    """Optimizer steps in an epoch of some data, of which the last may be short, or left out if there are others."""
    whole, rest = divmod(len(data.lengths), global_batch)
    return whole if whole and getattr(data, "drops_last", False) else whole + (rest > 0)


def full_batches(plan: Sequence[PlannedBatch]) -> list[PlannedBatch]:
    """Without the last batch where that is short: once in an epoch it has a shape of its own."""
    full = max(batch.num_samples for batch in plan)
    return [batch for batch in plan if batch.num_samples == full]


def every_shape(plan: Sequence[PlannedBatch]) -> list[PlannedBatch]:
    """Batches in which every shape of the plan's micro batches comes up."""
    shapes = {
        (len(indices), width): batch
        for batch in plan
        for indices, width in zip(batch.micro_batches, batch.widths, strict=True)
    }
    return list({id(batch): batch for batch in shapes.values()}.values())


def collate(data: SequenceData, indices: Indices, width: int) -> MicroBatch:
    """Padded ids and mask, both [B, width], and labels [B]. Padding has id 0 and mask false."""
    lengths = data.lengths[indices]
    ids = np.zeros((len(indices), width), dtype=np.int64)
    for row, index in enumerate(indices):
        ids[row, : lengths[row]] = data.ids(int(index))
    mask = np.arange(width) < lengths[:, None]
    return MicroBatch(
        inputs={"ids_BT": torch.from_numpy(ids), "mask_BT": torch.from_numpy(mask)},
        targets=torch.from_numpy(data.labels[indices].astype(np.int64)),
        num_samples=len(indices),
        num_tokens=int(lengths.sum()),
    )


def pack(data: SequenceData, indices: Indices, width: int) -> MicroBatch:
    """The B sequences in one row of ``width`` tokens, filled up with id 0: their ids [1, S] and what ``in_a_row`` says
    of them; and labels [B]."""
    lengths = data.lengths[indices]
    ids = np.zeros(width, dtype=np.int64)
    ids[: lengths.sum()] = np.concatenate([data.ids(int(index)) for index in indices])
    return MicroBatch(
        inputs={"ids_BT": torch.from_numpy(ids)[None], **in_a_row(lengths, width)},
        targets=torch.from_numpy(data.labels[indices].astype(np.int64)),
        num_samples=len(indices),
        num_tokens=int(lengths.sum()),
    )


def in_a_row(lengths: Indices, width: int) -> dict[str, Tensor]:
    """Where sequences of these lengths lie in a row of ``width`` tokens, all int64 but the bounds.

    ``bounds`` [B + 2], int32: where each begins, where the last one ends, and the end of the row. What lies between
    those two is a sequence of its own, perhaps an empty one, that counts for nothing. ``positions_BT`` [1, S]: each
    token's place in its sequence. ``sequence_S`` [S]: its sequence's number, B in the rest.
    """
    ends = np.append(np.cumsum(lengths), width)
    sizes = np.append(lengths, width - ends[-2])
    starts = ends - sizes
    positions = np.arange(width) - np.repeat(starts, sizes)
    positions[ends[-2] :] = 0
    return {
        "positions_BT": torch.from_numpy(positions)[None],
        "sequence_S": torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        "bounds": torch.from_numpy(np.append(0, ends).astype(np.int32)),
    }


def _bucketed(order: Indices, lengths: Indices, global_batch: int, seed: int) -> list[Indices]:
    batches: list[Indices] = []
    for pool in _cut(order, global_batch * BATCHES_PER_BUCKET_POOL):
        batches += _cut(pool[np.argsort(-lengths[pool], kind="stable")], global_batch)
    np.random.default_rng(seed + 1).shuffle(batches)
    return batches


def _cut(order: Indices, size: int) -> list[Indices]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def rounded(size: int, multiple: int) -> int:
    """The next multiple from ``size`` up."""
    return -(-size // multiple) * multiple
