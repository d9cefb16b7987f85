"""What a search found, in words and tables: baseline beside best, what changed and what it brings, how sure it is."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autotune.report.terminal import (
    batches_words,
    count_words,
    describe,
    disagreement_words,
    faster_words,
    interval_words,
    share_words,
)
from autotune.search.explain import Share
from autotune.search.objective import PlannedRun
from autotune.search.result import Result
from autotune.strategy import Strategy
from autotune.units import format_bytes, format_duration, format_rate

if TYPE_CHECKING:
    from autotune.profile import Profile
    from autotune.workloads.base import Loop

_BAR = 14
"""Columns of the longest bar."""


def search_summary(
    result: Result,
    name: str,
    path: Path,
    *,
    is_saved: bool = True,
    replaced: Text | None = None,
    loop: Loop = "autotune",
    elsewhere: Path | None = None,
) -> RenderableType:
    """Baseline beside best, what changed, and what to do with it: in whosever ``loop`` trains the workload.
    ``replaced`` says whose place this one takes; ``elsewhere`` the folder of
    profiles that has to be named, where it is not the one that is looked in first."""
    base, best = result.baseline.measurement, result.best.measurement
    assert base is not None
    assert best is not None
    planned = result.planned
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for title in ("baseline", "best", ""):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    speedup = result.speedup
    is_sure = speedup.low > 1
    faster = Text(faster_words(speedup.ratio), style="bold green" if is_sure else "yellow")
    if speedup.ratio > 1 and not is_sure and result.num_rounds:
        faster.append(", not certain")
    table.add_row("samples/s", format_rate(base.samples_per_s), format_rate(best.samples_per_s), faster)
    table.add_row(
        "step", f"{base.step_ms:,.0f} ms", f"{best.step_ms:,.0f} ms", planned_step(best.step_ms, base.step_ms)
    )
    table.add_row(
        "peak memory",
        format_bytes(base.peak_memory_bytes),
        format_bytes(best.peak_memory_bytes),
        _change(base.peak_memory_bytes, best.peak_memory_bytes, "less memory", "more memory"),
    )
    if base.joules_per_sample is not None and best.joules_per_sample is not None:
        table.add_row(
            "energy",
            f"{base.joules_per_sample:.3g} J/sample",
            f"{best.joules_per_sample:.3g} J/sample",
            _change(base.joules_per_sample, best.joules_per_sample, "less energy", "more energy"),
        )
    if (used := result.utilisation(result.baseline)) is not None and (more := result.utilisation(result.best)):
        table.add_row("of the matmul rate", f"{used:.1%}", f"{more:.1%}", "model FLOP utilisation")
    table.add_row("waiting for data", f"{base.loader_wait:.1%}", f"{best.loader_wait:.1%}", "")
    cached = "" if result.warm_up_cached_s is None else f"{format_duration(result.warm_up_cached_s)} once compiled"
    if best.is_from_cache:
        cached = "was compiled before"
    table.add_row("warm-up", format_duration(base.warm_up_s), format_duration(best.warm_up_s), cached)
    base_s, best_s = planned.projected_s(base), planned.projected_s(best)
    epochs = count_words(planned.epochs, "epoch")
    table.add_row(
        f"projected, {epochs}",
        format_duration(base_s),
        format_duration(best_s),
        f"saves {format_duration(base_s - best_s)}" if base_s > best_s else "",
    )
    found: list[RenderableType] = [table, "", Text(_confidence(result), style="bright_black"), ""]
    if best.remarks:
        found += [Text(f"Of the best: {best.remarks}.", style="yellow"), ""]
    if disagreement := disagreement_words(result.speedup, result.in_turns()):
        found += [Text(disagreement, style="yellow"), ""]
    if result.front:
        found += [front_table(result), ""]
    knobs = changed_knobs(result.best.strategy, result.baseline.strategy, result.shares)
    if not is_saved:
        kept = "Not saved: the profile that is there has passed its last test, and this has not ("
        return Group(*found, knobs, "", Text.assemble(kept, (str(path), "bold"), "). The same command goes on."))
    return Group(
        *found,
        knobs,
        "",
        *(() if replaced is None else (replaced, "")),
        _unbroken("Saved ", (str(path), "bold"), ". To use it:"),
        "",
        *(_unbroken((f"    {line}", "cyan")) for line in _uses(name, loop, elsewhere)),
    )


def replaced_words(before: Profile, kept: Path, *, is_of_another: bool = False) -> Text:
    """Of a profile whose place a new one takes, and where it is kept: a faster one, or one ``is_of_another`` workload
    that is called the same."""
    if is_of_another:
        of = before.workload
        size = f"{of.num_parameters:,} parameters, " if of.num_parameters else ""
        words = f"This takes the place of {of.name}'s profile for another model or batch ({size}batches of "
        words += f"{of.global_batch}): two scripts of one name need folders of profiles of their own (--profiles, or "
        words += "./profiles). It is kept as "
    else:
        faster = faster_words(before.evidence.speedup.ratio)
        words = f"This takes the place of a profile of {before.created[:10]}, {faster} than the baseline then; it is "
        words += "kept as "
    return Text.assemble((words, "yellow"), (str(kept), "bold"), (".", "yellow"))


def _unbroken(*parts: str | tuple[str, str]) -> Text:
    """To be copied: the terminal may wrap it, where it is printed without being cropped."""
    return Text.assemble(*parts, no_wrap=True, overflow="ignore")


def _uses(name: str, loop: Loop, elsewhere: Path | None) -> tuple[str, ...]:
    """What to type."""
    load = f'autotune.load("{name}"' + (f', profiles="{elsewhere}")' if elsewhere else ")")
    if loop == "own":
        return (
            "import autotune",
            f"run = {load}.apply(model, optimizer=make_optimizer)",
            "for batch in my_loader: loss = run.step(run.split(batch))",
        )
    if loop == "transformers":
        return (
            "import autotune",
            f"tuned = {load}",
            'args = TrainingArguments(..., **tuned.arguments("transformers"))',
            "tuned.prepare(Trainer(model, args, ...)).train()",
        )
    if loop == "lightning":
        return (
            "import autotune",
            f"tuned = {load}",
            'trainer = lightning.Trainer(..., **tuned.arguments("lightning"))',
            "trainer.fit(tuned.prepare(module), tuned.loader(loader))",
        )
    folder = ["--profiles", str(elsewhere)] if elsewhere else []
    return (
        shlex.join(["autotune", "train", "--model", name, *folder]),
        "",
        "import autotune",
        f"run = {load}.apply()",
        "for batch in run.loader: loss = run.step(batch)",
    )


def front_table(result: Result) -> RenderableType:
    """What there is to choose from."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("--pick", no_wrap=True, style="bold")
    for title in ("samples/s", "faster", "peak memory"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("setting")
    for choice in result.front:
        assert choice.trial.measurement is not None
        table.add_row(
            choice.name,
            format_rate(choice.trial.measurement.samples_per_s),
            f"{choice.speedup.ratio:.2f}x",
            format_bytes(choice.trial.measurement.peak_memory_bytes),
            describe(choice.trial.strategy),
        )
    return table


def planned_step(best_ms: float, base_ms: float) -> str:
    """How many steps of the best fit into one of the baseline, where they do."""
    return "" if best_ms >= base_ms else f"{base_ms / best_ms:.1f} steps in the time of one"


def changed_knobs(best: Strategy, base: Strategy, shares: Sequence[Share] = ()) -> RenderableType:
    """Every knob that the best sets differently, with what it brings where that is known."""
    changed = best.changed(base)
    if not changed:
        return Text("The plain baseline is the best of what was tried.")
    longest = max((math.log(share.ratio.ratio) for share in shares if share.ratio), default=0.0)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for share in shares:
        table.add_row(share.knob, _change_words(share.plain, share.value), *_share_cells(share, changed, longest))
    shown = {share.knob for share in shares}
    for knob, (now, before) in changed.items():
        if knob not in shown:
            table.add_row(knob, _change_words(before, now))
    if not shares:
        return table
    num_rounds = min(share.num_rounds for share in shares)
    how = (
        f"measured without it and with it in turns, {num_rounds} rounds" if num_rounds else "estimated from all trials"
    )
    words = f"What each brings, all else as in the best: {how}, 95 % intervals."
    return Group(table, Text(words, style="bright_black"))


def _change_words(before: object, now: object) -> Text:
    return Text.assemble((f"{before} -> ", "bright_black"), str(now))


def _share_cells(share: Share, changed: Mapping[str, object], longest: float) -> list[RenderableType]:
    ratio = share.ratio
    if ratio is None:
        return ["", "", Text(f"without it: {share.reason}", style="yellow")]
    spread = Text(f"{ratio.low:.2f} to {ratio.high:.2f}", style="bright_black")
    is_sure = longest > 0 and ratio.low > 1
    bar = "█" * round(_BAR * math.log(ratio.ratio) / longest) if is_sure else ""
    last = Text(bar, style="green", no_wrap=True, overflow="crop")
    if share.knob not in changed:
        last = Text("nothing: set back", style="bright_black")
    return [f"{ratio.ratio:.2f}x", spread, last]


def _confidence(result: Result) -> str:
    outcomes: dict[str, int] = {}
    for trial in result.trials:
        outcomes[trial.outcome] = outcomes.get(trial.outcome, 0) + 1
    counts = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
    rounds = f"{result.num_rounds} rounds in turns with the baseline"
    alone = "from separate trials, not measured in turns"
    alone += ", for which a longer --budget leaves time" if result.lacked_time else ""
    how = rounds if result.num_rounds else alone
    base, best = result.baseline.measurement, result.best.measurement
    assert base is not None
    assert best is not None
    gained_s = result.planned.projected_s(base) - result.planned.projected_s(best)
    epochs_to_pay = result.search_s / (gained_s / result.planned.epochs) if gained_s > 0 else math.inf
    pays = ""
    if epochs_to_pay < result.planned.epochs and result.speedup.low > 1:
        when = "within the first epoch" if epochs_to_pay < 1 else f"after {epochs_to_pay:.1f} epochs"
        pays = f"; pays for itself {when}"
    is_baseline = result.best.strategy == result.baseline.strategy
    verdict = "Nothing is faster." if is_baseline else f"Speed-up {interval_words(result.speedup)}, {how}."
    settled = " No other was expected to save more than trying it takes." if result.is_settled else ""
    return (
        f"{verdict} {len(result.trials)} trials ({counts}) in "
        f"{format_duration(result.search_s)}{pays}.{settled}{_proof_words(result)}"
    )


def _proof_words(result: Result) -> str:
    proof = result.proof
    if result.best.strategy == result.baseline.strategy:
        return ""
    if proof is None:
        return " Interrupted before its last test, on losses and long samples: search again to go on."
    compared = f"Losses not compared, the baseline did not train these batches ({proof.not_compared}); "
    if proof.loss_deviation is not None:
        how = "Approximate: first losses" if result.best.strategy.is_approximate else "First losses"
        compared = f"{how} within {share_words(proof.loss_deviation)} of the fp32 baseline's on the same batches; "
    lasted = f"{proof.soak_steps} steps lasted, the longest samples in a row first."
    return f" {compared}{lasted} {batches_words(result.best.strategy)}".rstrip()


def _change(before: float, after: float, less: str, more: str) -> str:
    if abs(after / before - 1) < 0.005:
        return "the same"
    return f"{1 - after / before:.0%} {less}" if after < before else f"{after / before - 1:.0%} {more}"


def planned_words(planned: PlannedRun) -> str:
    """``5 epochs of 25,000 reviews, each with an evaluation of 25,000``."""
    epochs = count_words(planned.epochs, "epoch")
    return f"{epochs} of {planned.num_train:,} samples, each followed by an evaluation of {planned.num_test:,}"
