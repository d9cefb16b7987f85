"""Predicts a strategy's peak memory from trials that differ from it in the micro batch alone, or else from all.

Peak memory is nearly affine in the micro batch: weights, gradients and optimizer state are the same for all, the
activations grow with it. The two trials of a kind that are nearest predict the next. On a CPU the line bends: large
blocks go back to the kernel when they are freed, small ones stay, so that far extrapolation says too much
(docs/LOG.md 2026-11-21).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from autotune.measurement import Outcome, Trial
from autotune.search.surrogate import PRIOR_OF_MEMORY, Known, Surrogate
from autotune.strategy import Strategy

NOISE = 0.03
"""Relative standard deviation of a trial's peak."""
BENT = 0.1
"""How far from the straight line through the nearest two a third is: a relative standard deviation."""
BEYOND, VAGUE = 1.25, 0.25
"""What ran out of memory would have taken more than the limit by about so much, give or take."""
AT_ONCE = 4096
"""So many predictions fit the memory at once."""
UNLIKELY, SURE = 0.05, 0.9
"""What fits with less chance is not tried; nor what fits with less than the second, once two of its kind were tried."""


class MemoryModel:
    """Learns from finished and from out-of-memory trials."""

    def __init__(self) -> None:
        self._peaks: dict[Strategy, dict[int, int]] = {}
        self._too_big: dict[Strategy, int] = {}

    def learn(self, trial: Trial) -> None:
        """Takes in a trial's peak, or that it ran out of memory."""
        peak_bytes = None if trial.measurement is None else trial.measurement.peak_memory_bytes
        self.note(trial.strategy, trial.outcome, peak_bytes)

    def note(self, strategy: Strategy, outcome: Outcome, peak_bytes: int | None) -> None:
        """Takes in what a strategy took, None where it did not get so far, or that it ran out of memory."""
        kind, micro_batch = _kind(strategy), strategy.micro_batch
        if peak_bytes is not None:
            self._peaks.setdefault(kind, {})[micro_batch] = peak_bytes
        elif outcome == "oom":
            self._too_big[kind] = min(micro_batch, self._too_big.get(kind, micro_batch))

    def predict(self, strategy: Strategy) -> int | None:
        """Peak memory in bytes; None with fewer than two trials of its kind. A larger micro batch never takes less."""
        peaks = self._peaks.get(_kind(strategy), {})
        if strategy.micro_batch in peaks:
            return peaks[strategy.micro_batch]
        if len(peaks) < 2:
            return None
        sizes = sorted(peaks)
        above = min(max(1, bisect.bisect_left(sizes, strategy.micro_batch)), len(sizes) - 1)
        small, large = sizes[above - 1], sizes[above]
        slope = max(0.0, (peaks[large] - peaks[small]) / (large - small))
        predicted = peaks[small] + slope * (strategy.micro_batch - small)
        below = max((peaks[size] for size in sizes if size <= strategy.micro_batch), default=0)
        return max(int(predicted), below)

    def is_over(self, strategy: Strategy, limit_bytes: int) -> bool:
        """Whether the strategy is known or predicted not to fit."""
        too_big = self._too_big.get(_kind(strategy))
        predicted = self.predict(strategy)
        return (too_big is not None and strategy.micro_batch >= too_big) or (
            predicted is not None and predicted > limit_bytes
        )


class Fit:
    """How likely settings are to stay below a limit, by the peaks, and the lack of memory, of those that were tried."""

    def __init__(
        self, model: MemoryModel, values: Mapping[str, Sequence[Any]], trials: Sequence[Trial], limit_bytes: int
    ) -> None:
        self._model, self._limit_bytes = model, limit_bytes
        self._num_tried = Counter(_kind(trial.strategy) for trial in trials)
        known = peaks(trials)
        known += [
            Known(trial.strategy, BEYOND * limit_bytes, VAGUE)
            for trial in trials
            if trial.outcome == "oom" and not trial.measurement
        ]
        self._surrogate = Surrogate(values, known, PRIOR_OF_MEMORY) if known else None

    def chances(self, strategies: Sequence[Strategy]) -> list[float]:
        """Of each; 0 where it is not worth a trial."""
        if self._surrogate is None:
            return [1.0] * len(strategies)
        found: list[float] = []
        for start in range(0, len(strategies), AT_ONCE):
            some = strategies[start : start + AT_ONCE]
            mean, deviation = self._surrogate.predict(some)
            found += map(self._chance, some, mean.tolist(), deviation.tolist())
        return found

    def _chance(self, strategy: Strategy, mean: float, deviation: float) -> float:
        """By the line through the nearest two of its kind, where there are two; else by what all trials say: mean and
        standard deviation of the peak's logarithm."""
        if self._model.is_over(strategy, self._limit_bytes):
            return 0.0
        if (predicted := self._model.predict(strategy)) is not None:
            mean, deviation = math.log(predicted), BENT
        chance = 0.5 * math.erfc((mean - math.log(self._limit_bytes)) / deviation / math.sqrt(2))
        return chance if chance >= (SURE if self._num_tried[_kind(strategy)] >= 2 else UNLIKELY) else 0.0


def peaks(trials: Sequence[Trial]) -> list[Known]:
    """What those that were measured to the end took."""
    return [Known(trial.strategy, trial.measurement.peak_memory_bytes, NOISE) for trial in trials if trial.measurement]


def _kind(strategy: Strategy) -> Strategy:
    return msgspec.structs.replace(strategy, micro_batch=1, accumulation=1)
