"""What untried settings are expected to take, from the trials so far: a Gaussian process over the knobs' values.

The logarithm of a run's seconds is a sum of what each knob's value does, what two of them do together, three, and so
on: an additive kernel of all orders (Duvenaud, Nickisch and Rasmussen 2011). An allocator that retains memory, say,
helps eager attention on padded batches, and nothing else. But for one scale, the sizes are not fitted, two dozen trials
would not bear that: they say by how much a knob usually moves a run (docs/LOG.md 2026-11-23). What is known without a
trial is divided out first: the setting's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autotune.strategy import Attention, Strategy

USUAL: dict[str, float] = {
    "precision": 0.6,
    "padding": 0.5,
    "compile": 0.3,
    "attention": 0.3,
    "graphs": 0.3,
    "allocator": 0.3,
    "micro_batch": 0.3,
    "checkpoint": 0.2,
    "memory_format": 0.2,
    "threads": 0.2,
    "compile_scope": 0.1,
    "workers": 0.1,
    "optimizer": 0.05,
    "prefetch": 0.03,
}
"""Standard deviation of what a knob's values do by themselves to the logarithm of the seconds, where they do much."""
JOINT: dict[str, float] = {
    "precision": 0.1,
    "memory_format": 0.1,
    "padding": 0.07,
    "attention": 0.07,
    "allocator": 0.07,
    "compile_scope": 0.05,
    "graphs": 0.1,
    "threads": 0.05,
    "workers": 0.05,
    "micro_batch": 0.05,
    "compile": 0.03,
    "checkpoint": 0.02,
    "prefetch": 0.01,
    "optimizer": 0.005,
}
TOGETHER = 10.0
"""What two knobs do beyond their sum has this times the product of their joint sizes; what three do beyond that, its
square times the product of theirs; and so on. Rounded from what makes the recorded grids likely (docs/LOG.md
2026-11-23 and 24)."""
USUAL_OF_MEMORY: dict[str, float] = {
    **dict.fromkeys(USUAL, 0.1),
    "micro_batch": 1.0,
    "checkpoint": 0.5,
    "padding": 0.4,
    "attention": 0.3,
    "precision": 0.3,
}
TOGETHER_OF_MEMORY = 0.4
"""Both of peak memory, which is nearly affine in what the knobs do."""


class Prior(NamedTuple):
    """What is expected of settings before any is tried."""

    usual: Mapping[str, float] = USUAL
    joint: Mapping[str, float] = JOINT
    together: float = TOGETHER
    """What knobs do beyond their sum: as ``TOGETHER`` says, of sizes ``joint``."""
    scales: Sequence[float] = (1.0,)
    """Knobs do by themselves so many times what is usual: the first, unless another makes what is known clearly
    likelier."""
    reach: float = 2.0
    """Where values have an order, what they do has in common ``exp(-1 / reach)`` with what their neighbours do."""
    work: Callable[[Strategy], float] = lambda strategy: 1.0
    """What a setting's loss is in proportion to, but for what trials tell."""
    same_kernel: Mapping[Attention, Attention] = {}
    """Attention settings that run the kernel of another."""


PRIOR_OF_TIME = Prior(scales=(1.0, 1 / 6))
"""On the CPUs that were recorded, knobs do little by themselves beside their work; on others they may do much."""
PRIOR_OF_MEMORY = Prior(USUAL_OF_MEMORY, USUAL_OF_MEMORY, TOGETHER_OF_MEMORY)
"""Where nothing is known of the work."""


def prior_of(memory: float, work: Callable[[Strategy], float]) -> Prior:
    """For a loss that is seconds to the power of ``1 - memory`` times bytes to the power of ``memory``, where the
    seconds go by the work."""
    if memory == 0:
        return PRIOR_OF_TIME._replace(work=work)
    usual = {knob: math.hypot((1 - memory) * found, memory * USUAL_OF_MEMORY[knob]) for knob, found in USUAL.items()}
    return Prior(usual, usual, TOGETHER_OF_MEMORY, work=lambda strategy: work(strategy) ** (1 - memory))


_OTHER = 0.1
_CLEARLY = 1.0
"""Of the logarithm of a likelihood."""
_LEVEL = 3.0
"""Nothing is known beforehand of how long a run takes."""
_POWER = 0.4
"""It goes by its work to the power of 1, give or take this: a device that waits for launches heeds the work less."""
ORDERED = ("micro_batch", "workers", "threads", "prefetch")
"""Knobs whose values are alike where they are neighbours."""
Matrix = NDArray[np.float64]


class Known(NamedTuple):
    """A strategy that was tried."""

    strategy: Strategy
    loss: float
    noise: float
    """The loss's relative standard deviation."""
    may_win: bool = True
    """Whether it is measured to the end, fits the limits and has not failed."""
    race: int | None = None
    """Which race said so: its entrants share an unknown speed of the device, so that it tells their ratios alone."""


