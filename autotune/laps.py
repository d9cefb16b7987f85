"""What timed laps say: which of them are warm-up, how long an epoch takes at their rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autotune.cost import BY_TOKENS, Cost, Work, fit, total
from autotune.measurement import Lap

STEADY = 1.25
"""A first lap belongs to the warm-up while it costs this much more than the median lap after it, for its work."""


class Epoch(NamedTuple):
    """What an epoch of a run consists of."""

    work: Work
    num_samples: int
    num_steps: int
    usual_cost: Cost = BY_TOKENS
    """How long batches usually take by their shape."""


def epoch_seconds(rounds: Sequence[Sequence[Lap]], epoch: Epoch) -> list[float]:
    """Seconds of a whole epoch by each round's laps, carried over to the epoch by one cost, fitted to all of them."""
    laps = [lap for found in rounds for lap in found]
    cost = fit([lap_work(lap) for lap in laps], [lap.seconds for lap in laps], epoch.usual_cost)
    whole = cost.of(epoch.work)
    return [sum(lap.seconds for lap in found) * whole / cost.of(total(map(lap_work, found))) for found in rounds]


def steady(laps: list[Lap], cost: Cost = BY_TOKENS) -> tuple[list[Lap], list[Lap]]:
    """Warm-up laps and timed laps. The first lap is always warm-up, unless it is the only one; later ones are where
    something was compiled in them, unless all are."""
    start = first_steady(laps, cost)
    late = laps[start:]
    timed = uncompiled(late)
    compiled = [lap for lap in late if lap.num_compiled] if len(timed) < len(late) else []
    return laps[:start] + compiled, timed


def uncompiled(laps: Sequence[Lap]) -> list[Lap]:
    """Those in which nothing was compiled, unless something was in all."""
    return [lap for lap in laps if not lap.num_compiled] or list(laps)


def first_steady(laps: list[Lap], cost: Cost) -> int:
    """Where the warm-up is over."""
    costs = [lap.seconds / cost.of(lap_work(lap)) for lap in laps]
    start = min(1, len(laps) - 1)
    while start < len(laps) - 2 and costs[start] > STEADY * float(np.median(costs[start + 1 :])):
        start += 1
    return start


def power_w(laps: Sequence[Lap]) -> float | None:
    """Mean power over the laps, in watts; None where a lap's energy is not known."""
    drawn = [lap.joules for lap in laps if lap.joules is not None]
    return sum(drawn) / sum(lap.seconds for lap in laps) if len(drawn) == len(laps) else None


def lap_work(lap: Lap) -> Work:
    """What a lap has done."""
    return Work(lap.num_steps, lap.padded_tokens, lap.padded_squares)
