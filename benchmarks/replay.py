"""Search methods on a recorded grid, without its hardware: python -m benchmarks.replay [GRID.jsonl.xz] [--seeds 100]

A trial costs the seconds that it took when it was recorded. Its figures are those of one of the setting's records,
drawn by the seed; where there is but one, moved by as much as records of one setting differ from each other. Every
method is judged by the true loss (the mean of a setting's records) of what it holds for the best at any time. Rivals
learn what was measured before at no cost, and what cannot run; they measure whole trials, where ours gives up what is
far behind, and starts from the expert's guess. Ours and ``one knob at a time`` pay for the plain baseline. What our
surrogate expects of knobs was set by hand after searches on the CPU whose grid this is.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import functools
import itertools
import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import numpy as np
import optuna
from rich.table import Table

from autotune import backends
from autotune.measurement import Trial
from autotune.report.terminal import describe, stdout
from autotune.search.journal import Journal
from autotune.search.objective import PlannedRun, slowdown
from autotune.search.settings import Settings
from autotune.search.space import Space, expert_guess
from autotune.search.task import Task
from autotune.search.trials import Trials
from autotune.strategy import Strategy, baseline
from autotune.trial.worker import Job, Progress
from autotune.workloads.base import WorkloadRef
from benchmarks.grid import FOLDER, Grid, Record, read_grid

BUDGET = 0.25
"""Of the grid's total cost, what every method may spend."""
WITHIN = (0.05, 0.02, 0.01)
AT = (0.05, 0.10)
MAX_ASKED = 3000
"""A sampler that has repeated itself so often is left alone."""


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
        self.truth = {
            strategy: math.exp(statistics.mean(math.log(self.loss(record)) for record in records))
            for strategy, records in self.by_strategy.items()
            if all(record.trial.measurement for record in records)
        }
        self.best = min(self.truth.values())
        self.total_s = sum(records[0].trial.wall_s for records in self.by_strategy.values())
        logs = [
            [math.log(self.loss(record)) for record in records]
            for s, records in self.by_strategy.items()
            if s in self.truth
        ]
        spread = [statistics.variance(found) for found in logs if len(found) > 1]
        self.deviation = math.sqrt(statistics.mean(spread)) if spread else 0.03

    def loss(self, record: Record) -> float:
        """Seconds of the planned run, at the speed that the device usually had."""
        assert record.trial.measurement is not None
        planned: PlannedRun = self.grid.header.planned
        return planned.projected_s(record.trial.measurement) / slowdown(record.trial.pulse_s, self.usual_pulse_s)

    def drawn(self, strategy: Strategy) -> tuple[Record, float]:
        """A record of the setting, and the factor that its seconds are moved by. The same for one seed."""
        generator = random.Random(f"{self.seed} {strategy}")
        records = self.by_strategy[strategy]
        record = generator.choice(records)
        factor = 1 / slowdown(record.trial.pulse_s, self.usual_pulse_s)
        return record, factor * (math.exp(generator.gauss(0, self.deviation)) if len(records) == 1 else 1.0)

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
            self.clock += record.laps[0][0] * factor
            return msgspec.structs.replace(found, outcome="oom", reason="over the limit", measurement=None)
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


class Replayed(Task):
    """A search's task on a grid."""

    space: Any = None
    planned: Any = None

    @property
    def baseline(self) -> Strategy:
        """The plain one."""
        return baseline(self.space.global_batch)


class _Silent:
    """Notes what the search holds for the best after each trial."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded
        self.held: list[Held] = []

    def on_trial_end(self, trial: Trial, best: Trial | None) -> None:
        if best is not None:
            self.held.append(Held(self._recorded.clock, best.strategy))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class _NoPulse:
    def beat(self) -> None: ...

    def close(self) -> None: ...


class Held(NamedTuple):
    """What a method holds for the best from some time on."""

    since_s: float
    strategy: Strategy


def ours(recorded: Recorded, seed: int, budget_s: float, memory_budget_bytes: int | None = None) -> list[Held]:
    """The search's own trials."""
    return searched(recorded, seed, budget_s, memory_budget_bytes)[0]


