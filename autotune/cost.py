"""How long a batch takes by its shape: so much a step, so much a token, so much a squared width (attention).

Timed batches are never the epoch's exact mix of lengths; this carries their times over to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_FITTED = 5
"""With fewer timings, time is taken to go as the model's operations do, or by tokens alone where they are not known."""
_ITERATIONS = 12


class Work(NamedTuple):
    """What some batches consist of."""

    steps: float
    tokens: float
    """Computed, padding included."""
    squares: float
    """Padded width squared, summed over the samples."""

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(*map(sum, zip(self, other, strict=True)))


def total(works: Iterable[Work]) -> Work:
    """All of it."""
    return sum(works, Work(0, 0, 0))


class Cost(NamedTuple):
    """Seconds, up to a factor."""

    per_step: float
    per_token: float
    per_square: float

    def of(self, work: Work) -> float:
        """What some batches cost."""
        return self.per_step * work.steps + self.per_token * work.tokens + self.per_square * work.squares


BY_TOKENS = Cost(0.0, 1.0, 0.0)
_PARTS = (Cost(1.0, 0.0, 0.0), BY_TOKENS, Cost(0.0, 0.0, 1.0))


def fit(works: Sequence[Work], seconds: Sequence[float], usual: Cost = BY_TOKENS) -> Cost:
    """The cost that explains some timings best, no part of it negative; ``usual``, and what a step takes beside it, are
    among those that may.

    Least absolute relative deviations, so that a disturbed timing counts for little (solved by reweighting,
    Schlossmacher 1973). Of the combinations of parts, the one with the least corrected Akaike criterion (Hurvich and
    Tsai 1989), so that few timings are not explained by too many parts.
    """
    count = len(works)
    if count < MIN_FITTED:
        return usual
    shares = np.asarray(works, dtype=float) / np.asarray(seconds, dtype=float)[:, None]
    best, best_criterion = usual, np.inf
    mixtures = [(usual,), (_PARTS[0], usual), *(parts for size in (1, 2, 3) for parts in combinations(_PARTS, size))]
    for parts in mixtures:
        found = _least_deviations(shares @ np.transpose(parts))
        if found is None or count - len(parts) - 2 < 1:
            continue
        mixed = found @ np.asarray(parts)
        deviation = max(float(np.abs(shares @ mixed - 1).mean()), 1e-9)
        parameters = len(parts) + 1  # the spread is one
        criterion = 2 * count * np.log(deviation) + 2 * parameters * count / (count - parameters - 1)
        if criterion < best_criterion - 1e-9:
            best, best_criterion = Cost(*mixed.tolist()), criterion
    return best


def _least_deviations(shares: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Factors that bring every row's weighted sum closest to 1; None where one would be negative."""
    weights = np.ones(len(shares))
    for _ in range(_ITERATIONS):
        found, *_ = np.linalg.lstsq(shares * weights[:, None], weights, rcond=None)
        weights = 1 / np.sqrt(np.maximum(np.abs(shares @ found - 1), 1e-4))
    return np.asarray(found, dtype=np.float64) if (found >= 0).all() else None
