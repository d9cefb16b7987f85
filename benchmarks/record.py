"""Measures a whole grid of settings: python -m benchmarks.record [--model imdb] [--minutes 60] [--repeats 2 --top 40]

Every setting goes through the search's own trial runner, in random order, so that the device's drift falls on all knobs
alike; a fixed piece of work is timed beside each, as in a search. A trial that other work disturbed is measured again.
The table under benchmarks/grids is saved after every trial: the same command goes on where it was. With ``--repeats``
the fastest settings are measured so often, which tells the best from the lucky, and some drawn at random, which tell by
how much records of one setting differ: those of the fastest cannot, they were chosen by one of them.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterator

import click
import msgspec

from autotune import store, workloads
from autotune.backends.cpu import usable_cores
from autotune.cli.options import find_backend
from autotune.contention import QUIET_SHARE
from autotune.measurement import Trial
from autotune.pace import with_beats_around
from autotune.probe import probe
from autotune.report.terminal import trial_line
from autotune.search.settings import Settings
from autotune.search.task import Task
from autotune.strategy import Strategy
from autotune.trial.pulse import WORK, Pulse
from autotune.trial.runner import ordinary, run_trial
from autotune.trial.worker import Progress
from autotune.units import format_duration
from benchmarks.grid import FOLDER, PRODUCTS, Grid, Header, Record, products_of, read_grid, settings_of
from benchmarks.recorded import space_of
from benchmarks.truth import truth_of

SEED = 0
MAX_TRIES = 4
"""A machine that is never quiet is recorded as it is."""


@click.command()
@click.option("--model", default="imdb", show_default=True)
@click.option("--device", "device_name")
@click.option("--minutes", default=math.inf, help="Stop after so long. Default: when the grid is whole.")
@click.option("--repeats", default=1, show_default=True, help="So often, for those of --top and --drawn.")
@click.option("--top", default=40, show_default=True, help="So many of the fastest.")
@click.option("--drawn", default=10, show_default=True, help="So many drawn at random besides.")
def main(model: str, device_name: str | None, minutes: float, repeats: int, top: int, drawn: int) -> None:
    backend = find_backend(device_name)
    if (model, backend.name) not in PRODUCTS:
        known = ", ".join(f"{name} on {kind}" for name, kind in PRODUCTS)
        raise click.ClickException(
            f"no grid is laid out for {model} on {backend.name} (benchmarks/grid.py has {known})"
        )
    module = workloads.get(model)
    ref = module.prepare(None, limit=None, on_progress=print)
    workload = module.open_workload(ref)
    with store.device_lock(backend.device()):
        hardware = probe(backend, cache_dir=store.cache_dir() / "probe")
        task = Task(ref=ref, workload=workload, hardware=hardware, backend=backend, settings=Settings(seed=SEED))
        path = FOLDER / f"{store.file_stem(model)}-{store.folder_name(hardware.device)}.jsonl.xz"
        header = header_of(task)
        grid = read_grid(path) if path.is_file() else Grid(path, header, [])
        if what_of(grid.header) != what_of(header):
            raise click.ClickException(f"{path} was recorded with other data or versions; move it away to start anew")
        grid.header = msgspec.structs.replace(grid.header, tokens=header.tokens)
        settings = settings_of(task.space, products_of(model, backend.name, task.space))
        random.Random(SEED).shuffle(settings)
        settings.sort(key=lambda strategy: strategy != task.baseline)  # what every search begins with
        print(f"{path.name}: {len(settings)} settings, {len(grid.records)} trials so far", flush=True)
        end = time.monotonic() + 60 * minutes
        with Pulse(backend.name) as pulse:
            before_s = None if pulse.file() else pulse.beat()
            for strategy in wanted(settings, grid, repeats, top, drawn):
                if time.monotonic() >= end:
                    return
                for _ in range(MAX_TRIES):
                    trial, laps = measured(len(grid.records), task, strategy, pulse)
                    after_s = None if trial.has_beats else pulse.beat()
                    if trial.others_cores is None or trial.others_cores <= QUIET_SHARE * usable_cores():
                        break
                    print(f"others took {trial.others_cores:.2f} cores, again: {trial_line(trial)}", flush=True)
                    before_s = after_s
                    if time.monotonic() >= end:
                        return  # it would be on record as it is
                trial, before_s = with_beats_around(trial, before_s, after_s), after_s
                grid.add(Record(trial=trial, laps=laps))
                print(f"{trial_line(trial)}, {format_duration(trial.wall_s)}", flush=True)


def measured(
    number: int, task: Task, strategy: Strategy, pulse: Pulse
) -> tuple[Trial, tuple[tuple[float, float], ...]]:
    """A trial as the search runs it, without its losses, which say nothing of speed; and what it said at each lap."""
    start, laps = time.monotonic(), []

    def on_progress(progress: Progress) -> None:
        if progress.lap is not None:
            laps.append((round(time.monotonic() - start, 3), round(progress.samples_per_s, 3)))

    trial = run_trial(
        number,
        task.job(strategy),
        timeout_s=600,
        memory_limit_bytes=task.machine_limit_bytes,
        command=ordinary(pulse),
        pulse=pulse,
        on_progress=on_progress,
    )
    if trial.measurement is not None:
        trial = msgspec.structs.replace(trial, measurement=msgspec.structs.replace(trial.measurement, losses=()))
    return trial, tuple(laps)


def wanted(settings: list[Strategy], grid: Grid, repeats: int, top: int, drawn: int) -> Iterator[Strategy]:
    """What has not been measured yet, then the repeats of the fastest and of those drawn: once for all, then again."""
    done = Counter(record.trial.strategy for record in grid.records)
    yield from (strategy for strategy in settings if not done[strategy])
    if repeats < 2:
        return
    done = Counter(record.trial.strategy for record in grid.records)
    truth = truth_of(grid, space_of(grid).values).losses
    again = dict.fromkeys([*sorted(truth, key=truth.__getitem__)[:top], *settings[:drawn]])
    for number in range(1, repeats):
        yield from (strategy for strategy in again if done[strategy] <= number)


def what_of(header: Header) -> tuple[object, ...]:
    """What must be the same for all records of a grid."""
    return header.source, header.planned, header.pulse, header.hardware.device.versions


def header_of(task: Task) -> Header:
    """What is recorded, and where."""
    return Header(
        model=task.ref.name,
        source=task.ref.source,
        hardware=task.hardware,
        planned=task.planned,
        seed=task.settings.seed,
        pulse=WORK,
        tokens={
            padding: {size: round(task.tokens(padding, size), 2) for size in task.space.values["micro_batch"]}
            for padding in task.space.values["padding"]
        },
    )


if __name__ == "__main__":
    main()
