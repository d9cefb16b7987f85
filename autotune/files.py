"""Files that are replaced whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from autotune.errors import AutotuneError


def replace_file(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Writes the file in one move, making its folder: readers see the old content or the new, never a part. ``content``
    may be what writes it.

    Raises OSError when the folder or the disk does not take it; an old file is then still intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False)  # noqa: SIM115
    temporary = Path(file.name)
    try:
        with file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: Path, content: bytes | Callable[[IO[bytes]], object], what: str) -> None:
    """``replace_file`` for a file of the user's. Raises AutotuneError, which calls it ``what``, where the folder or the
    disk does not take it."""
    try:
        replace_file(path, content)
    except OSError as exc:
        raise AutotuneError(f"{what} {path} cannot be written: {exc.strerror or exc}") from exc
