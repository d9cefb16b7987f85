"""Search methods on a recorded grid, without its hardware: python -m benchmarks.replay [GRID.jsonl.xz] [--seeds 100]

A trial costs the seconds that it took when it was recorded. Its figures are drawn by the seed around the setting's true
ones, as far as records of one setting differ; what is true is smoothed from all records (benchmarks/truth.py). Every
method is judged by the true loss of what it holds for the best at any time; ours, too, by its trials alone, without the
race that it ends with.
Rivals learn at no cost what was measured before, and that what was not recorded is the slowest; they measure whole
trials, where ours gives up what is far behind, and starts from the expert's guess (``helped`` ones do both). Ours and
``one knob at a time`` pay for the plain baseline. What our surrogate expects of knobs is rounded from what fits the
grids that are recorded.

Then the same search under a memory budget that half of the settings stay below: how often it runs out of memory where
it could have known, beyond the first two trials that differ in their micro batch alone.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import functools
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
import numpy as np
import optuna
from rich.table import Table

from autotune.report.terminal import describe, stdout
from autotune.search.settings import Settings
from autotune.search.task import LONG_RUN_SHARE
from autotune.strategy import Strategy
from autotune.units import format_bytes
from benchmarks.grid import FOLDER, Grid, read_grid
from benchmarks.methods import FEWER_SEEDS, METHODS, search_on
from benchmarks.recorded import Recorded, space_of
from benchmarks.truth import Truth, truth_of

BUDGET = 0.15
"""Of the grid's total cost, what every method may spend."""
WITHIN = (0.05, 0.02, 0.01)
AT = (0.05, 0.10)
MIN_SETTINGS = 20
"""Fewer are no grid to search."""


def replayed(path: Path, name: str, seed: int) -> list[tuple[float, float]]:
    """Share of the grid's cost and true regret, whenever what is held for the best changes."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorded = _recorded(path, seed)
    held = METHODS[name](recorded, seed, BUDGET * recorded.total_s)
    truth = {one.strategy: recorded.truth.get(one.strategy, math.inf) for one in held}
    return [(one.since_s / recorded.total_s, truth[one.strategy] / recorded.best - 1) for one in held]


class Budgeted(NamedTuple):
    """A search under a memory budget."""

    regret: float
    """Against the best that stays below."""
    num_trials: int
    num_oom: int
    num_avoidable: int
    """Of those, beyond the first two trials of their kind."""


def budgeted(path: Path, budget_bytes: int, seed: int) -> Budgeted:
    """One search, a tenth of the grid's cost long."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorded = _recorded(path, seed)
    settings = Settings(budget_s=AT[-1] * recorded.total_s, memory_budget_bytes=budget_bytes, seed=seed)
    held, trials = search_on(recorded, settings)
    limit_bytes = LONG_RUN_SHARE * budget_bytes
    best = min(loss for strategy, loss in recorded.truth.items() if recorded.peak_bytes(strategy) <= limit_bytes)
    kinds: Counter[Strategy] = Counter()
    num_avoidable = 0
    for trial in trials:
        kind = msgspec.structs.replace(trial.strategy, micro_batch=1, accumulation=1)
        kinds[kind] += 1
        num_avoidable += trial.outcome == "oom" and kinds[kind] > 2
    return Budgeted(
        regret=recorded.truth[held[-1].strategy] / best - 1 if held else math.inf,
        num_trials=len(trials),
        num_oom=sum(trial.outcome == "oom" for trial in trials),
        num_avoidable=num_avoidable,
    )


def _recorded(path: Path, seed: int = 0) -> Recorded:
    return Recorded(_grid(path), seed, _truth(path))


@functools.cache
def _grid(path: Path) -> Grid:
    return read_grid(path)


@functools.cache
def _truth(path: Path) -> Truth:
    grid = _grid(path)
    return truth_of(grid, space_of(grid).values)


def regret_at(held: Sequence[tuple[float, float]], share: float) -> float:
    """After so much of the grid's cost; infinite where nothing was measured yet."""
    index = bisect.bisect_right([since for since, _ in held], share) - 1
    return held[index][1] if index >= 0 else math.inf


