"""Micro batches for a loop that is not ours: which samples are together, and how wide they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)

from autotune.backends.base import Backend
from autotune.data.batching import PlannedBatch, plan_epoch, rounding_of
from autotune.errors import UsageError, kind_of
from autotune.integrations.arguments import warn
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.own_data import Samples, Source, is_shuffled

Collate = Callable[[list[Any]], Any]


def trimmed(collate: Collate, strategy: Strategy, workload: Workload, backend: Backend) -> Collate:
    """``collate``, whose batches lose the padding that no sample of them needs, unless the strategy pads to the limit.

    Raises UsageError where the workload makes its batches itself.
    """
    if workload.trim is None:
        raise UsageError(f"{workload.name} makes its batches itself: for batch in run.loader: run.step(batch)")
    if strategy.padding == "max":
        return collate
    return workload.trim(collate, rounding_of(strategy, is_host=backend.is_host_memory))


def loader(
    data: Any,
    strategy: Strategy,
    workload: Workload,
    backend: Backend,
    *,
    lengths: Sequence[int] | None,
    collate_fn: Collate | None,
    seed: int,
) -> DataLoader[Any]:
    """Micro batches of a DataLoader's batches, ``strategy.accumulation`` of them to a step: sampler, ``collate_fn``,
    ``drop_last`` and ``worker_init_fn`` stay. Of a map-style dataset alone, as the loader that was searched with has
    them, shuffled by ``seed`` where that is.

    With accumulation an epoch's last samples that are no whole batch are left out: trainers would divide their loss by
    all that is accumulated. ``lengths``, tokens in each of the dataset's samples, are what samples are grouped by;
    without them ``buckets`` is left out, with a warning, and a sampler of one's own is kept: its batches are sorted.
    Raises UsageError for lengths of other samples, for other loaders, or where the workload makes its batches itself.
    """
    own = data if isinstance(data, DataLoader) else _plain_loader(data, strategy, workload, seed)
    if (
        type(own).__iter__ is not DataLoader.__iter__
        or type(own.batch_sampler) is not BatchSampler
        or isinstance(own.dataset, IterableDataset)
    ):
        raise UsageError("the loader makes batches in a way of its own; tuned.trim(collate_fn) is for such")
    batches: Any = own.batch_sampler
    if batches.batch_size != strategy.global_batch:
        warn(f"the loader has batches of {batches.batch_size}, and the strategy of {strategy.global_batch}")
    has_a_batch = not isinstance(batches.sampler, Sized) or len(batches.sampler) >= strategy.global_batch
    drops = batches.drop_last or (strategy.accumulation > 1 and has_a_batch)
    if lengths is None and strategy.padding == "buckets":
        warn("padding=buckets needs the samples' lengths: give lengths=[...]")
    if lengths is not None:
        checked(lengths, own.dataset)
    order: Sampler[list[int]]
    if lengths is not None and strategy.padding == "buckets" and is_shuffled(own):
        order = Buckets(lengths, strategy, seed, drops)
    else:
        micro_batches = BatchSampler(batches.sampler, strategy.micro_batch, drops)
        order = SortedOfLoader(micro_batches, lengths, strategy.accumulation, drops)
    return DataLoader(
        own.dataset,
        batch_sampler=order,
        collate_fn=trimmed(collate_fn or own.collate_fn, strategy, workload, backend),
        num_workers=strategy.workers,
        prefetch_factor=strategy.prefetch if strategy.workers else None,
        persistent_workers=strategy.workers > 0,
        pin_memory=backend.pins_memory,
        worker_init_fn=own.worker_init_fn,
        generator=own.generator,
        timeout=own.timeout if strategy.workers else 0,
        multiprocessing_context=own.multiprocessing_context if strategy.workers else None,
    )


def _plain_loader(dataset: Any, strategy: Strategy, workload: Workload, seed: int) -> DataLoader[Any]:
    """A map-style dataset's, like the one that the workload's samples come from."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(f"{kind_of(dataset)} is no dataset with a length; tuned.trim(collate_fn) is for other loaders")
    like = workload.train.source if isinstance(workload.train, Samples) else Source(dataset, default_collate)
    shuffled = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(
        dataset,
        batch_size=strategy.global_batch,
        sampler=shuffled if like.is_shuffled else SequentialSampler(dataset),
        collate_fn=like.collate,
        drop_last=like.drops_last,
    )


def checked(lengths: Sequence[int], dataset: Any) -> Sequence[int]:
    """The lengths. Raises UsageError where they are of other samples."""
    if len(lengths) != len(dataset):
        raise UsageError(f"there are {len(lengths):,} lengths for {len(dataset):,} samples")
    return lengths


class Buckets(Sampler[list[int]]):
    """Micro batches of whole batches as ``autotune train`` would put them together, one that is short last; every
    iteration is the next epoch, or the one that a trainer has set."""

    def __init__(self, lengths: Sequence[int], strategy: Strategy, seed: int, drops_last: bool) -> None:
        self._lengths, self._strategy, self._seed = np.asarray(lengths, dtype=np.int64), strategy, seed
        self._drops_last = drops_last
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self._lengths), self._strategy.global_batch)
        short = 0 if self._drops_last else -(-rest // self._strategy.micro_batch)
        return whole * self._strategy.accumulation + short

    def __iter__(self) -> Iterator[list[int]]:
        plan = plan_epoch(
            self._lengths,
            global_batch=self._strategy.global_batch,
            micro_batch=self._strategy.micro_batch,
            padding=self._strategy.padding,
            max_tokens=int(self._lengths.max(initial=1)),
            seed=self._seed + 1000 * self._epoch,
        )
        self._epoch += 1
        for batch in sorted(plan, key=self._is_short):
            if not (self._drops_last and self._is_short(batch)):
                yield from (indices.tolist() for indices in batch.micro_batches)

    def _is_short(self, batch: PlannedBatch) -> bool:
        return sum(map(len, batch.micro_batches)) < self._strategy.global_batch


class Sorted(Sampler[list[int]]):
    """Another sampler's micro batches, where ``lengths`` are known sorted by them within each that are accumulated
    together."""

    def __init__(self, batches: Any, lengths: Sequence[int] | None, accumulation: int, drops_last: bool) -> None:
        self._batches, self._lengths, self._accumulation = batches, lengths, accumulation
        self._drops_last = drops_last

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the other's next iteration gives."""
        candidates: tuple[Any, ...] = (self._batches, getattr(self._batches, "sampler", None))
        for sampler in candidates:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches) - (len(self._batches) % self._accumulation if self._drops_last else 0)

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self._batches)
        while whole := list(itertools.islice(batches, self._accumulation)):
            if self._drops_last and len(whole) < self._accumulation:
                return
            samples: Iterable[int] = itertools.chain(*whole)
            ordered = iter(samples if self._lengths is None else sorted(samples, key=self._lengths.__getitem__))
            yield from ([*itertools.islice(ordered, len(batch))] for batch in whole)


class SortedOfLoader(Sorted):
    """Of a loader of the user's: trainers set the epoch of its sampler, or put one of theirs in its place."""

    @property
    def sampler(self) -> Any:
        """Which samples are next."""
        return self._batches.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self._batches.sampler = sampler
