"""A recorded grid as a device to search on: trials cost what they took when they were recorded.

What a setting truly takes is not its record: on a machine that drifts, records of one setting differ by more than
neighbours do, and the best of hundreds is the luckiest. The truth here is what all records say together, smoothed by
the effects of single knobs and of pairs (the surrogate's model, told how much records differ), and a trial of a setting
draws anew around it, as far as repeats say that records differ.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from autotune.measurement import Trial
from autotune.pace import slowdown
from autotune.search.objective import PlannedRun
from autotune.search.space import Space
from autotune.search.surrogate import Known, Surrogate
from autotune.strategy import Strategy, baseline
from autotune.trial.worker import Job, Progress
from autotune.workloads.base import WorkloadRef
from benchmarks.grid import Grid, Record


class GridSpace(Space, frozen=True, kw_only=True):
    """The settings of a grid, and no others."""

    settings: frozenset[Strategy]

    def refusal(self, strategy: Strategy) -> str | None:
        """Whatever was not recorded."""
        return None if strategy in self.settings else "not recorded"


class Recorded:
    """A grid as a device to search on: ``clock`` is what has been spent."""

    def __init__(self, grid: Grid, seed: int = 0) -> None:
        self.grid, self.seed = grid, seed
        self.by_strategy: dict[Strategy, list[Record]] = {}
        for record in grid.records:
            self.by_strategy.setdefault(record.trial.strategy, []).append(record)
        self.usual_pulse_s = statistics.median(r.trial.pulse_s for r in grid.records if r.trial.pulse_s)
        self.clock = 0.0
        self.total_s = sum(records[0].trial.wall_s for records in self.by_strategy.values())
        losses = {
            strategy: [self.loss(record) for record in records]
            for strategy, records in self.by_strategy.items()
            if all(record.trial.measurement for record in records)
        }
        spread = [statistics.variance(map(math.log, found)) for found in losses.values() if len(found) > 1]
        self.deviation = math.sqrt(statistics.mean(spread)) if spread else 0.03
        """Of the logarithm of a setting's loss, from record to record."""
        known = [Known(strategy, loss, self.deviation or 0.01) for strategy, found in losses.items() for loss in found]
        mean, doubt = Surrogate(self.space.values, known).predict(list(losses))
        self.truth = dict(zip(losses, np.exp(mean).tolist(), strict=True))
        """Seconds of the planned run by setting, for those that ran."""
        self.doubt = float(doubt.mean())
        """Standard deviation of the truth's logarithm."""
        self.best = min(self.truth.values())
        self._num_drawn: Counter[Strategy] = Counter()

    def loss(self, record: Record) -> float:
        """Seconds of the planned run, at the speed that the device usually had."""
        assert record.trial.measurement is not None
        planned: PlannedRun = self.grid.header.planned
        return planned.projected_s(record.trial.measurement) / slowdown(record.trial, self.usual_pulse_s)

    def peak_bytes(self, strategy: Strategy) -> int:
        """The largest peak that the setting was recorded with; it must have run."""
        records = self.by_strategy[strategy]
        return max(record.trial.measurement.peak_memory_bytes for record in records if record.trial.measurement)

    def drawn(self, strategy: Strategy) -> tuple[Record, float]:
        """A record of the setting, and the factor that its seconds are moved by: another at every call, the same for
        the same call of one seed."""
        generator = random.Random(f"{self.seed} {self._num_drawn[strategy]} {strategy}")
        self._num_drawn[strategy] += 1
        record, noise = generator.choice(self.by_strategy[strategy]), math.exp(generator.gauss(0, self.deviation))
        factor = 1 / slowdown(record.trial, self.usual_pulse_s)
        if strategy in self.truth:
            factor *= self.truth[strategy] / self.loss(record) * noise
        return record, factor

    def run(
        self,
        number: int,
        job: Job,
        *,
        memory_limit_bytes: int,
        hopeless: Callable[[Progress], str | None] = lambda _: None,
        **_: Any,
    ) -> Trial:
        """Stands in for ``run_trial``."""
        record, factor = self.drawn(job.strategy)
        found = msgspec.structs.replace(record.trial, number=number, pulse_s=None, wall_s=record.trial.wall_s * factor)
        peak_bytes = found.measurement.peak_memory_bytes if found.measurement else 0
        if peak_bytes > memory_limit_bytes and record.laps:
            wall_s = record.laps[0][0] * factor
            self.clock += wall_s
            return msgspec.structs.replace(
                found, outcome="oom", reason="over the limit", measurement=None, wall_s=wall_s
            )
        for num_laps, (at_s, samples_per_s) in enumerate(record.laps, 1):
            progress = Progress(stage="timing", num_laps=num_laps, samples_per_s=samples_per_s / factor)
            if (reason := hopeless(progress)) is not None:
                self.clock += at_s * factor
                rate = progress.samples_per_s
                return msgspec.structs.replace(
                    found, outcome="pruned", reason=reason, measurement=None, samples_per_s=rate, wall_s=at_s * factor
                )
        self.clock += found.wall_s
        if found.measurement is None:
            return found
        measurement = msgspec.structs.replace(
            found.measurement,
            samples_per_s=found.measurement.samples_per_s / factor,
            eval_samples_per_s=found.measurement.eval_samples_per_s / factor,
            step_ms=found.measurement.step_ms * factor,
            warm_up_s=found.measurement.warm_up_s * factor,
            epoch_s=tuple(seconds * factor for seconds in found.measurement.epoch_s),
        )
        return msgspec.structs.replace(found, measurement=measurement, samples_per_s=measurement.samples_per_s)

    @functools.cached_property
    def space(self) -> GridSpace:
        """Its knobs, with the values that were recorded."""
        first = next(iter(self.by_strategy))
        found: dict[str, list[Any]] = {knob: [] for knob in first.__struct_fields__ if knob != "accumulation"}
        plain = baseline(first.global_batch)
        for strategy in (plain, *self.by_strategy):
            for knob, values in found.items():
                if getattr(strategy, knob) not in values:
                    values.append(getattr(strategy, knob))
        found["micro_batch"].sort()
        return GridSpace(
            global_batch=first.global_batch,
            values={knob: tuple(values) for knob, values in found.items()},
            left_out={},
            pairs=frozenset((strategy.attention, strategy.precision) for strategy in self.by_strategy),
            settings=frozenset(self.by_strategy),
        )


def job_of(strategy: Strategy) -> Job:
    """A setting, as ``run`` takes it."""
    nowhere = WorkloadRef(name="", folder="", source="")
    return Job(workload=nowhere, strategy=strategy, backend="", memory_limit_bytes=None, seed=0)
