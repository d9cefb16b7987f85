"""autotune study"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotune.cli.options import data_options, device_option, find_backend, json_option, prepare, probed
from autotune.errors import UsageError, nearest

if TYPE_CHECKING:
    from autotune.study.definition import Definition

DEFAULT = "memory"


@click.command("study")
@click.option("--study", "wanted", default=DEFAULT, show_default=True, metavar="NAME|FILE.toml", help="What to run.")
@click.option("--list", "lists", is_flag=True, help="List the studies that come with autotune.")
@click.option("--model", "name", metavar="NAME", help="As in autotune search. Default: the study's.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of each cell. Default: the study's.")
@click.option(
    "--batch-size", "batch_sizes", type=click.IntRange(min=1), multiple=True, help="Default: the study's. Repeatable."
)
@click.option("--only", multiple=True, metavar="TECHNIQUE,...", help="Only these. Repeatable.")
@click.option("--skip", multiple=True, metavar="TECHNIQUE,...", help="All but these. Repeatable.")
@click.option("--max-batch", is_flag=True, help="Find the largest batch of each technique besides.")
@data_options
@click.option("--output", type=click.Path(path_type=Path), help="The record. Default: runs/study-<name>-<model>.json.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the table as CSV.")
@click.option("--plots", type=click.Path(path_type=Path), help="Folder for PNG plots: five, six with windows.")
@click.option("--fresh", is_flag=True, help="Start anew, whatever is on record.")
@json_option
@device_option
@click.option("--seed", type=int, default=0, show_default=True)
def command(
    wanted: str,
    lists: bool,
    name: str | None,
    steps: int | None,
    batch_sizes: tuple[int, ...],
    only: tuple[str, ...],
    skip: tuple[str, ...],
    max_batch: bool,
    data: Path | None,
    limit: int | None,
    output: Path | None,
    csv_path: Path | None,
    plots: Path | None,
    fresh: bool,
    as_json: bool,
    device_name: str | None,
    seed: int,
) -> int:
    """Train a grid of techniques and batch sizes for the same steps, and compare memory, speed and quality."""
    import msgspec

    from autotune import store
    from autotune.files import save
    from autotune.report.live import StudyDisplay
    from autotune.report.study import study_csv, study_table
    from autotune.report.terminal import stdout
    from autotune.study.definition import read_definition, shipped
    from autotune.study.runner import StudyTask, run_study

    if lists:
        for study in shipped():
            found = read_definition(study)
            names = ", ".join(technique.name for technique in found.techniques)
            click.echo(f"{study}: {found.title} ({found.model}): {names}")
        return 0
    definition = _changed(read_definition(wanted), name, steps, batch_sizes)
    only, skip = _known(only, definition), _known(skip, definition)
    if plots is not None:
        from autotune.report.plots import check_installed

        check_installed()
        store.check_writable(plots / "plot.png", "--plots")
    backend = find_backend(device_name)
    device = backend.device()
    stem = store.file_stem(f"study-{definition.name}-{definition.model}")
    output = output or Path("runs") / f"{stem}.json"
    store.check_writable(output, "--output")
    if csv_path is not None:
        store.check_writable(csv_path, "--csv")
    with store.device_lock(device):
        ref, workload = prepare(definition.model, data, limit, is_measured=True)
        hardware = probed(backend)
        task = StudyTask(
            definition=definition, ref=ref, workload=workload, hardware=hardware, backend=backend, seed=seed
        )
        title = f"autotune study · {definition.title} · {definition.model} · {device.name}"
        with StudyDisplay(title, num_steps=definition.steps) as display:
            display.say(f"{title}: {workload.source}")
            results = run_study(task, output, display, only=only, skip=skip, finds_capacity=max_batch, is_fresh=fresh)
    if csv_path is not None:
        save(csv_path, study_csv(results).encode(), "table")
    if plots is not None:
        from autotune.report.plots import study_plots

        for path in study_plots(results, plots):
            click.echo(f"plot {path}", err=True)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(results), indent=2).decode())
    else:
        stdout().print(study_table(results))
        click.echo(f"Record: {output}. A page of it: autotune report {output}", err=True)
    return 0


def _known(wanted: tuple[str, ...], definition: Definition) -> tuple[str, ...]:
    """The techniques named, several in one with commas. Raises UsageError for what the study has not."""
    known = [technique.name for technique in definition.techniques]
    names = [name.strip() for names in wanted for name in ([names] if names in known else names.split(","))]
    for name in names:
        if name not in known:
            raise UsageError(f"the study has no technique {name!r}{nearest(name, known)}")
    return tuple(names)


def _changed(definition: Definition, name: str | None, steps: int | None, batch_sizes: tuple[int, ...]) -> Definition:
    if batch_sizes and not definition.batch_sizes:
        raise UsageError(f"the study {definition.name} names its own micro batches; --batch-size cannot change them")
    return dataclasses.replace(
        definition,
        model=name or definition.model,
        steps=steps or definition.steps,
        batch_sizes=tuple(dict.fromkeys(batch_sizes)) or definition.batch_sizes,
    )