def cost_to_come_within(held: Sequence[tuple[float, float]], regret: float) -> float:
    """Share of the grid's cost after which the method first holds something within a regret; infinite where it never
    does."""
    return next((since for since, found in held if found <= regret), math.inf)


def cost_to_stay_within(held: Sequence[tuple[float, float]], regret: float) -> float:
    """Share of the grid's cost after which the method stays within a regret; infinite where it does not. A lucky record
    may take it away from what it held."""
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
    names = [name.strip() for name in methods.split(",")]
    if unknown := set(names) - METHODS.keys():
        raise click.BadParameter(f"no method is named {', '.join(sorted(unknown))}; there are: {', '.join(METHODS)}")
    paths = [path] if path else sorted(FOLDER.glob("*.jsonl.xz"))
    for path in paths:
        show(path, seeds, [name for name in METHODS if name in names], processes)


def show(path: Path, seeds: int, methods: Sequence[str], processes: int) -> None:
    """A table of all methods on one grid."""
    grid, console = _grid(path), stdout()
    device = grid.header.hardware.device
    console.print(f"{path.name}: {device.name}, torch {device.versions['torch']}")
    num_ran = len({record.trial.strategy for record in grid.records if record.trial.measurement})
    if num_ran < MIN_SETTINGS:
        console.print(f"{num_ran} settings ran, {MIN_SETTINGS} are wanted: go on with benchmarks.record")
        return
    recorded = _recorded(path)
    best = min(recorded.truth, key=recorded.truth.__getitem__)
    console.print(
        f"{len(recorded.by_strategy)} settings, {len(recorded.grid.records)} trials, {recorded.total_s / 60:.0f} min; "
        f"records of one setting differ by {recorded.deviation:.1%} (standard deviation), the truth is known to "
        f"{recorded.doubt:.1%}; best: {describe(best)}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("method", no_wrap=True)
    for regret in WITHIN:
        table.add_column(f"within {regret:.0%}", justify="right")
    table.add_column("for good", justify="right")
    for share in AT:
        table.add_column(f"regret at {share:.0%}", justify="right")
        table.add_column("95th", justify="right")
    half_bytes = statistics.median(map(recorded.peak_bytes, recorded.truth))
    budget_bytes = int(half_bytes / LONG_RUN_SHARE)
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        searches = [pool.submit(budgeted, path, budget_bytes, seed) for seed in range(seeds)]
        futures = {
            name: [pool.submit(replayed, path, name, seed) for seed in range(FEWER_SEEDS.get(name, seeds))]
            for name in methods
        }
        for name, found in futures.items():
            runs = [future.result() for future in found]
            click.echo(f"{name}: {len(runs)} seeds done", err=True)
            table.add_row(name if len(runs) == seeds else f"{name} ({len(runs)} seeds)", *_row(runs))
        under = [search.result() for search in searches]
    console.print(table)
    console.print(
        "Medians over seeds, of the grid's total cost: until a method first holds something so close to the best, and "
        f"until it stays within {WITHIN[-1]:.0%}; 95th: of the seeds' regrets.",
        style="bright_black",
    )
    num_trials, num_oom, num_avoidable = (sum(one[place] for one in under) for place in (1, 2, 3))
    console.print(
        f"autotune below {format_bytes(int(half_bytes))}, as half of the settings are, {AT[-1]:.0%} of the cost: "
        f"{num_trials} trials in {seeds} searches, {num_oom} out of memory, {num_avoidable} of them after the first "
        f"two of their kind; regret {statistics.median(one.regret for one in under):.2%} against the best that fits"
    )


def _row(runs: Sequence[Sequence[tuple[float, float]]]) -> Iterator[str]:
    costs = [statistics.median(cost_to_come_within(held, regret) for held in runs) for regret in WITHIN]
    costs.append(statistics.median(cost_to_stay_within(held, WITHIN[-1]) for held in runs))
    for cost in costs:
        yield f"{cost:.2%}" if math.isfinite(cost) else "never"
    for share in AT:
        regrets = [regret_at(held, share) for held in runs]
        yield f"{statistics.median(regrets):.2%}"
        yield f"{np.quantile(regrets, 0.95, method='higher'):.2%}"


if __name__ == "__main__":
    main()
