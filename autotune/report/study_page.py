"""A study as a page: the verdict first, then memory, speed and quality by technique and batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from autotune.report import charts, page
from autotune.report.study import changes_of, quality_name, quality_words
from autotune.study.runner import Cell, Results, reference_of
from autotune.units import GIB, format_bytes, format_duration, format_rate


def study_page(results: Results, path: Path) -> str:
    """The whole page."""
    return page.page(f"autotune · {results.title}", _body(results, path))


def _body(results: Results, path: Path) -> Iterator[str]:
    largest = max((cell.batch_size for cell in results.cells if cell.trained), default=0)
    fastest = _best(results, largest, is_memory=False)
    leanest = _best(results, largest, is_memory=True)
    words = "Nothing has been measured yet"
    if fastest is not None and leanest is not None:
        words = f"Fastest at batch {largest}: <b>{escape(fastest.technique)}</b>{_less(results, fastest, False)}"
        if leanest.technique != fastest.technique:
            words += f"; leanest: <b>{escape(leanest.technique)}</b>{_less(results, leanest, True)}"
        else:
            words += f", and leanest{_less(results, leanest, True)}"
    more = f"{results.steps} steps of each technique at each batch size, against {results.reference}; {results.source}."
    more += _quality_beside(results, (fastest, leanest))
    yield page.verdict(f"autotune study · {results.title} · {results.model} · {results.device}", words, more)
    if any(cell.trained for cell in results.cells):
        yield page.section(
            "Memory, speed and loss",
            page.charts(
                ("Memory against batch size", _lines(results, "peak memory, GiB")),
                ("Speed against batch size", _lines(results, "samples a second")),
                (f"Time against memory at batch {largest}", _tradeoff(results, largest)),
                (f"Memory against {results.reference} at batch {largest}", _savings(results, largest)),
                (f"Loss of each step at batch {largest}", _losses(results, largest)),
            ),
        )
    yield page.section("Every cell", _cells(results))
    if results.capacities:
        yield page.section(
            "Largest batch before memory runs out",
            page.table(
                ("technique", "batch", "peak memory", "what stops it"),
                [
                    (
                        one.technique,
                        str(one.batch_size or "none"),
                        format_bytes(one.peak_memory_bytes) if one.peak_memory_bytes else "",
                        one.reason,
                    )
                    for one in results.capacities
                ],
                numbers=(1, 2),
            ),
        )
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield page.section(
        "What was run, and on what",
        page.table(
            ("", ""),
            [
                ("device", results.device),
                ("memory that a cell may take", format_bytes(results.limit_bytes)),
                ("data", results.source),
                ("seed", str(results.seed)),
                ("versions", f"autotune {results.autotune}, {versions}"),
                ("record", str(path)),
            ],
        ),
        page.code(_command(results)),
    )


def _best(results: Results, batch_size: int, *, is_memory: bool) -> Cell | None:
    """Of the techniques at a batch size, the leanest or the fastest."""
    found = [cell for cell in results.cells if cell.trained is not None and cell.batch_size == batch_size]

    def cost(cell: Cell) -> float:
        assert cell.trained is not None
        return cell.trained.peak_memory_bytes if is_memory else 1 / cell.trained.samples_per_s

    return min(found, key=cost, default=None)


def _less(results: Results, cell: Cell, is_memory: bool) -> str:
    """What it saves."""
    base = reference_of(results, cell.batch_size)
    if base is None or cell.trained is None or cell.technique == results.reference:
        return ""
    memory, time = changes_of(cell.trained, base)
    return f", {-memory:.0%} less memory" if is_memory else f", {-time:.0%} less time"


def _quality_beside(results: Results, cells: Sequence[Cell | None]) -> str:
    """How good the techniques of the verdict are, beside the reference."""
    parts = []
    for cell in cells:
        base = None if cell is None else reference_of(results, cell.batch_size)
        if cell is not None and cell.trained is not None and base is not None and cell.technique != results.reference:
            kind = " (approximate)" if cell.strategy.is_approximate else ""
            words = f"{quality_words(cell.trained)} against {quality_words(base)}"
            parts.append(f"{quality_name(results)} of {cell.technique}{kind}: {words}")
    return "".join(f" {part[0].upper()}{part[1:]}." for part in dict.fromkeys(parts))


def _techniques(results: Results) -> list[str]:
    return list(dict.fromkeys(cell.technique for cell in results.cells))


def _words(cell: Cell) -> str:
    assert cell.trained is not None
    figures = f"{format_rate(cell.trained.samples_per_s)} samples/s, {format_bytes(cell.trained.peak_memory_bytes)}"
    return f"{cell.technique}, batch {cell.batch_size}: {figures}"


def _losses(results: Results, batch_size: int) -> str:
    series = {
        cell.technique: charts.averaged(cell.trained.losses)
        for cell in results.cells
        if cell.trained is not None and cell.batch_size == batch_size
    }
    return charts.curves(series, "step", "loss")


def _lines(results: Results, title: str) -> str:
    series: dict[str, list[charts.Point]] = {}
    for cell in results.cells:
        if cell.trained is not None:
            is_speed = title.startswith("samples")
            value = cell.trained.samples_per_s if is_speed else cell.trained.peak_memory_bytes / GIB
            series.setdefault(cell.technique, []).append(charts.Point(cell.batch_size, value, _words(cell)))
    return charts.lines(series, "batch size", title)


def _tradeoff(results: Results, batch_size: int) -> str:
    names = _techniques(results)
    points = [
        charts.Point(
            cell.trained.peak_memory_bytes / GIB,
            1000 / cell.trained.samples_per_s,
            _words(cell),
            f"s{names.index(cell.technique) % 8}",
        )
        for cell in results.cells
        if cell.trained is not None and cell.batch_size == batch_size
    ]
    return charts.scatter(points, "peak memory, GiB", "milliseconds a sample")


def _savings(results: Results, batch_size: int) -> str:
    base = reference_of(results, batch_size)
    rows = []
    for cell in results.cells:
        if base is not None and cell.trained is not None and cell.batch_size == batch_size:
            share = cell.trained.peak_memory_bytes / base.peak_memory_bytes
            if cell.technique != results.reference:
                words = f"{cell.technique}: {share:.0%} of the memory"
                rows.append(charts.Bar(cell.technique, share, share, share, words, "s1" if share < 1 else "s2"))
    return (
        charts.bars(rows, f"share of {results.reference}'s peak memory")
        if rows
        else page.paragraph("Nothing to compare.")
    )


def _cells(results: Results) -> str:
    header = (
        "technique",
        "batch",
        "samples/s",
        "forward",
        "backward",
        "update",
        "after forward",
        "peak",
        "memory",
        "time",
        "quality",
        "outcome",
    )
    rows = []
    for cell in results.cells:
        found, base = cell.trained, reference_of(results, cell.batch_size)
        if found is None:
            rows.append((cell.technique, str(cell.batch_size), *[""] * 9, f"{cell.outcome}: {cell.reason}"))
            continue
        changes = ("", "")
        if base is not None and cell.technique != results.reference:
            memory, time = changes_of(found, base)
            changes = (f"{memory:+.0%}", f"{time:+.0%}")
        rows.append(
            (
                cell.technique,
                str(cell.batch_size),
                format_rate(found.samples_per_s),
                *(f"{value:,.0f} ms" for value in (found.forward_ms, found.backward_ms, found.update_ms)),
                format_bytes(found.forward_bytes),
                format_bytes(found.peak_memory_bytes),
                *changes,
                quality_words(found),
                f"ok, {format_duration(cell.wall_s)}",
            )
        )
    return page.table(header, rows, numbers=range(1, 11))


def _command(results: Results) -> str:
    sizes = "".join(f" --batch-size {size}" for size in results.batch_sizes)
    limit = "" if results.limit is None else f" --limit {results.limit}"
    seed = f" --seed {results.seed}" if results.seed else ""
    return (
        f"autotune study --study {results.origin} --model {results.model} --steps {results.steps}{sizes}{limit}{seed}"
    )
