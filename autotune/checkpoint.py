"""A training's state on disk: replaced whole or not at all, and only gone on with by the training that it is of."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import torch

from autotune.errors import AutotuneError
from autotune.files import save
from autotune.strategy import Strategy
from autotune.workloads.base import Recipe

FORMAT = 1
CHECKPOINT_FILE, BEST_FILE = "checkpoint.pt", "best.pt"
"""What to go on from; the weights of the epoch with the lowest test loss."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the command was told, for the one that goes on."""

    data: str | None
    limit: int | None
    profile: str | None
    """The profile's file; None where none was trained with."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """All that the losses depend on but the machine."""

    workload: str
    num_parameters: int
    source: str
    content: str
    """The prepared data's folder, whose name is made from what is in it."""
    num_train: int
    recipe: Recipe
    epochs: int
    """That the schedule is for."""
    strategy: Strategy
    seed: int


def write_checkpoint(path: Path, identity: Identity, told: Told, state: dict[str, Any]) -> None:
    """Writes the state. Raises AutotuneError where the disk does not take it; an old one is then still there."""
    words = {"identity": msgspec.to_builtins(identity), "told": msgspec.to_builtins(told)}
    write_tensors(path, {"format": FORMAT, **words, **state})


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Writes what ``torch.load`` reads, whole or not at all. Raises AutotuneError where the disk does not take it."""
    try:
        save(path, lambda file: torch.save(content, file), "checkpoint")
    except RuntimeError as exc:  # torch's writer has an error of its own for a full disk
        raise AutotuneError(f"checkpoint {path} cannot be written: {str(exc).splitlines()[0]}") from exc


def read_checkpoint(path: Path) -> tuple[Identity, Told, dict[str, Any]]:
    """Whose it is, what its command was told, and the state. Raises AutotuneError for a file that is none."""
    if path.is_dir():
        path = path / CHECKPOINT_FILE
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # what is not asked for is not read
        if whole.pop("format") != FORMAT:
            raise AutotuneError(f"checkpoint {path} is of another autotune; train anew")
        identity = msgspec.convert(whole.pop("identity"), Identity)
        return identity, msgspec.convert(whole.pop("told"), Told), whole
    except FileNotFoundError:
        raise AutotuneError(
            f"there is no checkpoint {path}; --resume takes a run's folder, such as runs/imdb-..."
        ) from None
    except AutotuneError:
        raise
    except Exception as exc:  # a damaged file fails in a dozen ways
        raise AutotuneError(f"checkpoint {path} cannot be read: {str(exc).splitlines()[0]}") from exc


def newest_checkpoint(folder: Path, workload: str) -> Path:
    """The run of a workload that was saved last, of those in the folder. Raises AutotuneError where there is none."""
    found = sorted(folder.glob(f"*/{CHECKPOINT_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        with contextlib.suppress(AutotuneError):
            if read_checkpoint(path)[0].workload == workload:
                return path
    raise AutotuneError(f"there is no run of {workload} in {folder} to resume; --resume takes a run's folder")


def difference(saved: Identity, wanted: Identity) -> str | None:
    """How a training differs from the one that a checkpoint is of; None where it does not."""
    for field in saved.__struct_fields__:
        before, now = getattr(saved, field), getattr(wanted, field)
        if isinstance(before, Strategy | Recipe) and before != now:
            parts = [part for part in before.__struct_fields__ if getattr(before, part) != getattr(now, part)]
            changes = (f"{part} was {getattr(before, part)}, and is {getattr(now, part)}" for part in parts)
            return f"its {field}'s {'; '.join(changes)}"
        if before != now:
            return f"{field} was {before}, and is {now}"
    return None
