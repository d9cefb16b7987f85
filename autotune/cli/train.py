"""autotune train"""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotune.cli.options import data_options, device_option, find_backend, model_option, prepare, profiles_option
from autotune.errors import AutotuneError, UsageError

if TYPE_CHECKING:
    from autotune.profile import Profile
    from autotune.strategy import Strategy


@click.command("train")
@model_option
@click.option(
    "--profile",
    "profile_name",
    metavar="PATH|none",
    help="A profile's file, or none for the plain baseline. Default: this device's profile.",
)
@click.option(
    "--pick",
    metavar="NAME|memory<SIZE",
    help="Of a profile with several choices (search --objective pareto): fastest, balanced, leanest, or the fastest "
    "below a size.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the recipe's.")
@data_options
@click.option("--metrics", type=click.Path(path_type=Path), help="Default: runs/<workload>-<time>/metrics.json.")
@device_option
@profiles_option
@click.option("--seed", type=int, default=0, show_default=True)
def command(
    name: str,
    profile_name: str | None,
    pick: str | None,
    epochs: int | None,
    data: Path | None,
    limit: int | None,
    metrics: Path | None,
    device_name: str | None,
    profiles: Path | None,
    seed: int,
) -> int:
    """Train a workload with this device's profile: the same step that the search measured."""
    from autotune import store, workloads
    from autotune.api import safe_defaults
    from autotune.apply import apply
    from autotune.report.live import TrainDisplay
    from autotune.report.terminal import describe, epoch_table, stdout
    from autotune.training import Training, write_metrics
    from autotune.units import format_bytes, format_duration

    recipe, wanted = workloads.get(name).RECIPE, workloads.wanted(name)
    label = wanted.label
    backend = find_backend(device_name)
    device = backend.device()
    profile, path = None, None
    if pick is not None and profile_name == "none":
        raise UsageError("--pick chooses from a profile, and --profile none takes none")
    if profile_name is not None and profile_name != "none":
        path = Path(profile_name)
        profile = store.read_for(path, device, wanted)
    else:
        found = None
        # without a profile's settings its projection is a courtesy, and a broken one no obstacle
        with contextlib.suppress(*([AutotuneError] if profile_name == "none" else [])):
            found = store.find_profile(device, wanted, profiles)
        if found is not None:
            profile, path = found
        elif pick is not None:
            raise UsageError(
                f"--pick chooses from a profile; make one: autotune search --model {name} --objective pareto"
            )
        elif profile_name is None:
            click.echo(f"No profile for {name} on this device, safe defaults are used; make one: ", err=True, nl=False)
            click.echo(f"autotune search --model {name}", err=True)
    if pick is not None and profile is not None:
        profile = profile.pick(pick)
    if metrics is None:
        metrics = Path("runs") / f"{store.file_stem(label)}-{datetime.datetime.now():%Y%m%d-%H%M%S}" / "metrics.json"
    store.check_writable(metrics, "--metrics")

    _, workload = prepare(name, data, limit)
    if profile_name == "none":
        strategy = workload.baseline
    else:
        strategy = safe_defaults(name) if profile is None else profile.strategy
    num_epochs = epochs or recipe.epochs
    projected_s = _projected_s(profile, strategy, workload.num_train, workload.num_test, num_epochs)
    steps_per_epoch = -(-workload.num_train // recipe.global_batch)
    backend.start_memory_window()
    run = apply(strategy, workload, backend, total_steps=num_epochs * steps_per_epoch, seed=seed)
    training = Training(run)
    profile_words = None if profile_name == "none" or path is None else str(path)

    def record() -> None:
        write_metrics(training.metrics(profile=profile_words, projected_s=projected_s, seed=seed), metrics)

    title = f"autotune train · {label} · {describe(strategy)} · {workload.source}"
    was_interrupted = False
    with TrainDisplay(title, num_steps=steps_per_epoch, num_epochs=num_epochs) as display:
        display.say(title)

        def on_epoch(epoch: object) -> None:
            display.on_epoch(training.epochs[-1])
            record()

        try:
            training.train(num_epochs, on_step=display.on_step, on_evaluation=display.on_evaluation, on_epoch=on_epoch)
        except KeyboardInterrupt:
            was_interrupted = True
    record()
    console = stdout()
    console.print(f"{label}: {describe(strategy)}", style="bold", markup=False)
    console.print(f"profile {profile_words or 'none'}", markup=False, soft_wrap=True)
    if training.epochs:
        console.print(epoch_table(training.epochs))
    projection = f", projected {format_duration(projected_s)}" if projected_s else ""
    peak = f"peak memory {format_bytes(backend.peak_memory_bytes())}"
    console.print(
        f"{format_duration(training.wall_s)}{projection}; {peak}; metrics in {metrics}", markup=False, soft_wrap=True
    )
    if was_interrupted:
        click.echo(f"interrupted in epoch {len(training.epochs) + 1} of {num_epochs}", err=True)
    return 130 if was_interrupted else 0


def _projected_s(
    profile: Profile | None, strategy: Strategy, num_train: int, num_test: int, epochs: int
) -> float | None:
    """What the profile's search projects for a run of this length with this strategy, where it measured it."""
    if profile is None:
        return None
    evidence = profile.evidence
    for known, figures in ((profile.strategy, evidence.best), (evidence.baseline_strategy, evidence.baseline)):
        if known == strategy:
            return figures.run_s(num_train=num_train, num_test=num_test, epochs=epochs)
    return None
