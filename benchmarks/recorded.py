"""A recorded grid as a device to search on: trials cost what they took when they were recorded.

What a setting truly takes is what all records say together (benchmarks/truth.py). A trial of it draws anew around
that, as far as repeats say that records differ.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from autotune.measurement import Trial
from autotune.pace import slowdown
from autotune.search.space import Space
from autotune.strategy import Strategy, baseline
from autotune.trial.worker import Command, Job, Progress
from autotune.workloads.base import WorkloadRef
from benchmarks.grid import Grid, Record
from benchmarks.truth import Truth, at_one_speed, truth_of


class GridSpace(Space, frozen=True, kw_only=True):
    """The settings of a grid, and no others."""

    settings: frozenset[Strategy]

    def refusal(self, strategy: Strategy) -> str | None:
        """Whatever was not recorded."""
        return None if strategy in self.settings else "not recorded"


class Recorded:
    """A grid as a device to search on: ``clock`` is what has been spent."""

    def __init__(self, grid: Grid, seed: int = 0, truth: Truth | None = None) -> None:
        """``truth`` is the grid's, where it is known already."""
        self.grid, self.seed = grid, seed
        self.by_strategy: dict[Strategy, list[Record]] = {}
        for record in grid.records:
            self.by_strategy.setdefault(record.trial.strategy, []).append(record)
        self.clock = 0.0
        self.total_s = sum(records[0].trial.wall_s for records in self.by_strategy.values())
        found = truth or truth_of(grid, self.space.values)
        self.truth, self.doubt, self.deviation, self.usual_pulse_s = found
        self.best = min(self.truth.values())
        self._num_drawn: Counter[Strategy] = Counter()

    def loss(self, record: Record) -> float:
        """Seconds of the planned run, at the speed that the device usually had."""
        return at_one_speed(record, self.grid.header.planned, self.usual_pulse_s)

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
        command: Command | None = None,
        hopeless: Callable[[Progress], str | None] = lambda _: None,
        **_: Any,
    ) -> Trial:
        """Stands in for ``run_trial``. A ``command`` may end before all laps that were recorded."""
        record, factor = self.drawn(job.strategy)
        if command is not None:
            record = shortened(record, command)
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
        """The grid's."""
        return space_of(self.grid)


def shortened(record: Record, command: Command) -> Record:
    """A record as it were with no more laps than the command times. The first is warm-up."""
    measured = record.trial.measurement
    ends_s = [at_s for at_s, _ in record.laps]
    for place in range(command.least_laps, len(ends_s) - 1):
        if measured is None or ends_s[place] - ends_s[0] < command.enough_s:
            continue
        rate, saved_s = record.laps[place][1], ends_s[-1] - ends_s[place]
        slower = measured.samples_per_s / rate
        found = msgspec.structs.replace(
            measured, samples_per_s=rate, step_ms=slower * measured.step_ms, epoch_s=measured.epoch_s[:place]
        )
        trial = msgspec.structs.replace(
            record.trial, measurement=found, samples_per_s=rate, wall_s=record.trial.wall_s - saved_s
        )
        return Record(trial=trial, laps=record.laps[: place + 1])
    return record


def space_of(grid: Grid) -> GridSpace:
    """A grid's knobs, with the values that were recorded."""
    settings = dict.fromkeys(record.trial.strategy for record in grid.records)
    first = next(iter(settings))
    found: dict[str, list[Any]] = {knob: [] for knob in first.__struct_fields__ if knob != "accumulation"}
    for strategy in (baseline(first.global_batch), *settings):
        for knob, values in found.items():
            if getattr(strategy, knob) not in values:
                values.append(getattr(strategy, knob))
    found["micro_batch"].sort()
    return GridSpace(
        global_batch=first.global_batch,
        values={knob: tuple(values) for knob, values in found.items()},
        left_out={},
        pairs=frozenset((strategy.attention, strategy.precision) for strategy in settings),
        settings=frozenset(settings),
    )


def job_of(strategy: Strategy) -> Job:
    """A setting, as ``run`` takes it."""
    nowhere = WorkloadRef(name="", folder="", source="")
    return Job(workload=nowhere, strategy=strategy, backend="", memory_limit_bytes=None, seed=0)
