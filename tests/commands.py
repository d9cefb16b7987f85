"""The command line as a user calls it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock


def autotune(*arguments: str | Path, module: str = "autotune", **environment: str) -> subprocess.CompletedProcess[str]:
    """One call, to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
        check=False,
    )


def briefly(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same, but that a search's timings are short."""
    return autotune(*arguments, module="tests.brief")


def called(*arguments: str | Path) -> int:
    """The same in this process, which spares the start of one; returns the exit status. Nothing is captured."""
    from autotune.cli import run

    return run([*map(str, arguments)])


def heard(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, and what it says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.dict(os.environ, environment):
        status = called(*arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def refused(status: int, *arguments: str | Path, **environment: str) -> str:
    """The one line that a refused call prints."""
    done = heard(*arguments, **environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines: list[str] = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]
