"""autotune search"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import msgspec

from autotune.cli.changes import refuse_unknown
from autotune.cli.options import (
    data_options,
    device_option,
    find_backend,
    json_option,
    model_option,
    prepare,
    probed,
    profiles_option,
)
from autotune.errors import UsageError
from autotune.units import parse_bytes, parse_duration

if TYPE_CHECKING:
    from autotune.backends.base import Device
    from autotune.measurement import Trial
    from autotune.search.objective import Objective
    from autotune.search.result import Result
    from autotune.workloads.base import Workload


@click.command("search")
@model_option
@click.option("--budget", metavar="TIME", help="Wall time for the search: 90s, 5m, 1h. Default 5m without --trials.")
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="Stop after N trials, the baseline counted.")
@click.option(
    "--objective",
    type=click.Choice(["time", "memory", "pareto", "energy"]),
    default="time",
    show_default=True,
    help="Minimise the planned run's wall time, peak memory, or joules a sample; pareto finds the fastest, the leanest "
    "and one between.",
)
@click.option(
    "--min-speed",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    metavar="SHARE",
    help="With --objective memory: at least this share of the fastest setting's speed.",
)
@click.option("--memory-budget", metavar="SIZE", help="Only settings that stay below this (on a CPU: 90 % of it).")
@click.option("--include-slow", is_flag=True, help="Search what the probe found too slow as well.")
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs of the planned run. Default: the recipe's.")
@data_options
@device_option
@profiles_option
@click.option(
    "--allow-approximate", is_flag=True, help="Search what changes the training as well, such as bf16 weights."
)
@click.option(
    "--without",
    multiple=True,
    metavar="KNOB[=VALUE]",
    help="Leave out a knob's value, as in padding=buckets, or all of its values but the plain one, as in compile. May "
    "be repeated.",
)
@click.option("--deterministic", is_flag=True, help="Only algorithms that give the same result every time.")
@click.option("--explain-space", is_flag=True, help="Only print what would be searched, and why not the rest.")
@click.option(
    "--explain/--no-explain",
    default=None,
    help="Measure what each knob of the best brings, a minute or two on top of the budget. Default: where the budget "
    "has time left.",
)
@click.option("--refresh", is_flag=True, help="Probe the device again.")
@click.option(
    "--fresh", is_flag=True, help="Start from nothing: neither from an interrupted search nor from a profile."
)
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
def command(
    name: str,
    budget: str | None,
    trials: int | None,
    objective: str,
    min_speed: float | None,
    memory_budget: str | None,
    include_slow: bool,
    epochs: int | None,
    data: Path | None,
    limit: int | None,
    device_name: str | None,
    profiles: Path | None,
    allow_approximate: bool,
    without: tuple[str, ...],
    deterministic: bool,
    explain_space: bool,
    explain: bool | None,
    refresh: bool,
    fresh: bool,
    seed: int,
    as_json: bool,
) -> int:
    """Search the fastest settings for a workload on this device and save them as a profile.

    Every trial runs the real training step in its own process. Ctrl-C keeps the best so far; after it, or a kill, the
    same command goes on where the search was.
    """
    budget_s = parse_duration(budget) if budget else None if trials else 300.0
    memory_budget_bytes = parse_bytes(memory_budget) if memory_budget else None
    if min_speed is not None and objective != "memory":
        raise UsageError("--min-speed goes with --objective memory; pareto finds several to choose from")

    refuse_unknown(without)

    from autotune import process

    process.warm_up()  # this process has torch to import as well

    from autotune import store, workloads
    from autotune.probe import describe_device
    from autotune.profile import write_profile
    from autotune.report.live import SearchDisplay
    from autotune.report.summary import planned_words, replaced_words, search_summary
    from autotune.report.terminal import busy_words, shared_words, space_table, stdout
    from autotune.search.result import profile_of
    from autotune.search.settings import Settings
    from autotune.search.study import search
    from autotune.search.task import Task

    workloads.get(name)
    backend = find_backend(device_name)
    device = describe_device(backend)
    label = workloads.label(name)
    path = store.profile_path(device, label, profiles)
    store.check_writable(path)
    with store.device_lock(device):
        ref, workload = prepare(name, data, limit, is_measured=True)
        hardware = probed(backend, refresh=refresh)
        busy = busy_words(hardware)
        if busy:
            click.echo(busy, err=True)
        settings = Settings(
            objective=cast("Objective", objective),
            min_speed=min_speed,
            budget_s=budget_s,
            max_trials=trials,
            memory_budget_bytes=memory_budget_bytes,
            includes_slow=include_slow,
            allows_approximate=allow_approximate,
            is_deterministic=deterministic,
            without=without,
            explains=explain,
            epochs=epochs,
            seed=seed,
        )
        if backend.device_type == "cpu":  # elsewhere a model may need its device to run at all
            workload.check_runs()
        nearest = None if fresh else store.nearest_profile(device, label, profiles)
        task = Task(
            ref=ref,
            workload=workload,
            hardware=hardware,
            backend=backend,
            settings=settings,
            known_good=None if nearest is None else nearest.strategy,
        )
        if workload.split is not None:
            click.echo("trying on a few samples what trains the same", err=True)
        if explain_space:
            stdout().print(space_table(task.space))
            stdout().print(f"{task.space.size:,} combinations; the probe has the figures: autotune probe")
            return 0
        is_saved, replaced = True, None  # words of a profile whose place the new one takes
        was_faster = False
        path_before = path.with_suffix(".toml.old")

        def save(found: Result) -> None:
            nonlocal is_saved, replaced, was_faster
            before = store.tested_profile(path, device, workloads.wanted(name))
            another = store.profile_of_another(path, device, workloads.wanted(name))
            has_lasted = before is not None or (another is not None and another.evidence.soak_steps > 0)
            if has_lasted and found.was_interrupted and found.proof is None:
                is_saved = False
                return
            was_faster = before is not None and before.evidence.speedup.ratio > found.speedup.high
            kept = before if was_faster else another
            if kept is not None:
                write_profile(kept, path_before)
                replaced = replaced_words(kept, path_before, is_of_another=kept is another)
            write_profile(profile_of(found, device, workload), path)

        title = f"autotune search · {label} · {device.name}, {device.num_cores} cores"
        with SearchDisplay(title, budget_s=budget_s, max_trials=trials) as display:
            display.say(f"{title}: {workload.source}")
            result = search(
                task,
                display,
                journal_path=path.with_suffix(".journal"),
                is_fresh=fresh,
                save=save,
            )
        display.console.print(f"Planned run: {planned_words(result.planned)}.", style="bright_black")
    if as_json:
        click.echo(
            msgspec.json.format(
                msgspec.json.encode(_report(result, device, workload, path, path_before if was_faster else None)),
                indent=2,
            ).decode()
        )
    else:
        found = search_summary(
            result,
            name,
            path,
            is_saved=is_saved,
            replaced=replaced,
            loop=workload.loop,
            elsewhere=None if profiles is None or profiles.resolve() == store.stores()[0].resolve() else profiles,
        )
        stdout().print(found, crop=False)
    if busy:
        click.echo(f"Of the probe before this search: {busy}", err=True)
    if shared := shared_words(result.others_cores, device.num_cores):
        click.echo(shared, err=True)
    return 130 if result.was_interrupted else 0


def _report(result: Result, device: Device, workload: Workload, path: Path, path_before: Path | None) -> dict[str, Any]:
    return {
        "device": {**msgspec.to_builtins(device), "fingerprint": device.fingerprint},
        "workload": {
            "name": workload.name,
            "source": workload.source,
            "global_batch": workload.recipe.global_batch,
            "epochs": result.planned.epochs,
            "num_train": result.planned.num_train,
            "num_test": result.planned.num_test,
        },
        "objective": result.objective,
        "baseline": _figures(result.baseline, result),
        "best": _figures(result.best, result),
        "speedup": result.speedup,
        "num_rounds": result.num_rounds,
        "shares": result.shares,
        "flops": {"per_sample": result.flops.per_sample, "reason": result.flops.reason},
        "front": [
            {"name": choice.name, "speedup": choice.speedup, "proof": choice.proof, **_figures(choice.trial, result)}
            for choice in result.front
        ],
        "proof": result.proof,
        "was_interrupted": result.was_interrupted,
        "trials": [
            {
                "number": trial.number,
                "strategy": trial.strategy.to_dict(),
                "outcome": trial.outcome,
                "reason": trial.reason,
                "samples_per_s": trial.samples_per_s,
                "peak_memory_bytes": trial.measurement.peak_memory_bytes if trial.measurement else None,
                "wall_s": trial.wall_s,
            }
            for trial in result.trials
        ],
        "search_s": result.search_s,
        "others_cores": result.others_cores,
        "profile_path": str(path),
        "faster_before": None if path_before is None else str(path_before),
    }


def _figures(trial: Trial, result: Result) -> dict[str, Any]:
    from autotune.search.result import figures

    return {"strategy": trial.strategy.to_dict(), **msgspec.to_builtins(figures(trial, result))}