def searched(
    recorded: Recorded, seed: int, budget_s: float, memory_budget_bytes: int | None = None
) -> tuple[list[Held], list[Trial]]:
    """What the search held for the best when, and its trials."""
    header, backend = recorded.grid.header, backends.get(recorded.grid.header.hardware.device.kind)
    settings = Settings(budget_s=budget_s, seed=seed, memory_budget_bytes=memory_budget_bytes)
    ref = WorkloadRef(name=header.model, folder="", source=header.source)
    task = Replayed(ref=ref, workload=None, hardware=header.hardware, backend=backend, settings=settings)  # type: ignore[arg-type]
    object.__setattr__(task, "space", recorded.space)
    object.__setattr__(task, "planned", header.planned)
    observer = _Silent(recorded)
    journal = Journal(optuna.create_study())
    trials = Trials(task, observer, journal, _NoPulse(), run=recorded.run, clock=lambda: recorded.clock)  # type: ignore[arg-type]
    trials.run(reserved_s=lambda: 0.0)
    return observer.held, trials.all


class _Rival:
    """Measures whole trials, remembers them, and holds the fastest."""

    def __init__(self, recorded: Recorded, budget_s: float) -> None:
        self._recorded, self._budget_s = recorded, budget_s
        self.losses: dict[Strategy, float] = {}
        self.held: list[Held] = []

    @property
    def is_over(self) -> bool:
        return self._recorded.clock >= self._budget_s or len(self.losses) == len(self._recorded.by_strategy)

    def loss(self, strategy: Strategy) -> float:
        """Seconds of the planned run; infinite where it did not run."""
        if strategy not in self.losses:
            trial = self._recorded.run(0, job_of(strategy), memory_limit_bytes=2**60)
            planned: PlannedRun = self._recorded.grid.header.planned
            self.losses[strategy] = planned.projected_s(trial.measurement) if trial.measurement else math.inf
            best = min(self.losses, key=self.losses.__getitem__)
            if math.isfinite(self.losses[best]) and (not self.held or best != self.held[-1].strategy):
                self.held.append(Held(self._recorded.clock, best))
        return self.losses[strategy]


