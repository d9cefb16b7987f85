"""A study's plots as PNG files, by matplotlib: memory and speed by batch size, their trade-off, and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.errors import UsageError
from autotune.report.study import changes_of
from autotune.study.runner import Cell, Results, reference_of
from autotune.units import GIB

SIZE_INCHES, DPI = (8.0, 4.8), 150


def check_installed() -> None:
    """Raises UsageError where matplotlib is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plots needs matplotlib: pip install 'autotune-torch[report]'") from None


def study_plots(results: Results, folder: Path) -> list[Path]:
    """Draws all into the folder, the fifth where the study has windowed attention; returns the files. Raises UsageError
    where matplotlib is missing or nothing was measured."""
    check_installed()
    from matplotlib.figure import Figure

    cells = [cell for cell in results.cells if cell.trained is not None]
    if not cells:
        raise UsageError("nothing was measured: there is nothing to plot")
    folder.mkdir(parents=True, exist_ok=True)
    largest = max(cell.batch_size for cell in cells)
    drawings: dict[str, Callable[[Any], None]] = {
        "1_memory_vs_batch_size": lambda figure: _lines(figure, cells, "peak memory, GiB", _memory),
        "2_speed_vs_batch_size": lambda figure: _lines(figure, cells, "samples a second", _speed),
        "3_memory_speed_tradeoff": lambda figure: _tradeoff(figure, cells),
        f"4_technique_comparison_bs{largest}": lambda figure: _comparison(figure, cells, largest),
        "5_window_size_comparison": lambda figure: _windows(figure, cells),
        "6_memory_savings_vs_baseline": lambda figure: _savings(figure, results, cells),
    }
    if not any(_is_windowed(cell) for cell in cells):
        del drawings["5_window_size_comparison"]
    paths = []
    for name, draw in drawings.items():
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        draw(figure)
        figure.suptitle(f"{results.title} · {results.model} · {results.device.split(',')[0]}", fontsize=9, color="0.4")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DPI)
        paths.append(path)
    return paths


def _memory(cell: Cell) -> float:
    assert cell.trained is not None
    return cell.trained.peak_memory_bytes / GIB


def _speed(cell: Cell) -> float:
    assert cell.trained is not None
    return cell.trained.samples_per_s


def _quality(cell: Cell) -> float:
    assert cell.trained is not None
    found = cell.trained
    return found.test_loss if found.perplexity is None else found.perplexity


def _names(cells: list[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.technique for cell in cells))


def _lines(figure: Any, cells: list[Cell], title: str, value: Callable[[Cell], float]) -> None:
    axes = figure.add_subplot()
    for name in _names(cells):
        points = sorted((cell.batch_size, value(cell)) for cell in cells if cell.technique == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="batch size", ylabel=title, xticks=sorted({cell.batch_size for cell in cells}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _tradeoff(figure: Any, cells: list[Cell]) -> None:
    axes = figure.add_subplot()
    for name in _names(cells):
        found = [cell for cell in cells if cell.technique == name]
        axes.scatter([_memory(cell) for cell in found], [_speed(cell) for cell in found], label=name)
        for cell in found:
            axes.annotate(
                str(cell.batch_size),
                (_memory(cell), _speed(cell)),
                fontsize=7,
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.set(xlabel="peak memory, GiB", ylabel="samples a second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _comparison(figure: Any, cells: list[Cell], batch_size: int) -> None:
    found = [cell for cell in cells if cell.batch_size == batch_size]
    quality = (
        "perplexity" if any(cell.trained and cell.trained.perplexity is not None for cell in found) else "test loss"
    )
    panels = {"peak memory, GiB": _memory, "samples a second": _speed, quality: _quality}
    for place, (title, value) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, 3, place)
        axes.barh([cell.technique for cell in found], [value(cell) for cell in found], color=f"C{place - 1}")
        axes.invert_yaxis()
        axes.set_title(f"{title}, batch {batch_size}", fontsize=9)
        axes.tick_params(labelsize=7)
        if place > 1:
            axes.set_yticks([])


def _is_windowed(cell: Cell) -> bool:
    return cell.strategy.attention.startswith("window")


def _windows(figure: Any, cells: list[Cell]) -> None:
    """Windowed attention beside full attention in the same precision."""
    found = [cell for cell in cells if _is_windowed(cell)]
    precisions = {cell.strategy.precision for cell in found}
    full = [
        c for c in cells if c not in found and c.strategy.precision in precisions and c.strategy.attention != "eager"
    ]
    for place, (title, value) in enumerate(
        {"peak memory, GiB": _memory, "samples a second": _speed, "quality": _quality}.items(), 1
    ):
        axes = figure.add_subplot(1, 3, place)
        for name in _names(full + found):
            points = sorted((cell.batch_size, value(cell)) for cell in full + found if cell.technique == name)
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel="batch size")
        axes.set_title("perplexity or test loss" if title == "quality" else title, fontsize=9)
        axes.grid(alpha=0.3)
        if place == 1:
            axes.legend(fontsize=7)


def _savings(figure: Any, results: Results, cells: list[Cell]) -> None:
    axes = figure.add_subplot()
    sizes = sorted({cell.batch_size for cell in cells})
    names = [name for name in _names(cells) if name != results.reference]
    for number, name in enumerate(names):
        bars = []
        for place, size in enumerate(sizes):
            base = reference_of(results, size)
            cell = next((one for one in cells if (one.technique, one.batch_size) == (name, size)), None)
            if base is not None and cell is not None and cell.trained is not None:
                bars.append((place + 0.8 * (number + 0.5) / len(names) - 0.4, -100 * changes_of(cell.trained, base)[0]))
        if bars:
            axes.bar(*zip(*bars, strict=True), width=0.8 / len(names), label=name)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="batch size", ylabel=f"% less peak memory than {results.reference}")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.grid(alpha=0.3, axis="y")
    if names:
        axes.legend(fontsize=8)
