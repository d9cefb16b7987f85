"""A user's own data: the samples of a DataLoader's dataset, read as it reads them.

The global batch is read as a whole and then cut up, so that its samples are padded, and drawn at random, as they are in
the user's own loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from autotune.data.batching import Indices
from autotune.errors import UsageError, kind_of
from autotune.workloads.base import Known
from autotune.workloads.own_batch import Batch

MOST_KNOWN = 2048
"""Samples that are read before a search, of which alone its trials train: each finds them equally near."""
ENOUGH_S = 10.0
"""Fewer are read where these take longer, though never fewer than ``LEAST_BATCHES``."""
LEAST_BATCHES = 4
MOSTLY_WAITS = 0.5
"""Reading that takes less of a core's time."""
_SAY_EVERY_S = 2.0
_ACCELERATE_S = "DataLoaderShard"
"""Gives the batches of the DataLoader that it was made of."""
_SEEDS = "seed_worker"
"""What transformers' Trainer sets processes up with: it seeds them, as is done here for each batch."""

Collate = Callable[[list[Any]], Any]
BatchOf = Callable[[Any], Batch]


class Source(NamedTuple):
    """Where samples come from."""

    dataset: Any
    """Map-style."""
    collate: Collate
    drops_last: bool = False
    """Whether an epoch's last samples are left out where they are no whole batch."""
    is_shuffled: bool = True
    batch_size: int = 1
    alone_because: str | None = None
    """Why it is not read in loader processes; None where it may be."""


class Data(NamedTuple):
    """What a training's batches are made of, as far as that is known."""

    train: Source | None = None
    test: Source | None = None
    """None: a part of the other."""
    why_not: str = ""
    """There is none to train on; nothing where there is only a batch."""

    @classmethod
    def of(cls, train: Any, test: Any = None, *, is_asked: bool = False) -> Data:
        """Of loaders, of which other than DataLoaders say nothing. Raises UsageError for one to test with that does not
        take each sample once, where the user ``is_asked`` for it."""
        if not isinstance(train, DataLoader):
            return cls()
        found, tested = _source_of(train), _source_of(test) if isinstance(test, DataLoader) else None
        if isinstance(found, str):
            return cls(why_not=found)
        if isinstance(tested, str) and is_asked:
            raise UsageError(f"the data to test on: {tested}; give a DataLoader that takes each sample once")
        return cls(found, None if isinstance(tested, str) else tested)

    def batch(self) -> Any:
        """Some of its samples, the same ones always, as many as a batch has. Raises UsageError where that is none."""
        assert self.train is not None
        count, size = len(self.train.dataset), self.train.batch_size
        if not count or (self.train.drops_last and count < size):
            raise UsageError(f"the loader gives no batch: its dataset has {count} samples")
        return _fetched(self.train, np.sort(np.random.default_rng(0).permutation(count)[:size]), 0)


def loaders_of(batches: Any) -> tuple[Any, Any]:
    """The loader to train with and the one to test with, where a function gives both; else what it gives, and None.
    Raises UsageError for other loaders among what it gives."""
    are_loaders = [isinstance(one, DataLoader) for one in batches] if isinstance(batches, list | tuple) else []
    if not any(are_loaders):
        return batches, None
    if len(are_loaders) != 2 or not all(are_loaders):
        raise UsageError("several loaders are two DataLoaders: (to train with, to test with)")
    return batches[0], batches[1]


def _source_of(loader: DataLoader[Any]) -> Source | str:
    """A DataLoader's, or why its batches do not come of its dataset alone."""
    dataset: Any = loader.dataset
    if type(loader).__iter__ is not DataLoader.__iter__ and type(loader).__name__ != _ACCELERATE_S:
        return "its loader makes batches in a way of its own"
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return "its loader's samples come one by one"
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return "its loader puts batches together in a way of its own"
    shuffles = is_shuffled(loader)
    is_sequential = type(batches.sampler) is SequentialSampler and len(batches.sampler) == len(dataset)
    if not (shuffles or is_sequential):
        return "its loader chooses samples in a way of its own"
    return Source(dataset, loader.collate_fn, batches.drop_last, shuffles, batches.batch_size, _alone_because(loader))


