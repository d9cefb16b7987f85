"""A recorded grid: every setting of a product of knobs, measured on one device by the trial runner.

The table is JSON lines, compressed: the first says what was recorded where, each of the others is a Record. It is
replaced whole after every trial, so that recording can be interrupted at any time and goes on where it was.
"""

from __future__ import annotations

import itertools
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from autotune.files import replace_file
from autotune.measurement import Trial
from autotune.probe import Hardware
from autotune.search.objective import PlannedRun
from autotune.search.space import Space
from autotune.strategy import Padding, Strategy

FOLDER = Path(__file__).parent / "grids"

PRODUCTS: dict[tuple[str, str], tuple[dict[str, tuple[Any, ...]], ...]] = {
    ("imdb", "cpu"): (
        {
            "micro_batch": (4, 8, 16, 32),
            "attention": ("eager", "sdpa"),
            "precision": ("bf16", "fp16"),
            "padding": ("max", "longest", "buckets", "packed"),
            "allocator": ("default", "retain"),
            "checkpoint": ("none", "every_2nd"),
        },
        {
            "micro_batch": (8, 32),
            "attention": ("eager", "sdpa"),
            "precision": ("fp32",),
            "padding": ("max", "longest", "buckets", "packed"),
            "allocator": ("default", "retain"),
        },
        {
            "micro_batch": (4, 8, 16, 32),
            "attention": ("eager", "sdpa"),
            "precision": ("bf16", "fp16"),
            "padding": ("longest", "buckets"),
            "allocator": ("retain",),
            "checkpoint": ("none",),
            "compile": ("default",),
        },
        {
            "micro_batch": (4, 8, 16, 32),
            "attention": ("eager", "sdpa", "sdpa_math"),
            "precision": ("bf16",),
            "padding": ("longest", "buckets", "packed"),
            "allocator": ("default", "retain"),
            "optimizer": ("default", "foreach", "fused"),
        },
        {
            "micro_batch": (1, 2),
            "attention": ("eager", "sdpa"),
            "precision": ("bf16",),
            "padding": ("longest", "buckets", "packed"),
            "allocator": ("default", "retain"),
        },
        {
            "micro_batch": (8, 32),
            "attention": ("eager", "sdpa"),
            "precision": ("bf16",),
            "padding": ("buckets", "packed"),
            "allocator": ("retain",),
            "workers": (1, 2),
        },
        {
            "micro_batch": (16, 32),
            "attention": ("eager", "sdpa"),
            "precision": ("bf16",),
            "padding": ("buckets", "packed"),
            "allocator": ("retain",),
            "checkpoint": ("selective", "every_block"),
        },
    ),
    ("imdb", "cpu in fp32"): (
        {
            "micro_batch": (4, 8, 16, 32),
            "attention": ("eager", "sdpa"),
            "precision": ("fp32",),
            "padding": ("max", "longest", "buckets", "packed"),
            "allocator": ("default", "retain"),
            "checkpoint": ("none", "every_2nd"),
        },
        {
            "micro_batch": (4, 8, 16, 32),
            "attention": ("eager", "sdpa", "sdpa_math", "sdpa_flash"),
            "precision": ("fp32",),
            "padding": ("longest", "buckets", "packed"),
            "allocator": ("default", "retain"),
            "optimizer": ("default", "foreach", "fused"),
        },
        {
            "micro_batch": (2,),
            "attention": ("eager", "sdpa"),
            "precision": ("fp32",),
            "padding": ("longest", "buckets", "packed"),
            "allocator": ("default", "retain"),
            "optimizer": ("default", "fused"),
        },
        {
            "micro_batch": (4, 8, 16, 32),
            "attention": ("eager", "sdpa"),
            "precision": ("fp32",),
            "padding": ("longest", "buckets"),
            "allocator": ("retain",),
            "compile": ("default",),
        },
    ),
    ("imdb", "cuda"): (
        {
            "micro_batch": (32,),
            "attention": ("eager", "sdpa", "sdpa_efficient", "sdpa_cudnn"),
            "precision": ("tf32", "bf16"),
            "padding": ("max", "buckets", "packed"),
            "optimizer": ("fused",),
            "graphs": ("none", "step"),
        },
        {
            "micro_batch": (32,),
            "attention": ("sdpa",),
            "precision": ("tf32", "bf16"),
            "padding": ("max", "buckets", "packed"),
            "optimizer": ("fused",),
            "compile": ("default",),
            "compile_scope": ("blocks",),
            "graphs": ("step",),
        },
        {
            "micro_batch": (16,),
            "attention": ("sdpa",),
            "precision": ("tf32", "bf16"),
            "padding": ("max", "buckets"),
            "optimizer": ("fused",),
            "graphs": ("none", "step"),
        },
        {
            "micro_batch": (32,),
            "attention": ("sdpa",),
            "precision": ("bf16",),
            "padding": ("max", "buckets"),
            "optimizer": ("fused",),
            "graphs": ("step",),
            "workers": (1, 2),
        },
        {"micro_batch": (32,)},
    ),
}
"""By model and kind of device: the products of knob values that are recorded, as far as the device has them; knobs that
are not named stay plain."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded, and where."""

    model: str
    source: str
    hardware: Hardware
    planned: PlannedRun
    seed: int
    pulse: int = 1
    """The fixed work by which it was taken (trial/pulse.py)."""
    tokens: dict[Padding, dict[int, float]] = {}
    """That a sample takes on average, by padding and micro batch: what a search knows without a trial."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One trial, and what it said on its way: by it a replay knows what giving it up would have cost."""

    trial: Trial
    laps: tuple[tuple[float, float], ...]
    """Seconds since its start, and samples a second by then, at each lap."""


class Grid:
    """A table on disk."""

    def __init__(self, path: Path, header: Header, records: list[Record]) -> None:
        self.path, self.header, self.records = path, header, records

    def add(self, record: Record) -> None:
        """Takes in a trial and saves the table."""
        self.records.append(record)
        lines = [msgspec.json.encode(part) for part in (self.header, *self.records)]
        replace_file(self.path, lzma.compress(b"\n".join(lines) + b"\n"))


def read_grid(path: Path) -> Grid:
    """A recorded table. Raises OSError, or msgspec.ValidationError where it is none."""
    first, *rest = lzma.decompress(path.read_bytes()).splitlines()
    records = [msgspec.json.decode(line, type=Record) for line in rest]
    return Grid(path, msgspec.json.decode(first, type=Header), records)


def products_of(model: str, kind: str, space: Space) -> tuple[dict[str, tuple[Any, ...]], ...]:
    """What is recorded on a device with such a space. Raises KeyError where nothing is laid out."""
    is_single = kind == "cpu" and space.values["precision"] == ("fp32",)
    return PRODUCTS[model, "cpu in fp32" if is_single else kind]


def settings_of(space: Space, products: tuple[dict[str, tuple[Any, ...]], ...]) -> list[Strategy]:
    """The settings of some products that a search of this space may try, each once."""
    return list(dict.fromkeys(_settings(space, products)))


def _settings(space: Space, products: tuple[dict[str, tuple[Any, ...]], ...]) -> Iterator[Strategy]:
    plain = {knob: values[0] for knob, values in space.values.items()}
    for product in products:
        for chosen in itertools.product(*product.values()):
            named = dict(zip(product, chosen, strict=True))
            if all(value in space.values[knob] for knob, value in named.items()):
                strategy = space.strategy({**plain, **named})
                if space.refusal(strategy) is None:
                    yield strategy
