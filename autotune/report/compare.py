"""Two profiles, two studies or two training runs side by side."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autotune.profile import Profile
from autotune.report import runs
from autotune.report.study import quality_words
from autotune.report.terminal import count_words, describe, faster_words, interval_words
from autotune.study.runner import Results
from autotune.training import Metrics
from autotune.units import format_bytes, format_duration, format_rate


def compared_profiles(first: Profile, second: Profile, names: tuple[str, str]) -> RenderableType:
    """Knobs first, those that differ marked, then figures; the last column is the second over the first."""
    table = _table()
    knobs = first.strategy.to_dict()
    for knob, value in knobs.items():
        other = getattr(second.strategy, knob)
        differs = Text("differs", style="yellow") if other != value else ""
        table.add_row(knob, str(value), str(other), differs)
    table.add_section()
    for title, one, two, change in _figures(first, second):
        table.add_row(title, one, two, change)
    return Group(_names(names), table)


def compared_studies(first: Results, second: Results, names: tuple[str, str]) -> RenderableType:
    """Every cell that both have."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("technique", no_wrap=True)
    for title in ("batch", "A samples/s", "B samples/s", "B/A", "A peak", "B peak", "B/A", "A quality", "B quality"):
        table.add_column(title, justify="right", no_wrap=True)
    others = {(cell.technique, cell.batch_size): cell for cell in second.cells}
    num_shared = 0
    for cell in first.cells:
        other = others.get((cell.technique, cell.batch_size))
        if other is None or cell.trained is None or other.trained is None:
            continue
        num_shared += 1
        one, two = cell.trained, other.trained
        table.add_row(
            cell.technique,
            str(cell.batch_size),
            format_rate(one.samples_per_s),
            format_rate(two.samples_per_s),
            _over(one.samples_per_s, two.samples_per_s),
            format_bytes(one.peak_memory_bytes),
            format_bytes(two.peak_memory_bytes),
            _over(one.peak_memory_bytes, two.peak_memory_bytes),
            quality_words(one),
            quality_words(two),
        )
    if not num_shared:
        return Group(_names(names), Text("They have no cell in common that was measured in both.", style="yellow"))
    return Group(_names(names), table)


def compared_runs(first: Metrics, second: Metrics, names: tuple[str, str]) -> RenderableType:
    """Epoch by epoch as far as both have got, then the whole."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in (
        *("\n\nepoch", "train\nloss\nA", "\n\nB", "test\nloss\nA", "\n\nB"),
        *(f"test\n{runs.quality_name(first.epochs) or 'accuracy'}\nA", "\n\nB", "\ntime\nA", "\n\nB", "\nB is\nfaster"),
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for one, two in zip(first.epochs, second.epochs, strict=False):
        one_s, two_s = one.train_s + one.eval_s, two.train_s + two.eval_s
        table.add_row(
            str(one.epoch),
            *(f"{epoch.train_loss:.4f}" for epoch in (one, two)),
            *(f"{epoch.test_loss:.4f}" for epoch in (one, two)),
            *(runs.quality_words(epoch) for epoch in (one, two)),
            *(format_duration(seconds) for seconds in (one_s, two_s)),
            _over(two_s, one_s) if runs.is_as_long(first, second) else "",
        )
    shared = min(len(first.epochs), len(second.epochs))
    words = [_names((f"{names[0]}\n  {_setting(first)}", f"{names[1]}\n  {_setting(second)}"))]
    if not shared:
        return Group(*words, Text("They have no epoch in common yet.", style="yellow"))
    one_s, two_s = runs.seconds_of(first, shared), runs.seconds_of(second, shared)
    faster = f", B is {faster_words(one_s / two_s)}" if runs.is_as_long(first, second) else ""
    rates = [format_rate(max(epoch.samples_per_s for epoch in run.epochs)) for run in (first, second)]
    total = (
        f"\n{count_words(shared, 'epoch')}, evaluations counted: {format_duration(one_s)} and "
        f"{format_duration(two_s)}{faster}; {rates[0]} and {rates[1]} samples/s in the fastest epoch; peak memory "
        f"{format_bytes(first.peak_memory_bytes)} and {format_bytes(second.peak_memory_bytes)}."
    )
    found = runs.differences(first, second)
    others = [Text(f"Not the same training: they differ in {', '.join(found)}.", style="yellow")] if found else []
    return Group(*words, table, Text(total), *others)


def _setting(metrics: Metrics) -> str:
    return f"{describe(metrics.strategy)}, seed {metrics.seed}, {metrics.device}"


def _table() -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("A", "B"):
        table.add_column(name)
    table.add_column("", no_wrap=True)
    return table


def _names(names: tuple[str, str]) -> Text:
    return Text(f"A {names[0]}\nB {names[1]}\n", style="bright_black")


def _over(first: float, second: float) -> str:
    return f"{second / first:.2f}x" if first else ""


def _figures(first: Profile, second: Profile) -> Iterator[tuple[str, str, str, str]]:
    for title, one, two in (
        ("device", first.device.name, second.device.name),
        ("workload", first.workload.name, second.workload.name),
    ):
        yield title, one, two, ""
    a, b = first.evidence, second.evidence
    yield "speed-up", interval_words(a.speedup), interval_words(b.speedup), ""
    for title, x, y in (("best", a.best, b.best), ("baseline", a.baseline, b.baseline)):
        rate = _over(x.samples_per_s, y.samples_per_s)
        yield f"{title}, samples/s", format_rate(x.samples_per_s), format_rate(y.samples_per_s), rate
        memory = _over(x.peak_memory_bytes, y.peak_memory_bytes)
        yield f"{title}, peak memory", format_bytes(x.peak_memory_bytes), format_bytes(y.peak_memory_bytes), memory
        run = _over(x.projected_s, y.projected_s)
        yield f"{title}, planned run", format_duration(x.projected_s), format_duration(y.projected_s), run
    yield "trials", str(a.num_trials), str(b.num_trials), ""
    yield "search", format_duration(a.search_s), format_duration(b.search_s), ""
