"""Folders of prepared data in the cache: made once, complete or not there at all, whoever else makes the same."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from autotune.errors import AutotuneError

T = TypeVar("T")


def prepared(folder: Path, make: Callable[[Path], None], load: Callable[[Path], T]) -> T:
    """What ``load`` reads from the folder, which ``make`` fills where ``load`` cannot read it yet.

    ``load`` raises AutotuneError for a folder that is not there, or damaged. Raises AutotuneError where the cache
    cannot be written.
    """
    with contextlib.suppress(AutotuneError):
        return load(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent, ignore_cleanup_errors=True) as making:
            draft = Path(making) / folder.name
            draft.mkdir()
            make(draft)
            return _published(draft, folder, load)
    except OSError as exc:
        raise AutotuneError(
            f"cannot write prepared data to {folder.parent}: {exc}; choose another cache folder with AUTOTUNE_CACHE"
        ) from exc


def _published(draft: Path, folder: Path, load: Callable[[Path], T]) -> T:
    """Moves a finished folder into place; one that another process has put there meanwhile is as good."""
    for _ in range(10):
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        else:
            return load(folder)
        with contextlib.suppress(AutotuneError):
            return load(folder)
        discarded = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
        with contextlib.suppress(OSError):
            folder.rename(discarded / folder.name)
        shutil.rmtree(discarded, ignore_errors=True)
    raise AutotuneError(f"{folder} cannot be replaced; delete it")