class Surrogate:
    """Fitted to what is known of some settings, whose knobs take the given values."""

    def __init__(
        self, values: Mapping[str, Sequence[Any]], known: Sequence[Known], prior: Prior = PRIOR_OF_TIME
    ) -> None:
        self._work, self._together, self._reach = prior.work, prior.together, prior.reach
        self._usual_work = math.exp(np.mean([math.log(prior.work(one.strategy)) for one in known]))
        self._knobs = [knob for knob in values if len(values[knob]) > 1]
        self._places = {knob: {value: place for place, value in enumerate(values[knob])} for knob in self._knobs}
        kernels = self._places.get("attention", {})
        kernels |= {one: kernels[other] for one, other in prior.same_kernel.items() if {one, other} <= kernels.keys()}
        self._variances = np.square([prior.usual.get(knob, _OTHER) for knob in self._knobs])
        self._joint = np.square([self._together * prior.joint.get(knob, _OTHER) for knob in self._knobs])
        self._is_ordered = np.array([knob in ORDERED for knob in self._knobs])
        self._known = self._encoded([one.strategy for one in known])
        logs = np.log([one.loss for one in known]) - self._known[:, -1]
        self._mean = float(logs.mean())
        noise = np.diag(np.square([one.noise for one in known])) + _LEVEL**2 * _of_one_race(known)
        usual = self._variances
        self.log_likelihood = -math.inf
        """Of what is known, but for a constant."""
        for scale in prior.scales:
            self._variances = scale**2 * usual
            root = np.linalg.cholesky(self._covariance(self._known, self._known) + noise)
            weights = np.linalg.solve(root.T, np.linalg.solve(root, logs - self._mean))
            log_likelihood = float(-(logs - self._mean) @ weights / 2 - np.log(np.diag(root)).sum())
            if log_likelihood > self.log_likelihood + _CLEARLY:
                self.log_likelihood, self._root, self._weights = log_likelihood, root, weights
                likeliest = self._variances
        self._variances = likeliest

    def predict(self, settings: Sequence[Strategy]) -> tuple[Matrix, Matrix]:
        """Mean and standard deviation of the logarithm of each setting's loss."""
        wanted = self._encoded(settings)
        across = self._covariance(wanted, self._known)
        reduced = np.linalg.solve(self._root, across.T)
        variance = self._variance(wanted) - np.square(reduced).sum(0)
        return self._mean + wanted[:, -1] + across @ self._weights, np.sqrt(np.maximum(variance, 1e-12))

    def log_ratio(self, one: Strategy, other: Strategy) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of how many times longer one takes than the other."""
        wanted = self._encoded([one, other])
        across = self._covariance(wanted, self._known)
        reduced = np.linalg.solve(self._root, across.T)
        joint = self._covariance(wanted, wanted) - reduced.T @ reduced
        mean = wanted[:, -1] + across @ self._weights
        variance = joint[0, 0] + joint[1, 1] - 2 * joint[0, 1]
        return float(mean[0] - mean[1]), math.sqrt(max(float(variance), 0.0))

    def _encoded(self, settings: Sequence[Strategy]) -> Matrix:
        """A row for each: the places of its knobs' values, and the logarithm of its work beside the usual."""
        rows = [
            [
                *(self._places[knob][getattr(one, knob)] for knob in self._knobs),
                math.log(self._work(one) / self._usual_work),
            ]
            for one in settings
        ]
        return np.asarray(rows, dtype=float).reshape(len(settings), len(self._knobs) + 1)

    def _variance(self, rows: Matrix) -> Matrix:
        return self._summed(np.ones(len(self._knobs)), np.square(rows[:, -1]))

    def _covariance(self, rows: Matrix, columns: Matrix) -> Matrix:
        distance = np.abs(rows[:, None, :-1] - columns[None, :, :-1])
        alike = np.where(self._is_ordered, np.exp(-distance / self._reach), distance == 0)
        return self._summed(alike, np.outer(rows[:, -1], columns[:, -1]))

    def _summed(self, alike: Matrix, work: Matrix) -> Matrix:
        """Level, what the knobs do alone and together, and how the work counts, from how alike two settings are in
        every knob and the product of their works' logarithms."""
        joint = alike * self._joint
        beyond = (np.prod(1 + joint, -1) - 1 - joint.sum(-1)) / self._together**2
        summed: Matrix = _LEVEL**2 + alike @ self._variances + beyond + _POWER**2 * work
        return summed


def _of_one_race(known: Sequence[Known]) -> Matrix:
    races = np.array([math.nan if one.race is None else one.race for one in known])  # which equals nothing
    are_one: Matrix = np.equal.outer(races, races).astype(float)
    return are_one


def expected_gain(best_log: float, mean: Matrix, deviation: Matrix) -> Matrix:
    """By what share of the best's time each setting is expected to take less, where it does: the expected improvement
    (Mockus 1975) of a log-normal, the mean of max(0, 1 - x / best)."""
    z = (best_log - mean) / deviation
    smaller, partial = _normal(z), _normal(z - deviation)
    gain: Matrix = smaller - np.exp(mean - best_log + np.square(deviation) / 2) * partial
    return np.maximum(gain, 0.0)


def _normal(z: Matrix) -> Matrix:
    """The standard normal's distribution function."""
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
