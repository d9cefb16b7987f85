"""autotune train"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotune.cli.changes import changed_recipe, changed_strategy, refuse_idle, trained_otherwise
from autotune.cli.options import data_options, device_option, find_backend, model_option, prepare, profiles_option
from autotune.errors import AutotuneError, UsageError, is_of_the_system, line_of, words_of

if TYPE_CHECKING:
    from autotune.backends.base import Device
    from autotune.profile import Profile
    from autotune.store import Wanted
    from autotune.strategy import Strategy
    from autotune.training import Training
    from autotune.workloads.base import Workload

RUNS = Path("runs")


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
@click.option(
    "--recipe",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change the recipe: learning_rate, least_rate (what it falls to), weight_decay, warmup_steps, clip_norm (a "
    "number or none), label_smoothing, schedule (cosine, linear, restarts, onecycle, constant). May be repeated.",
)
@click.option(
    "--knob",
    "knobs",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a knob by hand, as in precision=bf16, attention=sdpa_flash or micro_batch=8; all else as in the profile. "
    "May be repeated.",
)
@data_options
@click.option("--metrics", type=click.Path(path_type=Path), help="Default: metrics.json in the run's folder.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="The run's folder, for metrics and checkpoints. Default: runs/<workload>-<time>.",
)
@click.option(
    "--resume",
    "resume",
    metavar="[FOLDER]",
    is_flag=False,
    flag_value="",
    help="Go on with a run: its folder, or nothing for the one of this workload that was saved last. Its profile, "
    "recipe, data, seed and epochs hold.",
)
@click.option(
    "--checkpoint-every",
    "checkpoint_s",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Besides at every epoch's end, and on Ctrl-C.",
)
@click.option("--patience", type=click.IntRange(min=1), help="End after so many epochs without a lower test loss.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's logs into the run's folder.")
@click.option("--deterministic", is_flag=True, help="Only algorithms that give the same result every time.")
@device_option
@profiles_option
@click.option("--seed", type=int, help="Default: 0.")
def command(
    name: str,
    profile_name: str | None,
    pick: str | None,
    epochs: int | None,
    changes: tuple[str, ...],
    knobs: tuple[str, ...],
    data: Path | None,
    limit: int | None,
    metrics: Path | None,
    folder: Path | None,
    resume: str | None,
    checkpoint_s: float,
    patience: int | None,
    tensorboard: bool,
    deterministic: bool,
    device_name: str | None,
    profiles: Path | None,
    seed: int | None,
) -> int:
    """Train a workload with this device's profile: the same step that the search measured."""
    import msgspec

    from autotune import checkpoint, store, workloads
    from autotune.apply import apply
    from autotune.data.loader import with_lengths
    from autotune.report.live import StageDisplay, TrainDisplay
    from autotune.report.tensorboard import tensorboard_log
    from autotune.report.terminal import count_words, describe, epoch_table, stdout
    from autotune.strategy import Strategy
    from autotune.training import METRICS_FILE, Training, write_metrics
    from autotune.units import format_bytes, format_duration
    from autotune.workloads.custom import ONE_BATCH

    wanted = workloads.wanted(name)
    label = wanted.label
    recipe = changed_recipe(workloads.get(name).RECIPE, changes)
    backend = find_backend(device_name)
    saved = told = state = None
    if resume is not None:
        if profile_name is not None or pick is not None or knobs:
            raise UsageError("--resume goes on with the run's own setting; leave --profile, --pick and --knob out")
        path = Path(resume) if resume else checkpoint.newest_checkpoint(RUNS, label)
        saved, told, state = checkpoint.read_checkpoint(path)
        folder = folder or (path if path.is_dir() else path.parent)
        seed, recipe = saved.seed if seed is None else seed, changed_recipe(saved.recipe, changes)
        data, limit = data or (Path(told.data) if told.data else None), limit or told.limit
        profile, profile_words = _resumed_profile(told.profile), told.profile
    else:
        profile, profile_path = _profile(backend.device(), wanted, profile_name, pick, profiles)
        profile_words = None if profile_name == "none" or profile_path is None else str(profile_path)
    seed = seed or 0
    if folder is None:
        folder = RUNS / f"{store.file_stem(label)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if saved is None and (folder / checkpoint.CHECKPOINT_FILE).exists():
        raise UsageError(f"{folder} has a run's checkpoint already; go on with it (--resume {folder}), or move it")
    changed_strategy(Strategy(micro_batch=recipe.global_batch), knobs)  # what is mistyped is told before data are read
    ref, workload = prepare(name, data, limit)
    metrics = metrics or folder / METRICS_FILE
    workload = workload.with_recipe(recipe)
    strategy = saved.strategy if saved is not None else _strategy(name, profile_name, profile, workload.baseline)
    strategy = changed_strategy(strategy, knobs)
    refuse_idle(strategy, knobs, workload)
    if knobs:
        for words in trained_otherwise(strategy, workload):
            click.echo(words, err=True)
    if workload.loop == "own":
        click.echo(f"{ONE_BATCH} A DataLoader of a dataset's own samples is trained on as it is.", err=True)
    strategy = msgspec.structs.replace(strategy, deterministic=strategy.deterministic or deterministic)
    num_epochs = epochs or (saved.epochs if saved is not None else recipe.epochs)
    identity = checkpoint.Identity(
        workload=workload.name,
        num_parameters=workload.num_parameters,
        source=workload.source,
        content=Path(ref.folder).name,
        num_train=workload.num_train,
        recipe=recipe,
        epochs=num_epochs,
        strategy=strategy,
        seed=seed,
    )
    if saved is not None and (reason := checkpoint.difference(saved, identity)) is not None:
        raise UsageError(f"the run cannot be gone on with: {reason}; start a new one, or name what it had")
    told = checkpoint.Told(data=str(data.resolve()) if data else None, limit=limit, profile=profile_words)
    projected_s = _projected_s(profile, strategy, workload.num_train, workload.num_test, num_epochs)
    steps_per_epoch = workload.steps_per_epoch
    with StageDisplay() as stages:
        train, test = (with_lengths(part, strategy, stages.stage) for part in (workload.train, workload.test))
    workload = dataclasses.replace(workload, train=train, test=test)
    backend.start_memory_window()
    with _told_of(knobs):
        run = apply(strategy, workload, backend, total_steps=num_epochs * steps_per_epoch, seed=seed)
    store.check_writable(metrics, "--metrics")
    store.check_writable(folder / checkpoint.CHECKPOINT_FILE, "--run")
    training = Training(run, patience=patience)
    if state is not None:
        training.restore(state)
        del state
    log = tensorboard_log(folder, training) if tensorboard else None
    last_saved = time.monotonic()

    def save() -> None:
        nonlocal last_saved
        training.check_losses()
        checkpoint.write_checkpoint(folder / checkpoint.CHECKPOINT_FILE, identity, told, training.state())
        record = training.metrics(profile=profile_words, projected_s=projected_s, seed=seed, num_epochs=num_epochs)
        write_metrics(record, metrics)
        if log is not None:
            log()
        last_saved = time.monotonic()

    part = f", at most {limit:,} of each" if limit else ""
    title = f"autotune train · {label} · {describe(strategy)} · {workload.source}{part}"
    with TrainDisplay(title, num_steps=steps_per_epoch, num_epochs=num_epochs, done=training.epochs) as display:
        display.say(title)
        if strategy.is_approximate:
            display.say("approximate: this setting trains something else than the baseline does")
        if len(training.epochs) >= num_epochs:
            display.say(f"the run is done already: {count_words(num_epochs, 'epoch')}")
        elif training.epochs or training.step:
            so_far = f"{count_words(len(training.epochs), 'epoch')} and {count_words(training.step, 'step')}"
            display.say(f"going on after {so_far}")

        def on_step(epoch: int, step: int, num_samples: int) -> None:
            display.on_step(epoch, step, num_samples)
            if time.monotonic() - last_saved >= checkpoint_s:
                save()

        def on_epoch(epoch: object) -> None:
            display.on_epoch(training.epochs[-1])
            if training.is_best:
                checkpoint.write_tensors(folder / checkpoint.BEST_FILE, run.model.state_dict())
            save()

        told_of = _told_of(knobs, lambda: training.step or training.epochs)
        with _swept(folder), _as_the_user_s(workload), told_of, _stopped_by_ctrl_c(training, display.say):
            training.train(num_epochs, on_step=on_step, on_evaluation=display.on_evaluation, on_epoch=on_epoch)
        if training.is_stopped:
            save()
    console = stdout()
    console.print(f"{label}: {describe(strategy)}", style="bold", markup=False)
    found = profile_words or ("none" if saved is not None or profile_name == "none" else "none, safe defaults")
    if profile is not None and profile_words is not None:
        knobs = tuple(f"{knob}={own}" for knob, (own, _) in strategy.changed(profile.strategy).items())
    changed = f", with {' '.join(knobs)}" if knobs else ""
    console.print(f"profile {found}{changed}", markup=False, soft_wrap=True)
    if training.epochs:
        console.print(epoch_table(training.epochs))
    projection = f", projected {format_duration(projected_s)}" if projected_s else ""
    peak = f"peak memory {format_bytes(training.peak_memory_bytes)}"
    console.print(
        f"{format_duration(training.wall_s)}{projection}; {peak}; metrics in {metrics}", markup=False, soft_wrap=True
    )
    is_done = len(training.epochs) == num_epochs or training.has_converged
    if (folder / checkpoint.BEST_FILE).is_file() and training.epochs:
        best = min(training.epochs, key=lambda epoch: epoch.test_loss).epoch
        console.print(f"weights of epoch {best} in {folder / checkpoint.BEST_FILE}", markup=False, soft_wrap=True)
    if not is_done:
        click.echo(f"interrupted in epoch {len(training.epochs) + 1} of {num_epochs}; to go on: ", err=True, nl=False)
        click.echo(shlex.join(["autotune", "train", "--model", name, "--resume", str(folder)]), err=True)
        return 130
    if len(training.epochs) < num_epochs:
        click.echo(f"ended: no lower test loss for {patience} epochs", err=True)
    return 0


