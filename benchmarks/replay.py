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
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import optuna
from rich.table import Table

from autotune.report.terminal import describe, stdout
from benchmarks.grid import FOLDER, Grid, read_grid
from benchmarks.methods import FEWER_SEEDS, METHODS
from benchmarks.recorded import Recorded

BUDGET = 0.25
"""Of the grid's total cost, what every method may spend."""
WITHIN = (0.05, 0.02, 0.01)
AT = (0.05, 0.10)


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
