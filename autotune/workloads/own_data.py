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
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from autotune.data.batching import Indices
from autotune.errors import UsageError
from autotune.workloads.base import Known
from autotune.workloads.own_batch import Batch

MOST_KNOWN = 2048
"""Samples that are read before a search, of which alone its trials train: each finds them equally near."""
ENOUGH_S = 10.0
"""Fewer are read where these take longer, though never fewer than ``LEAST_BATCHES``."""
LEAST_BATCHES = 4
_SAY_EVERY_S = 2.0

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


class Data(NamedTuple):
    """What a training's batches are made of, as far as that is known."""

    train: Source | None = None
    test: Source | None = None
    """None: a part of the other."""
    why_not: str = ""
    """There is none to train on; nothing where there is only a batch."""

    @classmethod
    def of(cls, train: Any, test: Any = None) -> Data:
        """Of loaders, of which other than DataLoaders say nothing."""
        if not isinstance(train, DataLoader):
            return cls()
        found, tested = _source_of(train), _source_of(test) if isinstance(test, DataLoader) else ""
        if isinstance(found, str):
            return cls(why_not=found)
        return cls(found, None if isinstance(tested, str) else tested)

    def batch(self, size: int) -> Any:
        """Some of its samples, the same ones always. Raises UsageError where there are none."""
        assert self.train is not None
        if not (count := len(self.train.dataset)):
            raise UsageError("the loader's dataset is empty")
        return _fetched(self.train, np.sort(np.random.default_rng(0).permutation(count)[:size]), 0)


def loaders_of(batches: Any) -> tuple[Any, Any]:
    """The loader to train with and the one to test with, where a function gives both; else what it gives, and None."""
    is_pair = isinstance(batches, list | tuple) and len(batches) == 2
    if is_pair and all(isinstance(loader, DataLoader) for loader in batches):
        return batches[0], batches[1]
    return batches, None


def _source_of(loader: DataLoader[Any]) -> Source | str:
    """A DataLoader's, or why its batches do not come of its dataset alone."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return "its loader's samples come one by one"
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return "its loader puts batches together in a way of its own"
    shuffles = is_shuffled(loader)
    if not (shuffles or isinstance(batches.sampler, SequentialSampler)):
        return "its loader chooses samples in a way of its own"
    return Source(dataset, loader.collate_fn, batches.drop_last, shuffles)


def is_shuffled(loader: DataLoader[Any]) -> bool:
    """Whether it takes every sample once, in any order, and not as a sampler of the user's says."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
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

    def augmented(self, seed: int) -> Samples:
        """The same as another epoch draws them."""
        return dataclasses.replace(self, seed=seed)

    def first(self, count: int) -> Samples:
        """The first of them."""
        return dataclasses.replace(self, samples=self.samples[:count], lengths=self.lengths[:count])

    def as_known(self, known: Known) -> Samples:
        """As many, but of those alone that are known, again and again."""
        count = len(self.samples)
        samples, lengths = self.samples[np.asarray(known.positions)], np.asarray(known.lengths)
        return dataclasses.replace(
            self, samples=np.resize(samples, count), lengths=np.resize(lengths, count), is_known=True
        )

    def measured(self, batch_size: int, num_workers: int, on_progress: Callable[[str], None]) -> Samples:
        """With the length of each, for which all are read once where it is not known."""
        if self.is_known:
            return self
        count = len(self.samples)
        chunks = np.split(np.arange(count), range(batch_size, count, batch_size))
        lengths: list[Indices] = []
        say = _seldom(on_progress)
        for found, _ in self._read(chunks, num_workers):
            lengths.append(found)
            say(f"reading how long {count:,} samples are, {len(lengths) / len(chunks):.0%}")
        return dataclasses.replace(self, lengths=np.concatenate(lengths), is_known=True)

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
            lengths += found.tolist()
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
            lengths=tuple(lengths),
            width=max(widths),
            is_padded_by_batch=len(set(widths)) > 1,
            busy=min(1.0, core_s / wall_s),
        )

    def _read(self, chunks: Sequence[Indices], num_workers: int) -> DataLoader[tuple[Indices, int]]:
        """The lengths of each chunk's samples, in the order of their positions, and the width of their batch."""
        return DataLoader(
            _Lengths(self, chunks),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        )


class _Lengths(Dataset[tuple[Indices, int]]):
    def __init__(self, samples: Samples, chunks: Sequence[Indices]) -> None:
        self._samples, self._chunks = samples, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> tuple[Indices, int]:
        batch = self._samples.batch_of(self._samples.fetch(self._chunks[index]))
        return batch.lengths, batch.width


def _fetched(source: Source, samples: Indices, seed: int) -> Any:
    indices: list[int] = samples.tolist()
    with unchanged_numbers():
        drawn = zlib.crc32(samples.tobytes(), seed)
        random.seed(drawn)
        np.random.seed(drawn)
        torch.default_generator.manual_seed(drawn)  # an accelerator's numbers are left alone
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
