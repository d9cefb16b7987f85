"""What a study is: techniques (knobs that they set), batch sizes, steps. Read from TOML."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from autotune.errors import UsageError, at_fault, nearest
from autotune.strategy import Strategy, choices
from autotune.workloads.base import Recipe

SUFFIX = ".toml"
_ANY_RECIPE = Recipe(learning_rate=1.0, weight_decay=0.0, warmup_steps=0, clip_norm=None, global_batch=1, epochs=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Technique:
    """One column of the grid."""

    name: str
    knobs: dict[str, Any]
    recipe: dict[str, Any]
    """What it changes of the recipe."""

    def strategy(self, batch_size: int) -> Strategy:
        """At a batch size, which a technique that names its own micro batch does not need. Raises ValueError where its
        accumulation does not divide the batch size."""
        accumulation = self.knobs.get("accumulation", 1)
        if "micro_batch" not in self.knobs and batch_size % accumulation:
            raise ValueError(f"a batch of {batch_size} cannot be accumulated from {accumulation} equal parts")
        return msgspec.convert({"micro_batch": max(1, batch_size // accumulation), **self.knobs}, Strategy)

    def recipe_of(self, plain: Recipe) -> Recipe:
        """The workload's recipe with its changes."""
        return msgspec.convert({**msgspec.to_builtins(plain), **self.recipe}, Recipe)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """A study as declared."""

    name: str
    origin: str
    """What the user calls it by: a shipped one's name, or its file."""
    title: str
    model: str
    steps: int
    """Optimizer steps that every cell is trained for."""
    batch_sizes: tuple[int, ...]
    """Samples of a step; empty where the techniques name their own."""
    reference: str
    """The technique that the others are compared with."""
    techniques: tuple[Technique, ...]

    def cells(self) -> list[tuple[Technique, int]]:
        """Every technique at every batch size, small batches first."""
        if not self.batch_sizes:
            return [(technique, technique.strategy(1).global_batch) for technique in self.techniques]
        return [(technique, size) for size in self.batch_sizes for technique in self.techniques]


def shipped() -> dict[str, Path]:
    """The studies that come with autotune, by name."""
    folder = Path(__file__).parents[1] / "studies"
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def read_definition(wanted: str) -> Definition:
    """A shipped study by its name, or the one in a TOML file. Raises UsageError, on one line, for what is none."""
    path = shipped().get(wanted, Path(wanted))
    if path.suffix != SUFFIX:
        raise UsageError(f"no study is called {wanted!r}, and it is no {SUFFIX} file{nearest(wanted, list(shipped()))}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"study {path} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise UsageError(f"study {path} is not TOML: {exc}") from exc
    try:
        return _definition(path.stem, wanted, msgspec.convert(data, _File))
    except msgspec.ValidationError as exc:
        raise UsageError(f"study {path}{_words(exc, list(_File.__struct_fields__))}; README shows such a file") from exc
    except ValueError as exc:
        raise UsageError(f"study {path}: {exc}") from exc


def _words(error: Exception, known: list[str]) -> str:
    """Where a file is at fault, what is wrong, and what an unknown field might have been."""
    key, message = at_fault(error)
    words = f"{f', {key}' if key else ''}: {message}"
    found = re.search(r"unknown field `(\w+)`", message)
    if found is None:
        return words + (choices(key) if message.startswith("Invalid enum") else "")
    if "recipe" in known and found[1] in Recipe.__struct_fields__:
        return f"{words}; it belongs to the recipe: recipe = {{ {found[1]} = ... }}"
    return words + nearest(found[1], known)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    title: str
    model: str
    steps: int
    reference: str
    techniques: list[dict[str, Any]]
    batch_sizes: list[int] = []


def _definition(name: str, origin: str, file: _File) -> Definition:
    techniques = []
    for knobs in file.techniques:
        knobs = dict(knobs)
        techniques.append(Technique(name=knobs.pop("name", ""), recipe=knobs.pop("recipe", {}), knobs=knobs))
    names = [technique.name for technique in techniques]
    if "" in names or len(set(names)) < len(names):
        raise ValueError("every technique needs a name of its own")
    if file.reference not in names:
        raise ValueError(f"the reference {file.reference!r} is no technique{nearest(file.reference, names)}")
    if file.steps < 1 or any(size < 1 for size in file.batch_sizes):
        raise ValueError("steps and batch_sizes must be >= 1")
    for technique in techniques:
        if not file.batch_sizes and "micro_batch" not in technique.knobs:
            raise ValueError(f"technique {technique.name!r} needs a micro_batch, as there are no batch_sizes")
        if file.batch_sizes and "micro_batch" in technique.knobs:
            raise ValueError(f"technique {technique.name!r} has a micro_batch, and the study batch_sizes: drop one")
        try:
            for size in file.batch_sizes or [1]:
                idle = technique.strategy(size).idle
            technique.recipe_of(_ANY_RECIPE)
        except (msgspec.ValidationError, ValueError) as exc:
            words = _words(exc, [*Strategy.__struct_fields__, "recipe"])
            raise ValueError(f"technique {technique.name!r}{words}") from exc
        for knob, reason in idle.items():
            raise ValueError(f"technique {technique.name!r}: {knob} does nothing: {reason}")
        if technique.knobs.get("graphs", "none") != "none":
            raise ValueError(
                f"technique {technique.name!r}: a recorded step (graphs=step) has no phases to time; leave graphs out"
            )
    return Definition(
        name=name,
        origin=origin,
        title=file.title,
        model=file.model,
        steps=file.steps,
        batch_sizes=tuple(file.batch_sizes),
        reference=file.reference,
        techniques=tuple(techniques),
    )
