"""The command line as a user calls it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path


def autotune(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One call, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "autotune", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
        check=False,
    )


def called(*arguments: str | Path) -> int:
    """The same in this process, which spares the start of one; returns the exit status. Nothing is captured."""
    from autotune.cli import run

    return run([*map(str, arguments)])


def autotune_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``called``, with what it prints."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = called(*arguments)
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def refused(status: int, *arguments: str | Path) -> str:
    """The one line that a refused call prints, in a process of its own."""
    done = autotune(*arguments)
    return _only_line(status, done.returncode, done.stdout, done.stderr)


def refused_here(status: int, *arguments: str | Path) -> str:
    """The one line that a refused call prints, in this process."""
    done = autotune_here(*arguments)
    return _only_line(status, done.returncode, done.stdout, done.stderr)


def _only_line(status: int, returned: int, stdout: str, stderr: str) -> str:
    assert returned == status, stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    return lines[0]