def _alone_because(loader: DataLoader[Any]) -> str | None:
    """Why loader processes would read otherwise than the process that trains."""
    set_up: Any = loader.worker_init_fn
    if set_up is not None and getattr(getattr(set_up, "func", set_up), "__name__", "") != _SEEDS:
        return "the loader sets its processes up by a worker_init_fn"
    return None if sys.platform == "linux" else "loader processes are forked, on Linux alone"


def is_shuffled(loader: DataLoader[Any]) -> bool:
    """Whether it takes every sample once, in any order, and not as a sampler of the user's says."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", None)
    dataset: Any = loader.dataset
    if type(sampler) is RandomSampler or type(sampler).__name__ == "SeedableRandomSampler":
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source) == len(dataset)
    return type(sampler).__name__ == "LengthGroupedSampler"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A dataset's samples. What is drawn at random in reading them depends on the seed and on a batch's samples, on
    nothing else."""

    source: Source
    batch_of: BatchOf
    """Raises UsageError for a batch that is none."""
    samples: Indices
    """Which sample of the dataset is at each position."""
    lengths: Indices
    """Tokens in each."""
    is_known: bool = False
    """Whether these are their lengths; else that of the longest."""
    seed: int = 0

    @classmethod
    def all_of(cls, source: Source, batch_of: BatchOf, width: int, lengths: Sequence[int] | None = None) -> Samples:
        """Every sample; without ``lengths`` they count as ``width`` tokens each. Raises UsageError for lengths of
        other samples."""
        if not (hasattr(source.dataset, "__len__") and hasattr(source.dataset, "__getitem__")):
            raise UsageError(
                f"{kind_of(source.dataset)} is no map-style dataset; in your loop: run.step(run.split(batch))"
            )
        count = len(source.dataset)
        if lengths is not None and len(lengths) != count:
            raise UsageError(f"there are {len(lengths):,} lengths for {count:,} samples")
        return cls(
            source=source,
            batch_of=batch_of,
            samples=np.arange(count),
            lengths=np.resize(np.asarray(width if lengths is None else lengths, dtype=np.int64), count),
            is_known=lengths is not None or width == 1,
        )

    @property
    def drops_last(self) -> bool:
        """Whether an epoch's last samples are left out where they are no whole batch."""
        return self.source.drops_last

    @property
    def is_shuffled(self) -> bool:
        """Whether every epoch has another order."""
        return self.source.is_shuffled

    def fetch(self, positions: Indices) -> Any:
        """The batch of these samples, as the DataLoader gives it but for their order."""
        return _fetched(self.source, self.samples[np.sort(positions)], self.seed)

    def batch(self, positions: Indices) -> Batch:
        """The same, to be cut up. Raises UsageError where it has not a row for each."""
        found = self.batch_of(self.fetch(positions))
        if found.size != len(positions):
            raise UsageError(
                f"of {len(positions)} samples the collate function made {found.size}: with such batches, train in a "
                "loop of your own, run.step(run.split(batch))"
            )
        return found

    def augmented(self, seed: int) -> Samples:
        """The same as another epoch draws them."""
        return dataclasses.replace(self, seed=seed)

    @property
    def alone_because(self) -> str | None:
        """Why they are not read in loader processes; None where they may be."""
        return self.source.alone_because

    def some(self, count: int) -> Samples:
        """So many of them, drawn once and for all."""
        chosen = np.sort(np.random.default_rng(0).permutation(len(self.samples))[:count])
        return dataclasses.replace(self, samples=self.samples[chosen], lengths=self.lengths[chosen])

    def as_known(self, known: Known) -> Samples:
        """As many, but of those alone that are known, again and again."""
        count = len(self.samples)
        samples, lengths = self.samples[np.asarray(known.positions)], np.asarray(known.lengths)
        return dataclasses.replace(
            self, samples=np.resize(samples, count), lengths=np.resize(lengths, count), is_known=True
        )

    def typical(self, count: int) -> Indices:
        """The positions of so many that are known, from the shortest to the longest."""
        order = np.argsort(self.lengths, kind="stable")
        return np.sort(order[np.linspace(0, len(order) - 1, count).round().astype(int)])

    def measured(self, batch_size: int, num_workers: int, on_progress: Callable[[str], None]) -> Samples:
        """With the length of each, for which all are read once where it is not known, and there is a mask to tell."""
        if self.is_known:
            return self
        count = len(self.samples)
        chunks = np.split(np.arange(count), range(batch_size, count, batch_size))
        lengths: list[Indices] = []
        say = _seldom(on_progress)
        for found, _ in self._read(chunks, num_workers):
            if found is None:
                return dataclasses.replace(self, is_known=True)
            lengths.append(found)
            say(f"reading how long {count:,} samples are, {len(lengths) / len(chunks):.0%}")
        return dataclasses.replace(self, lengths=np.concatenate(lengths), is_known=True)

    def is_repeatable(self, batch_size: int) -> bool:
        """Whether a batch is the same when it is read again: not where random numbers are drawn that are the dataset's
        or the collate function's own."""
        first, second = (tree_leaves(self.fetch(np.arange(len(self.samples))[:batch_size])) for _ in range(2))
        return all(map(_equal, first, second))

    def known(self, batch_size: int, on_progress: Callable[[str], None]) -> Known:
        """Some of them, read batch by batch. Raises what reading raises."""
        wanted = min(len(self.samples), max(MOST_KNOWN, LEAST_BATCHES * batch_size))
        shuffled = np.random.default_rng(0).permutation(len(self.samples))[:wanted]
        chunks = np.split(shuffled, range(batch_size, wanted, batch_size))
        positions: list[int] = []
        lengths: list[int] = []
        widths = []
        start, say = time.monotonic(), _seldom(on_progress)
        for chunk, (found, width) in zip(chunks, self._read(chunks, 0), strict=False):
            positions += np.sort(chunk).tolist()
            lengths += [] if found is None else found.tolist()
            widths.append(width)
            say(f"reading samples, {len(positions):,} of {wanted:,}")
            if len(widths) >= LEAST_BATCHES and time.monotonic() - start > ENOUGH_S:
                break
        began = time.perf_counter(), time.process_time()
        for chunk in chunks[: min(LEAST_BATCHES, len(widths))]:  # again: what disks have to do with it is over
            self.fetch(chunk)
        wall_s, core_s = time.perf_counter() - began[0], time.process_time() - began[1]
        return Known(
            positions=tuple(positions),
            lengths=tuple(lengths or [max(widths)] * len(positions)),
            width=max(widths),
            is_padded_by_batch=len(set(widths)) > 1,
            busy=1.0 if core_s > MOSTLY_WAITS * wall_s else 1 / 8,
        )

    def _read(self, chunks: Sequence[Indices], num_workers: int) -> DataLoader[tuple[Indices | None, int]]:
        """The lengths of each chunk's samples, in the order of their positions, if they tell; the width of their
        batch."""
        return DataLoader(
            _Lengths(self, chunks),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        )


