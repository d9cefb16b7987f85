"""The built-in workloads by name: prepared once, opened in any process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from autotune.errors import UsageError, nearest
from autotune.workloads import imdb
from autotune.workloads.base import Recipe, Workload, WorkloadRef


class WorkloadModule(Protocol):
    """What a module of this package provides."""

    RECIPE: Recipe

    def prepare(self, data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
        """Makes the data ready on disk, reporting each stage."""

    def open_workload(self, ref: WorkloadRef) -> Workload:
        """The prepared workload, in milliseconds."""


REGISTRY: dict[str, WorkloadModule] = {"imdb": imdb}


def get(name: str) -> WorkloadModule:
    """The workload of that name, or ``package.module:object`` that provides what a workload module does.

    Raises UsageError with the nearest name.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found: WorkloadModule = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as exc:
            raise UsageError(f"no workload can be imported as {name!r}: {exc}") from exc
        return found
    if name not in REGISTRY:
        raise UsageError(f"no workload is called {name!r}{nearest(name, list(REGISTRY))}")
    return REGISTRY[name]


def open_workload(ref: WorkloadRef) -> Workload:
    """A prepared workload, opened in this process."""
    return get(ref.name).open_workload(ref)
