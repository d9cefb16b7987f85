"""Runs a study: every cell of its grid in a process of its own, on record as soon as it ends."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from autotune import __version__
from autotune.backends.base import Backend
from autotune.errors import AutotuneError
from autotune.files import save
from autotune.measurement import Outcome
from autotune.phases import Trained
from autotune.probe import Hardware
from autotune.search.memory import MemoryModel
from autotune.search.space import Space, build_space
from autotune.search.task import FREE_MEMORY_SHARE
from autotune.strategy import Strategy
from autotune.study.definition import Definition, Technique
from autotune.trial.runner import OnProgress, Session, TrialEndedError
from autotune.trial.worker import Job, Train
from autotune.units import format_bytes
from autotune.workloads.base import Workload, WorkloadRef

CELL_TIMEOUT_S = 7200.0
SILENCE_S = 900.0
EVAL_SAMPLES = 512
"""Samples of the test set, at most, that a cell's quality is judged by: the same for all."""
_TRIED_AGAIN: tuple[Outcome, ...] = ("timeout", "crashed")
"""What may have been the machine's fault."""
MAX_BATCH_STEPS = 2
BATCH_MULTIPLE = 8
"""The largest batch is looked for in multiples of this."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One technique at one batch size."""

    technique: str
    batch_size: int
    """Samples of an optimizer step."""
    strategy: Strategy
    recipe: dict[str, Any]
    """What the technique changes of the recipe."""
    outcome: Outcome
    reason: str = ""
    trained: Trained | None = None
    wall_s: float = 0.0

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory; None where it did not run."""
        return None if self.trained is None else self.trained.peak_memory_bytes


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The largest batch of a technique that was trained on without running out of memory."""

    technique: str
    knobs: dict[str, Any]
    """The technique's, when it was found."""
    batch_size: int | None
    """None where none was."""
    reason: str
    """What stopped it, or that the sequence of sizes ended there."""
    peak_memory_bytes: int | None = None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """A study as far as it is done, as on disk."""

    autotune: str
    name: str
    origin: str
    """What it was called by: a shipped study's name, or a file."""
    title: str
    model: str
    source: str
    limit: int | None
    """Of the samples of each split."""
    device: str
    fingerprint: str
    versions: dict[str, str]
    steps: int
    batch_sizes: tuple[int, ...]
    reference: str
    seed: int
    limit_bytes: int
    """What a cell may take of the memory."""
    cells: tuple[Cell, ...] = ()
    capacities: tuple[Capacity, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StudyTask:
    """What one study is about."""

    definition: Definition
    ref: WorkloadRef
    workload: Workload
    hardware: Hardware
    backend: Backend
    seed: int

    @functools.cached_property
    def limit_bytes(self) -> int:
        """What a cell may take: the machine is never driven into swap."""
        return int(FREE_MEMORY_SHARE * self.hardware.device.memory_free_bytes)

    @functools.cached_property
    def space(self) -> Space:
        """What this device can run."""
        return build_space(self.hardware, self.backend, self.workload, includes_slow=True, allows_approximate=True)

    def refusal(self, strategy: Strategy) -> str | None:
        """Why this device does not run the setting; None where it does."""
        space = self.space
        for knob in ("precision", "padding", "checkpoint", "compile", "compile_scope", "optimizer", "allocator"):
            value = getattr(strategy, knob)
            if value not in space.values[knob]:
                return space.left_out.get(f"{knob}={value}", f"{knob} {value} is not for this device or model")
        if (strategy.attention, strategy.precision) not in space.pairs:
            names = (f"attention={strategy.attention} in {strategy.precision}", f"attention={strategy.attention}")
            known = [space.left_out[name] for name in names if name in space.left_out]
            if known:
                return known[0]
        if strategy.global_batch > (count := len(self.workload.train.lengths)):
            return f"there are only {count} samples"
        return space.refusal(strategy)

    def job(self, technique: Technique, strategy: Strategy, steps: int) -> Job:
        """A cell's process."""
        return Job(
            workload=self.ref,
            strategy=strategy,
            backend=self.backend.name,
            memory_limit_bytes=None,
            seed=self.seed,
            recipe=technique.recipe_of(self.workload.recipe),
            total_steps=steps,
        )


class Observer:
    """What a study says as it goes."""

    def on_cell(self, technique: str, batch_size: int, place: int, count: int) -> None:
        """A cell starts."""

    def on_progress(self, step: int) -> None:
        """Steps that the cell has trained."""

    def on_cell_end(self, cell: Cell) -> None:
        """A cell ended."""

    def on_capacity(self, capacity: Capacity) -> None:
        """The largest batch of a technique is known."""


def run_study(
    task: StudyTask,
    path: Path,
    observer: Observer,
    *,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    finds_capacity: bool = False,
    is_fresh: bool = False,
) -> Results:
    """All cells but those that are on record at ``path`` already, which is kept up to date.

    ``only`` and ``skip`` name techniques. Raises AutotuneError where the record cannot be written.
    """
    results = _begin(task, path, is_fresh)
    definition = task.definition
    wanted = [t for t in definition.techniques if (not only or t.name in only) and t.name not in skip]
    cells = [(technique, size) for technique, size in definition.cells() if technique in wanted]
    done = {(cell.technique, cell.batch_size): cell for cell in results.cells}
    memory = MemoryModel()
    for cell in results.cells:
        memory.note(cell.strategy, cell.outcome, cell.peak_bytes)
    for place, (technique, size) in enumerate(cells, 1):
        if (technique.name, size) in done:
            continue
        observer.on_cell(technique.name, size, place, len(cells))
        cell = _cell(task, technique, size, memory, lambda progress: observer.on_progress(progress.step))
        memory.note(cell.strategy, cell.outcome, cell.peak_bytes)
        observer.on_cell_end(cell)
        results = msgspec.structs.replace(results, cells=(*results.cells, cell))
        write_results(results, path)
    known = {capacity.technique for capacity in results.capacities}
    for technique in wanted if finds_capacity else ():
        if technique.name not in known and definition.batch_sizes:
            capacity = _capacity(task, technique, max(definition.batch_sizes), memory)
            observer.on_capacity(capacity)
            results = msgspec.structs.replace(results, capacities=(*results.capacities, capacity))
            write_results(results, path)
    return results


def read_results(path: Path) -> Results:
    """A study's record. Raises AutotuneError for a file that is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as exc:
        raise AutotuneError(f"study {path} cannot be read: {exc.strerror or exc}") from exc
    except (msgspec.DecodeError, ValueError) as exc:
        raise AutotuneError(f"{path} is no study's record: {exc}") from exc


def write_results(results: Results, path: Path) -> None:
    """Writes the record, whole or not at all. Raises AutotuneError where it cannot be written."""
    save(path, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n", "study")


def _begin(task: StudyTask, path: Path, is_fresh: bool) -> Results:
    """What is on record of this very study, or nothing yet."""
    definition, device = task.definition, task.hardware.device
    new = Results(
        autotune=__version__,
        name=definition.name,
        origin=definition.origin,
        title=definition.title,
        model=task.ref.name,
        source=task.ref.source,
        limit=task.ref.limit,
        device=f"{device.name}, {device.architecture}",
        fingerprint=device.fingerprint,
        versions=device.versions,
        steps=definition.steps,
        batch_sizes=definition.batch_sizes,
        reference=definition.reference,
        seed=task.seed,
        limit_bytes=task.limit_bytes,
    )
    if is_fresh or not path.is_file():
        write_results(new, path)
        return new
    old = read_results(path)
    settings = {technique.name: technique for technique in definition.techniques}
    for field in ("model", "source", "limit", "fingerprint", "versions", "steps", "seed"):
        before, now = getattr(old, field), getattr(new, field)
        if before != now:
            raise AutotuneError(
                f"{path} is of a study with {field} {before}, this has {now}; --fresh starts anew, --output names "
                "another file"
            )
    kept = tuple(
        cell
        for cell in old.cells
        if cell.outcome not in _TRIED_AGAIN
        and cell.technique in settings
        and cell.strategy == settings[cell.technique].strategy(cell.batch_size)
        and cell.recipe == settings[cell.technique].recipe
    )
    known = tuple(
        found
        for found in old.capacities
        if found.technique in settings and found.knobs == settings[found.technique].knobs
    )
    return msgspec.structs.replace(new, cells=kept, capacities=known)


def _cell(task: StudyTask, technique: Technique, size: int, memory: MemoryModel, on_progress: OnProgress) -> Cell:
    strategy, start = technique.strategy(size), time.monotonic()

    def ended(outcome: Outcome, reason: str = "", trained: Trained | None = None) -> Cell:
        return Cell(
            technique=technique.name,
            batch_size=strategy.global_batch,
            strategy=strategy,
            recipe=technique.recipe,
            outcome=outcome,
            reason=reason,
            trained=trained,
            wall_s=time.monotonic() - start,
        )

    if (reason := task.refusal(strategy)) is not None:
        return ended("invalid", reason)
    if memory.is_over(strategy, task.limit_bytes):
        return ended("oom", "predicted from the smaller batches: not run")
    try:
        trained = _trained(task, technique, strategy, task.definition.steps, EVAL_SAMPLES, on_progress)
    except TrialEndedError as end:
        return ended(end.outcome, end.reason)
    return ended("ok", "", trained)


def _trained(
    task: StudyTask, technique: Technique, strategy: Strategy, steps: int, num_eval: int, on_progress: OnProgress
) -> Trained:
    job = task.job(technique, strategy, steps)
    with Session(job, memory_limit_bytes=task.limit_bytes, silence_s=SILENCE_S) as session:
        return session.train(
            Train(num_steps=steps, num_eval=num_eval), timeout_s=CELL_TIMEOUT_S, on_progress=on_progress
        )


def _capacity(task: StudyTask, technique: Technique, size: int, memory: MemoryModel) -> Capacity:
    """Doubles the batch while it runs, then halves the gap: sizes that what is known rules out are not run."""
    fits, over, peak_bytes, reason = 0, 0, None, ""
    part = technique.knobs.get("accumulation", 1)
    while True:
        strategy = technique.strategy(size)
        if (refused := task.refusal(strategy)) is not None:
            reason = refused
            break
        if memory.is_over(strategy, task.limit_bytes):
            over, reason = size, f"{size} is predicted to be over {format_bytes(task.limit_bytes)}"
        else:
            try:
                found = _trained(task, technique, strategy, MAX_BATCH_STEPS, 1, lambda _: None)
            except TrialEndedError as end:
                reason = f"{size}: {end.reason}"
                if end.outcome != "oom":
                    break
                over = size
                memory.note(strategy, "oom", None)
            else:
                fits, peak_bytes = size, found.peak_memory_bytes
                memory.note(strategy, "ok", peak_bytes)
        size = (fits + over) // 2 if over else 2 * fits
        size = max(part, size - size % (part * BATCH_MULTIPLE) or size - size % part)
        if size <= fits or (over and (size >= over or 8 * (over - fits) <= over)):
            break
    return Capacity(
        technique=technique.name,
        knobs=technique.knobs,
        batch_size=fits or None,
        reason=reason,
        peak_memory_bytes=peak_bytes,
    )


def reference_of(results: Results, batch_size: int) -> Trained | None:
    """The reference technique's figures at a batch size; None where it did not run."""
    cells: Sequence[Cell] = results.cells
    return next((c.trained for c in cells if (c.technique, c.batch_size) == (results.reference, batch_size)), None)
