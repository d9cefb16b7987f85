"""What the settings of a recorded grid truly take.

A record is not the truth: on a machine that drifts, records of one setting differ by more than neighbours do, and the
best of hundreds is the luckiest. What all records say together is: a Gaussian process over the knobs' values, told how
much repeats differ, whose sizes are those that make the records most likely (the marginal likelihood, Rasmussen and
Williams 2006, section 5.4.1). It shares its kernel with the search's, but neither its sizes nor what that expects of a
setting's work.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from autotune import backends
from autotune.pace import slowdown
from autotune.search.objective import PlannedRun
from autotune.search.surrogate import Known, Prior, Surrogate
from autotune.strategy import Attention, Strategy
from benchmarks.grid import Grid, Record

USUAL_DEVIATION = 0.03
"""Of the logarithm of a setting's loss, where nothing was recorded twice."""
LEAST_DEVIATION = 0.01
USUAL, TOGETHER, REACH = 0.1, 10.0, 0.5
"""Where the sizes begin: neighbours are hardly alike unless the records say so."""
SWEEPS, FACTORS, CLEARLY = 4, (1 / 4, 1 / 1.5, 1.5, 4.0), 0.5
"""So often is each size in turn multiplied by whichever factor makes the records most likely, where it raises the
logarithm of that by so much; else it is left. The reach comes last: before the sizes are right, it makes up for
them."""


class Truth(NamedTuple):
    """By setting, for those that ran."""

    losses: dict[Strategy, float]
    """Seconds of the planned run."""
    doubt: float
    """Standard deviation of the losses' logarithm."""
    deviation: float
    """The same of single records of a setting."""
    usual_pulse_s: float
    """At whose speed all this is."""


def at_one_speed(record: Record, planned: PlannedRun, usual_pulse_s: float) -> float:
    """Seconds of the planned run by one record, at the speed that the device usually had."""
    assert record.trial.measurement is not None
    return planned.projected_s(record.trial.measurement) / slowdown(record.trial, usual_pulse_s)


def truth_of(grid: Grid, values: Mapping[str, Sequence[Any]]) -> Truth:
    """By all records; ``values`` are the knobs'. Takes seconds for hundreds of records."""
    usual_pulse_s = statistics.median(record.trial.pulse_s for record in grid.records if record.trial.pulse_s)
    same_kernel = backends.get(grid.header.hardware.device.kind).same_kernel
    losses: dict[Strategy, list[float]] = {}
    repeats: dict[Strategy, list[float]] = {}
    failed = {record.trial.strategy for record in grid.records if not record.trial.measurement}
    for record in grid.records:
        if (strategy := record.trial.strategy) not in failed:
            loss = at_one_speed(record, grid.header.planned, usual_pulse_s)
            losses.setdefault(strategy, []).append(loss)
            kernel = same_kernel.get(strategy.attention, strategy.attention)
            repeats.setdefault(msgspec.structs.replace(strategy, attention=kernel), []).append(math.log(loss))
    spread = [(len(found) - 1, statistics.variance(found)) for found in repeats.values() if found[1:]]
    freedom = sum(degrees for degrees, _ in spread)
    pooled = sum(degrees * variance for degrees, variance in spread) / freedom if freedom else USUAL_DEVIATION**2
    deviation = math.sqrt(pooled)
    noise = max(deviation, LEAST_DEVIATION)
    known = [Known(strategy, loss, noise) for strategy, found in losses.items() for loss in found]
    mean, doubt = Surrogate(values, known, fitted(values, known, same_kernel)).predict(list(losses))
    return Truth(dict(zip(losses, np.exp(mean).tolist(), strict=True)), float(doubt.mean()), deviation, usual_pulse_s)


def fitted(
    values: Mapping[str, Sequence[Any]], known: Sequence[Known], same_kernel: Mapping[Attention, Attention]
) -> Prior:
    """The likeliest sizes, but for what a coordinate search misses."""
    sizes = {knob: USUAL for knob, found in values.items() if len(found) > 1}
    best = Prior(sizes, sizes, TOGETHER, reach=REACH, same_kernel=same_kernel)
    likelihood = Surrogate(values, known, best).log_likelihood
    for _ in range(SWEEPS):
        before = best
        for size in ("together", *sizes, "reach"):
            others = [_multiplied(best, size, factor) for factor in FACTORS]
            likelihoods = [Surrogate(values, known, other).log_likelihood for other in others]
            if max(likelihoods) > likelihood + CLEARLY:
                likelihood = max(likelihoods)
                best = others[likelihoods.index(likelihood)]
        if best == before:
            break
    return best


def _multiplied(prior: Prior, size: str, factor: float) -> Prior:
    if size in ("together", "reach"):
        return prior._replace(**{size: getattr(prior, size) * factor})
    sizes = {**prior.usual, size: prior.usual[size] * factor}
    return prior._replace(usual=sizes, joint=sizes)