def _profile(
    device: Device,
    wanted: Wanted,
    profile_name: str | None,
    pick: str | None,
    profiles: Path | None,
) -> tuple[Profile | None, Path | None]:
    """The profile to train with, and its file. Without a profile's settings its projection is a courtesy, and a broken
    one no obstacle."""
    from autotune import store

    if pick is not None and profile_name == "none":
        raise UsageError("--pick chooses from a profile, and --profile none takes none")
    found: tuple[Profile | None, Path | None] = None, None
    if profile_name is not None and profile_name != "none":
        path = Path(profile_name)
        found = store.read_for(path, device, wanted), path
    else:
        with contextlib.suppress(*([] if profile_name is None else [AutotuneError])):
            found = store.find_profile(device, wanted, profiles) or found
    profile, path_found = found
    if profile is None and pick is not None:
        raise UsageError(
            f"--pick chooses from a profile; make one: autotune search --model {wanted.name} --objective pareto"
        )
    if profile is None and profile_name is None:
        click.echo(
            f"No profile for {wanted.name} on this device, safe defaults are used; make one: ", err=True, nl=False
        )
        click.echo(f"autotune search --model {wanted.name}", err=True)
    if profile is not None:
        if profile_name != "none" and (words := store.caveat(profile, device)):
            click.echo(words, err=True)
        profile = profile if pick is None else profile.pick(pick)
    return profile, path_found


