"""Predicts a strategy's peak memory from trials that differ from it in the micro batch alone.

Peak memory is nearly affine in the micro batch: weights, gradients and optimizer state are the same for all, the
activations grow with it. The two trials of a kind that are nearest predict the next. On a CPU the line bends: large
blocks go back to the kernel when they are freed, small ones stay, so that far extrapolation says too much
(docs/LOG.md 2026-11-21).
"""

from __future__ import annotations

import bisect

import msgspec

from autotune.measurement import Outcome, Trial
from autotune.strategy import Strategy


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


def _kind(strategy: Strategy) -> Strategy:
    return msgspec.structs.replace(strategy, micro_batch=1, accumulation=1)
