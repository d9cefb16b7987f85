"""Training runs as a page, one or several over one another: what came of them, and how they got there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autotune.report import charts, page
from autotune.report.runs import differences, is_as_long, quality_name, quality_of, quality_words, seconds_of
from autotune.report.terminal import count_words, describe, epoch_row
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
        ("Loss of each step", _steps(runs, "losses", "loss")),
        ("Learning rate", _steps(runs, "learning_rates", "learning rate")),
        ("Gradients before clipping", _steps(runs, "grad_norms", "L2 norm")),
        ("Test loss", _epochs(runs, "loss")),
    ]
    if name := quality_name(first.epochs):
        curves.append((f"Test {name}", _epochs(runs, name)))
    if drawn := [(title, drawing) for title, drawing in curves if drawing]:
        yield page.section("How they got there" if len(runs) > 1 else "How it got there", page.charts(*drawn))
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
    shared = min(len(first.epochs), len(last.epochs))
    if not is_as_long(first, last):
        return "Not the same training"
    if not shared:
        return "No epoch is done yet"
    is_loss = not quality_name(last.epochs)
    before, after = (
        f"{epoch.test_loss:.4f}" if is_loss else quality_words(epoch)
        for epoch in (first.epochs[shared - 1], last.epochs[shared - 1])
    )
    found = f"a test loss of <b>{after}</b>" if is_loss else f"<b>{after}</b> {quality_name(last.epochs)}"
    if len(runs) == 1:
        return f"{found} after {count_words(shared, 'epoch')} in {format_duration(last.wall_s)}"
    ratio = seconds_of(first, shared) / seconds_of(last, shared)
    return f"{found} against {before} after {count_words(shared, 'epoch')}, <b>{ratio:.2f}x</b> as fast"


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
    return charts.curves({name: charts.averaged(getattr(run.steps, field)) for name, run in runs}, "step", title)


def _epochs(runs: Sequence[Named], what: str) -> str:
    """The test loss, or the quality of those runs that have it, by epoch."""
    series = {
        name: [
            (float(epoch.epoch), epoch.test_loss if what == "loss" else quality_of(epoch))
            for epoch in run.epochs
            if what in ("loss", quality_name(run.epochs))
        ]
        for name, run in runs
    }
    return charts.curves(series, "epoch", what, is_marked=True)
