"""The child's side of a child process: who ends whom, and where its output goes. The parent's side is process.py.

On Linux the child forks once more. The first process stays behind as a guard: the second one works, and whatever that
one leaves running when it ends, in a session of its own or not, becomes the guard's and is killed. The guard then ends
as the worker did, so that the parent sees the worker's signal or exit status.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def entry(connection: Connection, stderr_path: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Runs ``target(connection, *args)`` out of the terminal's reach, its output in a file, dead when its parent is."""
    if hasattr(os, "setsid"):
        with contextlib.suppress(PermissionError):
            os.setsid()
    file = os.open(stderr_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.dup2(file, 1)
    os.close(file)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # gigabytes, for a crash that is on record already
        _be_killed_first()
        _leave_a_guard(connection, stderr_path)
    else:
        _die_with_parent()
    target(connection, *args)


def scratch(stderr_path: Path) -> Path:
    """A file of the child's own beside its stderr."""
    return stderr_path.with_suffix(".scratch")


def _be_killed_first() -> None:
    """Where the machine runs out of memory all the same, the kernel takes this process and no one else's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _leave_a_guard(connection: Connection, stderr_path: str) -> None:
    """Returns in the worker; the guard never leaves.

    The guard also ends the worker when the process that asked for it is gone, killed without a word included: it can
    even where the worker is stopped, or hangs in native code.
    """
    prctl = _prctl()
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)
        os.setpgid(0, 0)  # what it starts can be paused with it, and the guard is not
        return
    connection.close()
    threading.Thread(target=_outlive_nobody, args=(worker, stderr_path), daemon=True).start()
    status = _wait_for(worker)
    _end_descendants()
    if os.WIFSIGNALED(status):
        _die_of(os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _outlive_nobody(worker: int, stderr_path: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    with contextlib.suppress(OSError):
        os.kill(worker, signal.SIGKILL)
    for path in (Path(stderr_path), scratch(Path(stderr_path))):
        with contextlib.suppress(OSError):
            path.unlink()


def _wait_for(worker: int) -> int:
    while True:
        pid, status = os.wait()  # orphans too
        if pid == worker:
            return status


def _end_descendants() -> None:
    """Kills generation after generation: what a killed process leaves becomes this one's child."""
    import psutil

    while True:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        try:
            os.wait()
        except ChildProcessError:
            return


def _die_of(number: int) -> None:
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _prctl() -> Callable[[int, int], int]:
    import ctypes

    call: Callable[..., int] = ctypes.CDLL(None).prctl
    return lambda option, value: call(option, ctypes.c_ulong(value), 0, 0, 0)


def _die_with_parent() -> None:
    """Where there is no guard: ends this process and its group when the one that asked for it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="autotune-lifeline").start()