class _Lengths(Dataset[tuple[Indices | None, int]]):
    def __init__(self, samples: Samples, chunks: Sequence[Indices]) -> None:
        self._samples, self._chunks = samples, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> tuple[Indices | None, int]:
        batch = self._samples.batch(self._chunks[index])
        return batch.lengths if batch.tells_padding else None, batch.width


def _fetched(source: Source, samples: Indices, seed: int) -> Any:
    indices: list[int] = samples.tolist()
    with unchanged_numbers():
        drawn = [zlib.crc32(samples.tobytes(), zlib.crc32(kind, seed)) for kind in (b"python", b"numpy", b"torch")]
        random.seed(drawn[0])
        np.random.seed(drawn[1])
        torch.default_generator.manual_seed(drawn[2])  # an accelerator's numbers are left alone
        if getattr(source.dataset, "__getitems__", None):  # as DataLoader asks, where a dataset gives several at once
            return source.collate(source.dataset.__getitems__(indices))
        return source.collate([source.dataset[index] for index in indices])


def _seldom(on_progress: Callable[[str], None]) -> Callable[[str], None]:
    """Says how far it is every other second."""
    said = time.monotonic()

    def say(words: str) -> None:
        nonlocal said
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            on_progress(words)

    return say


def _equal(first: Any, second: Any) -> bool:
    is_tensor = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    return not is_tensor or (
        first.shape == second.shape and bool(torch.eq(first, second).logical_or(first != first).all())
    )


def _as_it_is(item: Any) -> Any:
    return item


@contextlib.contextmanager
def unchanged_numbers() -> Iterator[None]:
    """What is drawn in here from Python's, NumPy's and torch's random numbers on the host is drawn again after it."""
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
