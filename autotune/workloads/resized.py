"""A built-in workload with another global batch: ``imdb@64``. Its profile is one of its own, as its training is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from autotune.workloads.base import Recipe, Workload, WorkloadRef

if TYPE_CHECKING:
    from autotune.workloads import WorkloadModule


@dataclasses.dataclass(frozen=True)
class Resized:
    """What a workload module provides; all else of the recipe is the plain workload's, the learning rate too."""

    name: str
    plain: WorkloadModule
    global_batch: int

    @property
    def RECIPE(self) -> Recipe:  # noqa: N802 - as modules name it
        """The plain workload's, with this global batch."""
        return msgspec.structs.replace(self.plain.RECIPE, global_batch=self.global_batch)

    def prepare(self, data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
        """The plain workload's data."""
        ref = self.plain.prepare(data, limit=limit, on_progress=on_progress)
        return msgspec.structs.replace(ref, name=self.name)

    def open_workload(self, ref: WorkloadRef) -> Workload:
        """The plain workload under this name and recipe."""
        return dataclasses.replace(self.plain.open_workload(ref), name=self.name, recipe=self.RECIPE)