def _in_order(strategies: Callable[[Recorded, int], Sequence[Strategy]]) -> Callable[..., list[Held]]:
    def method(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
        rival = _Rival(recorded, budget_s)
        for strategy in strategies(recorded, seed):
            if rival.is_over:
                break
            rival.loss(strategy)
        return rival.held

    return method


def _shuffled(recorded: Recorded, seed: int) -> list[Strategy]:
    strategies = list(recorded.by_strategy)
    random.Random(seed).shuffle(strategies)
    return strategies


def _grid_order(recorded: Recorded, _: int) -> list[Strategy]:
    everything = itertools.product(*recorded.space.values.values())
    named = (recorded.space.strategy(dict(zip(recorded.space.values, chosen, strict=True))) for chosen in everything)
    return [strategy for strategy in named if recorded.space.refusal(strategy) is None]


def _optuna(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Callable[..., list[Held]]:
    def method(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
        rival, space = _Rival(recorded, budget_s), recorded.space
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(sampler=sampler(seed))
        knobs = {knob: values for knob, values in space.values.items() if len(values) > 1}
        plain = {knob: values[0] for knob, values in space.values.items()}
        for _ in range(MAX_ASKED):
            if rival.is_over:
                break
            trial = study.ask()
            chosen = {knob: trial.suggest_categorical(knob, values) for knob, values in knobs.items()}
            strategy = space.strategy({**plain, **chosen})
            if space.refusal(strategy) is not None or not math.isfinite(rival.loss(strategy)):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, rival.loss(strategy))
        return rival.held

    return method


def one_knob_at_a_time(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
    """From the plain baseline: all values of a knob, keep the best, the next knob; again until nothing gets better."""
    rival, space = _Rival(recorded, budget_s), recorded.space
    here = baseline(space.global_batch)
    rival.loss(here)
    knobs = [knob for knob, values in space.values.items() if len(values) > 1]
    random.Random(seed).shuffle(knobs)
    while not rival.is_over:
        before = here
        for knob in knobs:
            for value in space.values[knob]:
                near = space.strategy({**space.params(here), knob: value})
                if space.refusal(near) is None and not rival.is_over:
                    rival.loss(near)
            here = rival.held[-1].strategy if rival.held else here
        if here == before:
            break
    return rival.held


def guess_then_batch_size(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
    """What people do with a batch-size finder: write down what should be fast, then have the micro batch doubled while
    it fits. The fastest of those, not the largest, is held."""
    rival, space = _Rival(recorded, budget_s), recorded.space
    guess = expert_guess(space, recorded.grid.header.hardware, backends.get(recorded.grid.header.hardware.device.kind))
    if space.refusal(guess) is None:
        rival.loss(guess)
    for micro_batch in space.values["micro_batch"]:
        strategy = space.strategy({**space.params(guess), "micro_batch": micro_batch})
        if space.refusal(strategy) is None and (rival.is_over or not math.isfinite(rival.loss(strategy))):
            break
    return rival.held


METHODS: dict[str, Callable[..., list[Held]]] = {
    "autotune": ours,
    "Optuna TPE": _optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "Optuna TPE multivariate group": _optuna(
        lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
    ),
    "Optuna GP": _optuna(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "random": _in_order(_shuffled),
    "grid order": _in_order(_grid_order),
    "one knob at a time": one_knob_at_a_time,
    "guess then batch size": guess_then_batch_size,
}
FEWER_SEEDS = {"Optuna GP": 10}
"""Methods whose own computation takes too long for all seeds."""


def replayed(path: Path, name: str, seed: int) -> list[tuple[float, float]]:
    """Share of the grid's cost and true regret, whenever what is held for the best changes."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorded = Recorded(_grid(path), seed)
    held = METHODS[name](recorded, seed, BUDGET * recorded.total_s)
    truth = {one.strategy: recorded.truth.get(one.strategy, math.inf) for one in held}
    return [(one.since_s / recorded.total_s, truth[one.strategy] / recorded.best - 1) for one in held]


@functools.cache
def _grid(path: Path) -> Grid:
    return read_grid(path)


def regret_at(held: Sequence[tuple[float, float]], share: float) -> float:
    """After so much of the grid's cost; infinite where nothing was measured yet."""
    index = bisect.bisect_right([since for since, _ in held], share) - 1
    return held[index][1] if index >= 0 else math.inf


def cost_within(held: Sequence[tuple[float, float]], regret: float) -> float:
    """Share of the grid's cost after which the method stays within a regret; infinite where it does not."""
    cost = math.inf
    for since, found in reversed(held):
        if found > regret:
            break
        cost = since
    return cost


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--seeds", default=100, show_default=True)
@click.option("--methods", default=",".join(METHODS), help="Names, with commas. Default: all.")
@click.option("--processes", default=2, show_default=True)
def main(path: Path | None, seeds: int, methods: str, processes: int) -> None:
    paths = [path] if path else sorted(FOLDER.glob("*.jsonl.xz"))
    for path in paths:
        show(path, seeds, [name for name in METHODS if name in methods.split(",")], processes)


def show(path: Path, seeds: int, methods: Sequence[str], processes: int) -> None:
    """A table of all methods on one grid."""
    recorded = Recorded(_grid(path))
    hardware, best = recorded.grid.header.hardware, min(recorded.truth, key=recorded.truth.__getitem__)
    console = stdout()
    console.print(f"{path.name}: {hardware.device.name}, torch {hardware.device.versions['torch']}")
    console.print(
        f"{len(recorded.by_strategy)} settings, {len(recorded.grid.records)} trials, {recorded.total_s / 60:.0f} min; "
        f"records of one setting differ by {recorded.deviation:.1%} (standard deviation); best: {describe(best)}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("method", no_wrap=True)
    for regret in WITHIN:
        table.add_column(f"within {regret:.0%}", justify="right")
    for share in AT:
        table.add_column(f"regret at {share:.0%}", justify="right")
        table.add_column("95th", justify="right")
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        futures = {
            name: [pool.submit(replayed, path, name, seed) for seed in range(FEWER_SEEDS.get(name, seeds))]
            for name in methods
        }
        for name, found in futures.items():
            runs = [future.result() for future in found]
            table.add_row(name if len(runs) == seeds else f"{name} ({len(runs)} seeds)", *_row(runs))
    console.print(table)
    console.print("Medians over seeds, of the grid's total cost; 95th: of the seeds' regrets.", style="bright_black")


def _row(runs: Sequence[Sequence[tuple[float, float]]]) -> Iterator[str]:
    for regret in WITHIN:
        cost = statistics.median(cost_within(held, regret) for held in runs)
        yield f"{cost:.2%}" if math.isfinite(cost) else "never"
    for share in AT:
        regrets = [regret_at(held, share) for held in runs]
        yield f"{statistics.median(regrets):.2%}"
        yield f"{np.quantile(regrets, 0.95, method='higher'):.2%}"


if __name__ == "__main__":
    main()
