"""One function in a process of its own: started warm, listened to, and ended with everything it started.

Linux forks the child from a server that has torch imported and nothing computed (no thread pool, no device context),
so a start costs milliseconds; elsewhere the child is spawned. What the child writes to stderr goes to a file whose
tail explains a crash. Nothing here knows what the child does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

STDERR_TAIL_LINES = 6
_POLL_S = 0.1


class ChildDied(Exception):
    """The child ended without saying it had finished. ``reason`` names the signal or the exit status."""

    def __init__(self, exit_code: int | None, stderr_tail: str) -> None:
        self.exit_code = exit_code
        self.stderr_tail = stderr_tail
        self.reason = _exit_reason(exit_code) + (f": {stderr_tail}" if stderr_tail else "")
        super().__init__(self.reason)


class Child:
    """``target(connection, *args)`` running in its own process and its own process group.

    A context manager: leaving it ends the child and every process it started. ``target`` must be importable by name.
    """

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = _context()
        _quiet_resource_tracker()
        descriptor, path = tempfile.mkstemp(prefix="autotune-", suffix=".stderr")
        os.close(descriptor)
        self._stderr = Path(path)
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_entry, args=(theirs, str(self._stderr), target, args), daemon=False)
        with _without_main_module(), _interrupts_ignored():
            self._process.start()
        theirs.close()
        self._tree = psutil.Process(self.pid) if psutil.pid_exists(self.pid) else None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The child's process id."""
        pid: int = self._process.pid
        return pid

    def send(self, message: object) -> None:
        """Sends a picklable message. Raises ChildDied when nobody listens any more."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise self._died() from exc

    def receive(self, timeout_s: float, on_wait: Callable[[], None] = lambda: None) -> Any:
        """The child's next message. ``on_wait`` is called about ten times a second while there is none.

        Raises TimeoutError after ``timeout_s``, ChildDied when the child ended instead of answering.
        """
        deadline = time.monotonic() + timeout_s
        while not self.connection.poll(min(_POLL_S, max(0.0, deadline - time.monotonic()))):
            on_wait()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no answer within {timeout_s:.0f} s")
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError, OSError) as exc:
            raise self._died() from exc

    def memory_bytes(self) -> int:
        """Memory of the child and all it started, in bytes: its own resident memory, and of its descendants what they
        share with nobody (a loader worker is forked and shares nearly everything)."""
        total_bytes = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                is_child = process.pid == self.pid
                total_bytes += process.memory_info().rss if is_child else process.memory_full_info().uss
        return total_bytes

    def stderr_tail(self) -> str:
        """The last lines that the child wrote to stderr, joined into one."""
        try:
            with self._stderr.open("rb") as file:
                file.seek(max(0, self._stderr.stat().st_size - 8192))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-STDERR_TAIL_LINES:])

    def close(self) -> None:
        """Kills the child's whole family, waits for it and removes its files. Safe to call twice."""
        family = self._family()
        for kill in (lambda: os.killpg(self.pid, signal.SIGKILL), *(process.kill for process in family)):
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
                kill()
        self._process.join(5)
        psutil.wait_procs(family, timeout=5)
        self.connection.close()
        self._stderr.unlink(missing_ok=True)

    def _family(self) -> list[psutil.Process]:
        if self._tree is None:
            return []
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.Error:
            return []

    def _died(self) -> ChildDied:
        self._process.join(5)
        return ChildDied(self._process.exitcode, self.stderr_tail())


def _entry(connection: Connection, stderr_path: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """In the child: out of the terminal's reach, stderr to its file, dead when its parent is."""
    if hasattr(os, "setsid"):
        with contextlib.suppress(PermissionError):
            os.setsid()
    _die_with_parent()
    file = os.open(stderr_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.dup2(file, 1)
    target(connection, *args)


def _die_with_parent() -> None:
    """Ends this process and its group when the process that asked for it is gone, killed without a word included."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="autotune-lifeline").start()


def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "autotune.process"])
    return context


def _quiet_resource_tracker() -> None:
    """Children are killed by design; what they leave registered is cleaned up at exit without a word about it."""
    if sys.platform == "win32":
        return
    from multiprocessing import resource_tracker

    with _environment(PYTHONWARNINGS="ignore"):
        resource_tracker.ensure_running()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """The child must not run the user's script again, guarded by ``if __name__ == "__main__"`` or not."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C is the parent's to handle. Children inherit that it is ignored, from before they can say so themselves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit_reason(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its pipe but did not exit"
    if exit_code < 0:
        try:
            return f"killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"killed by signal {-exit_code}"
    return f"exited with status {exit_code}"
