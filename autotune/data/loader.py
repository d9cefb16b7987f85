"""Global batches as ``Step`` takes them, epoch after epoch, loaded by as many processes as the strategy says."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from autotune.data.batching import (
    Indices,
    MicroBatch,
    PlannedBatch,
    Rounding,
    num_steps,
    plan_batch,
    plan_epoch,
)
from autotune.strategy import Strategy


class Loader:
    """Global batches for ``Step``: every iteration is the next epoch, reshuffled from the seed."""

    def __init__(
        self,
        data: Any,
        strategy: Strategy,
        *,
        max_tokens: int,
        seed: int,
        is_pinned: bool,
        rounding: Rounding,
        collate: Callable[[Any, Indices, int], MicroBatch],
        is_training: bool = True,
    ) -> None:
        """``collate`` makes micro batches of data that do not give whole ``batch``es, to be split."""
        self._data = data
        self._collate = collate
        self._is_training = is_training
        self._strategy = strategy
        self._max_tokens = max_tokens
        self._seed = seed
        self._is_pinned = is_pinned
        self._rounding = rounding
        self.epoch = 0
        """The epoch that the next iteration gives."""
        self.caveat = ""
        """What to warn of when it is iterated over."""

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return num_steps(self._data, self._strategy.global_batch)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """The next epoch's batches."""
        if self.caveat:
            warnings.warn(self.caveat, stacklevel=2)
        epoch = self.epoch
        self.epoch += 1
        return self.over(self.plan(epoch), epoch)

    def plan(self, epoch: int) -> list[PlannedBatch]:
        """What an epoch will give, without giving it."""
        return plan_epoch(
            self._data.lengths,
            global_batch=self._strategy.global_batch,
            micro_batch=self._strategy.micro_batch,
            padding=self._strategy.padding,
            max_tokens=self._max_tokens,
            seed=self._epoch_seed(epoch),
            rounding=self._rounding,
            is_shuffled=getattr(self._data, "is_shuffled", True),
            drops_last=getattr(self._data, "drops_last", False),
        )

    def plan_of(self, batches: Iterable[Indices]) -> list[PlannedBatch]:
        """A step on each of the given sets of samples, cut up and padded as an epoch's batches are."""
        return [
            plan_batch(
                batch,
                self._data.lengths,
                micro_batch=self._strategy.micro_batch,
                padding=self._strategy.padding,
                max_tokens=self._max_tokens,
                rounding=self._rounding,
            )
            for batch in batches
        ]

    @property
    def lengths(self) -> Indices:
        """Tokens in each sample."""
        lengths: Indices = self._data.lengths
        return lengths

    def _epoch_seed(self, epoch: int) -> int:
        return self._seed + 1000 * epoch

    def over(self, batches: Sequence[PlannedBatch], epoch: int = 0) -> Iterator[list[MicroBatch]]:
        """The given batches, loaded as that epoch's are."""
        workers = self._strategy.workers
        is_varied = self._is_training and hasattr(self._data, "augmented")
        data = self._data.augmented(self._epoch_seed(epoch)) if is_varied else self._data
        loader: DataLoader[list[MicroBatch]] = DataLoader(
            _GlobalBatches(data, batches, self._collate, self._strategy, self._rounding),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self._strategy.prefetch if workers else None,
            pin_memory=self._is_pinned,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        return iter(loader)


def with_lengths(data: Any, strategy: Strategy, on_progress: Callable[[str], None] = lambda _: None) -> Any:
    """The data, with its samples' lengths where these say which are put together: what does not know them yet reads
    every sample once."""
    if strategy.padding != "buckets" or not hasattr(data, "measured"):
        return data
    return data.measured(strategy.global_batch, strategy.workers, on_progress)


class _GlobalBatches(Dataset[list[MicroBatch]]):
    def __init__(
        self,
        data: Any,
        batches: Sequence[PlannedBatch],
        collate: Callable[[Any, Indices, int], MicroBatch],
        strategy: Strategy,
        rounding: Rounding,
    ) -> None:
        self._data = data
        self._batches = batches
        self._collate = collate
        self._strategy = strategy
        self._rounding = rounding

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[MicroBatch]:
        batch = self._batches[index]
        if hasattr(self._data, "batch"):
            whole = self._data.batch(np.concatenate(batch.micro_batches))
            micro_batches: list[MicroBatch] = whole.split(self._strategy, self._rounding)
            return micro_batches
        return [
            self._collate(self._data, indices, width)
            for indices, width in zip(batch.micro_batches, batch.widths, strict=True)
        ]
