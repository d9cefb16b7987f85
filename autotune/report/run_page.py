"""Training runs as a page, one or several over one another: what came of them, and how they got there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autotune.report import charts, page
from autotune.report.compare import differences, seconds_of
from autotune.report.terminal import count_words, describe, epoch_row, quality_name, quality_value, quality_words
from autotune.training import Metrics
from autotune.units import format_bytes, format_duration, format_rate

Named = tuple[str, Metrics]


def run_page(runs: Sequence[Named]) -> str:
    """The whole page; each run with its name."""
    return page.page(f"autotune · {runs[0][1].workload}", _body(runs))


def _body(runs: Sequence[Named]) -> Iterator[str]:
    first = runs[0][1]
    yield page.verdict(f"autotune train · {first.workload} · {first.device}", _verdict(runs), _beside(runs))
    yield page.section("The runs", _table(runs))
    curves = [
        (title, drawing)
        for title, drawing in (
            ("Loss of each step", _steps(runs, "losses", "loss")),
            ("Learning rate", _steps(runs, "learning_rates", "learning rate")),
            ("Gradients before clipping", _steps(runs, "grad_norms", "L2 norm")),
        )
        if drawing
    ]
    if any(metrics.epochs for _, metrics in runs):
        curves.append(("Test loss", _epochs(runs, is_quality=False)))
        if quality_name(first.epochs):
            curves.append((f"Test {quality_name(first.epochs)}", _epochs(runs, is_quality=True)))
    if curves:
        yield page.section("How they got there" if len(runs) > 1 else "How it got there", page.charts(*curves))
    header = (
        *("epoch", "train loss", "test loss", f"test {quality_name(first.epochs) or 'quality'}"),
        *("learning rate", "grad norm", "trained", "evaluated", "samples/s"),
    )
    for name, metrics in runs:
        if metrics.epochs:
            rows = (epoch_row(epoch) for epoch in metrics.epochs)
            yield page.section(f"Every epoch of {name}", page.table(header, rows, numbers=range(len(header))))


def _verdict(runs: Sequence[Named]) -> str:
    (_, first), (_, last) = runs[0], runs[-1]
    if not last.epochs or not first.epochs:
        return "No epoch is done yet"
    quality = f"<b>{quality_words(last.epochs[-1])}</b> {quality_name(last.epochs)}".strip()
    if not quality_name(last.epochs):
        quality = f"a test loss of <b>{last.epochs[-1].test_loss:.4f}</b>"
    if len(runs) == 1:
        return f"{quality} after {count_words(len(last.epochs), 'epoch')} in {format_duration(last.wall_s)}"
    shared = min(len(first.epochs), len(last.epochs))
    ratio = seconds_of(first, shared) / seconds_of(last, shared)
    before = quality_words(first.epochs[-1]) if quality_name(first.epochs) else f"{first.epochs[-1].test_loss:.4f}"
    return f"{quality} against {before}, <b>{ratio:.2f}x</b> as fast"


def _beside(runs: Sequence[Named]) -> str:
    (first_name, first), (last_name, _) = runs[0], runs[-1]
    words = f"{first.source}; {first.num_train:,} samples to train on, {first.num_test:,} to test."
    if len(runs) > 1:
        words += f" {last_name} against {first_name}, evaluations counted."
        others = sorted({word for _, metrics in runs[1:] for word in differences(first, metrics)})
        words += f" Not the same training: they differ in {', '.join(others)}." if others else ""
    return words


def _table(runs: Sequence[Named]) -> str:
    return page.table(
        ("run", "setting", "epochs", "time", "samples/s", "peak memory", "best", "seed"),
        [
            (
                name,
                describe(metrics.strategy),
                str(len(metrics.epochs)),
                format_duration(metrics.wall_s),
                format_rate(max((epoch.samples_per_s for epoch in metrics.epochs), default=0.0)),
                format_bytes(metrics.peak_memory_bytes),
                quality_words(min(metrics.epochs, key=lambda epoch: epoch.test_loss)) if metrics.epochs else "",
                str(metrics.seed),
            )
            for name, metrics in runs
        ],
        numbers=(2, 3, 4, 5, 6, 7),
    )


def _steps(runs: Sequence[Named], field: str, title: str) -> str:
    """A curve for each run that has such a series; nothing where none has."""
    series = {name: charts.averaged(getattr(metrics.steps, field)) for name, metrics in runs}
    return charts.curves(series, "step", title) if any(series.values()) else ""


def _epochs(runs: Sequence[Named], *, is_quality: bool) -> str:
    series = {
        name: [
            (float(epoch.epoch), quality_value(epoch) if is_quality else epoch.test_loss) for epoch in metrics.epochs
        ]
        for name, metrics in runs
    }
    title = quality_name(runs[0][1].epochs) if is_quality else "loss"
    return charts.curves(series, "epoch", title, is_marked=True)
