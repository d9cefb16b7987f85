"""A study's results as a table on the terminal and as CSV: each technique beside the reference at its batch size."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autotune.phases import Trained
from autotune.study.runner import Cell, Results, reference_of
from autotune.units import format_bytes, format_rate

COLUMNS = (
    *("technique", "batch_size", "micro_batch", "accumulation", "outcome", "reason", "steps", "samples_per_s"),
    *("step_ms", "forward_ms", "backward_ms", "update_ms", "forward_bytes", "backward_bytes", "peak_memory_bytes"),
    *("memory_change", "time_change", "train_loss", "test_loss", "accuracy", "perplexity", "wall_s"),
)


def study_table(results: Results) -> RenderableType:
    """All cells; memory and time as changes from the reference technique at the same batch size."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("technique", no_wrap=True)
    quality = quality_name(results)
    for title in ("batch", "samples/s", "forward", "backward", "peak", "memory", "time", quality):
        table.add_column(title, justify="right", no_wrap=True)
    last, missing = None, list[str]()
    for cell in sorted(results.cells, key=lambda cell: (cell.batch_size, _place(results, cell))):
        if last is not None and last != cell.batch_size:
            table.add_row()
        last = cell.batch_size
        found, base = cell.trained, reference_of(results, cell.batch_size)
        if found is None:
            missing.append(f"{cell.technique}, batch {cell.batch_size}: {cell.outcome}, {cell.reason}")
            table.add_row(cell.technique, str(cell.batch_size), Text(cell.outcome, style="yellow"))
            continue
        is_reference = cell.technique == results.reference
        changes = ["", ""] if is_reference or base is None else [_change(value) for value in changes_of(found, base)]
        table.add_row(
            cell.technique,
            str(cell.batch_size),
            format_rate(found.samples_per_s),
            f"{found.forward_ms:,.0f} ms",
            f"{found.backward_ms:,.0f} ms",
            format_bytes(found.peak_memory_bytes),
            *changes,
            quality_words(found),
        )
    words = (
        f"{results.steps} steps each; memory and time against {results.reference} at the same batch size; "
        f"{quality} on the same samples after training."
    )
    parts: list[RenderableType] = [table, "", *(Text(line, style="yellow") for line in missing)]
    parts.append(Text(words, style="bright_black"))
    if results.capacities:
        parts += ["", _capacity_table(results)]
    return Group(*parts)


def study_csv(results: Results) -> str:
    """One line a cell, under a header; numbers without units, changes as shares."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(results))
    return buffer.getvalue()


def changes_of(found: Trained, base: Trained) -> tuple[float, float]:
    """Peak memory and the time of a sample, as changes from the reference: -0.4 is 40 % less."""
    return (
        found.peak_memory_bytes / base.peak_memory_bytes - 1,
        base.samples_per_s / found.samples_per_s - 1,
    )


def quality_words(found: Trained) -> str:
    """Perplexity, accuracy, or the loss alone."""
    if found.perplexity is not None:
        return f"{found.perplexity:,.1f}"
    return f"{found.accuracy:.1%}" if found.accuracy is not None else f"{found.test_loss:.4f}"


def quality_name(results: Results) -> str:
    """What the results are judged by."""
    measured = [cell.trained for cell in results.cells if cell.trained is not None]
    if any(found.perplexity is not None for found in measured):
        return "perplexity"
    return "accuracy" if any(found.accuracy is not None for found in measured) else "test loss"


def _capacity_table(results: Results) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("technique", no_wrap=True)
    table.add_column("largest batch", justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("what stops it", overflow="fold")
    for capacity in results.capacities:
        peak = "" if capacity.peak_memory_bytes is None else format_bytes(capacity.peak_memory_bytes)
        size = "none" if capacity.batch_size is None else str(capacity.batch_size)
        table.add_row(capacity.technique, size, peak, Text(capacity.reason, style="bright_black"))
    return table


def _place(results: Results, cell: Cell) -> int:
    """The reference first, then as they were run."""
    names = list(dict.fromkeys(one.technique for one in results.cells))
    return -1 if cell.technique == results.reference else names.index(cell.technique)


def _change(share: float) -> Text:
    better = share < -0.005
    words = "same" if abs(share) < 0.005 else f"{share:+.0%}"
    return Text(words, style="green" if better else "yellow" if share > 0.005 else "")


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    optional: Callable[[Any], Any] = lambda value: "" if value is None else value  # noqa: E731 - one line, used once
    for cell in results.cells:
        row: dict[str, Any] = {
            "technique": cell.technique,
            "batch_size": cell.batch_size,
            "micro_batch": cell.strategy.micro_batch,
            "accumulation": cell.strategy.accumulation,
            "outcome": cell.outcome,
            "reason": cell.reason,
            "wall_s": round(cell.wall_s, 1),
        }
        if cell.trained is not None:
            base = reference_of(results, cell.batch_size)
            memory, time = (None, None) if base is None else changes_of(cell.trained, base)
            row |= {"steps": cell.trained.num_steps, "memory_change": optional(memory), "time_change": optional(time)}
            row |= {name: optional(getattr(cell.trained, name)) for name in COLUMNS if hasattr(cell.trained, name)}
        yield row
