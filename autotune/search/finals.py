"""What a race has shown: each entrant's figures, how they compare, which is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from autotune.measurement import Interval, Measurement, Trial
from autotune.stats import paired_ratio
from autotune.strategy import Strategy

TIE = 0.01
"""Entrants expected this close whose interval holds 1 are as fast as one another: the simpler and leaner wins."""
OF_PROCESSES = 0.017
"""Standard deviation of the logarithm of what processes of one setting take: the ratios of two differ by 2.4 %
(docs/LOG.md 2026-11-23)."""


class Final(msgspec.Struct, frozen=True, kw_only=True):
    """One entrant after the race."""

    trial: Trial
    measurement: Measurement
    """Its figures. The rates are those of the rounds that count: the first entrant's median, times the paired ratio."""
    epoch_s: tuple[float, ...]
    """Seconds of a training epoch, by round; without the rounds that other work disturbed, where enough were not."""
    lives: tuple[int, ...] | None = None
    """Which process ran each of these rounds, the same for all entrants, where processes were replaced."""


def ranked(finals: Sequence[Final], loss: Callable[[Final], float]) -> list[Final]:
    """The entrants, the best first; of those that tie with the best first those whose batches have the baseline's
    samples, then by simplicity, then by memory."""
    by_loss = sorted(finals, key=loss)
    if not by_loss:
        return []
    best = by_loss[0]
    tied = [final for final in by_loss if final is best or _ties(best, final, loss(final) / loss(best))]
    tied.sort(key=lambda final: (*_plainness(final.trial.strategy), final.measurement.peak_memory_bytes))
    return tied + [final for final in by_loss if final not in tied]


def num_changed(strategy: Strategy) -> int:
    """Knobs that differ from the plain baseline: the fewer, the simpler. Accumulation follows from the micro batch."""
    plain = Strategy(micro_batch=strategy.global_batch)
    return len(strategy.changed(plain).keys() - {"accumulation"})


def _plainness(strategy: Strategy) -> tuple[bool, int]:
    return strategy.padding == "buckets", num_changed(strategy)


def ratio(slow: Final, fast: Final) -> Interval:
    """How many times faster one trains than the other, paired by round."""
    return paired_ratio(slow.epoch_s, fast.epoch_s, slow.lives)


def log_error(finals: Sequence[Final]) -> float:
    """Standard error of the logarithm of what a race says that each entrant takes beside the others: by how they differ
    from round to round beyond what a round did to all, and by how many processes each had. Infinite where there is
    nobody to compare with, or a single round."""
    if len(finals) < 2 or len(finals[0].epoch_s) < 2:
        return math.inf
    logs = np.log([final.epoch_s for final in finals])
    num_entrants, num_rounds = logs.shape
    rests = logs - logs.mean(0) - logs.mean(1, keepdims=True) + logs.mean()
    of_rounds = float(np.square(rests).sum()) / ((num_entrants - 1) * (num_rounds - 1)) / num_rounds
    lives = finals[0].lives
    return math.sqrt(of_rounds + OF_PROCESSES**2 / (len(set(lives)) if lives else 1))


def _ties(best: Final, other: Final, loss_ratio: float) -> bool:
    interval = ratio(other, best)
    return loss_ratio <= 1 + TIE and interval.low <= 1.0 <= interval.high