def _resumed_profile(words: str | None) -> Profile | None:
    """The profile that a run began with, for its projection, where it is still there."""
    from autotune.profile import read_profile

    with contextlib.suppress(AutotuneError):
        return None if words is None else read_profile(Path(words))
    return None


def _strategy(name: str, profile_name: str | None, profile: Profile | None, baseline: Strategy) -> Strategy:
    from autotune.api import safe_defaults

    if profile_name == "none":
        return baseline
    return safe_defaults(name) if profile is None else profile.strategy


@contextlib.contextmanager
def _told_of(knobs: tuple[str, ...], has_begun: Callable[[], object] = bool) -> Iterator[None]:
    """What torch refuses before training has begun is taken to be the doing of the knobs that the user has set.
    Raises AutotuneError that names them."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, OSError) as exc:
        if not knobs or has_begun() or (isinstance(exc, OSError) and not is_of_the_system(exc)):
            raise
        raise AutotuneError(f"--knob {' '.join(knobs)} does not run here: {line_of(exc)}") from exc


@contextlib.contextmanager
def _as_the_user_s(workload: Workload) -> Iterator[None]:
    """What a model of the user's own fails of is told in one line. Raises AutotuneError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError) as exc:
        if workload.split is None:
            raise
        raise AutotuneError(f"{workload.name} fails in training: {words_of(exc)}") from exc


@contextlib.contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """A run that fails before anything is saved leaves no folder."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
        raise


@contextlib.contextmanager
def _stopped_by_ctrl_c(training: Training, say: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C ends the training after its step; a second one at once. Loader processes, which the terminal tells as
    well, are ended by this one."""
    owner = os.getpid()

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != owner:
            return
        if training.is_stopped:
            raise KeyboardInterrupt
        training.stop()
        say("stopping after this step; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
