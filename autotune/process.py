"""One function in a process of its own: started warm, listened to, and ended with everything it started.

Linux forks the child from a server that has torch imported and nothing computed (no thread pool, no device context),
so a start costs milliseconds; elsewhere the child is spawned. What the child writes to stderr goes to a file whose
tail explains a crash. Nothing here knows what the child does; what happens in it first is guard.py's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import math
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
from typing import Any, BinaryIO

import psutil

from autotune import guard
from autotune.contention import cpu_s
from autotune.errors import AutotuneError

STDERR_TAIL_LINES = 6
STDERR_TAIL_BYTES = 8192
MAX_STDERR_BYTES = 16 * 2**20
"""A child that floods its stderr loses all but the tail of it: a disk must not fill up with complaints."""
_BLOCK_BYTES = 512
"""What st_blocks counts, whatever the disk's blocks are (stat(2))."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_POLL_S = 0.1
_PRELOADED = [
    "torch",
    "torch._dynamo",  # what building an optimizer imports, 1.2 s
    "autotune.guard",
    "autotune.checks.compute",
    "autotune.trial.worker",
    "autotune.timing",
    "autotune.trace",
    "autotune.workloads",
]
"""Imported once by the server: a child has them from the start. None may start a thread or a device context."""
_MESSAGE_S = 20.0
"""For the rest of a message that has begun: a child that was stopped in its middle is killed."""
_STARTS = 5
_GUARD_S = 2.0
"""For the guard to end what the child has started."""


class ChildDied(Exception):
    """The child ended without saying it had finished. ``reason`` names the signal or the exit status."""

    def __init__(self, exit_code: int | None, stderr_tail: str, what: str | None = None) -> None:
        self.exit_code = exit_code
        self.was_killed = exit_code is not None and exit_code == -getattr(signal, "SIGKILL", 0) != 0
        """Whether by SIGKILL, as the kernel kills what takes the last of the memory."""
        self.stderr_tail = stderr_tail
        self.reason = (what or _exit_reason(exit_code)) + (f": {stderr_tail}" if stderr_tail else "")
        super().__init__(self.reason)


class Child:
    """``target(connection, *args)`` running in its own process and its own session.

    A context manager: leaving it ends the child and every process it started. ``target`` must be importable by name.
    Raises AutotuneError where the temporary folder cannot be written.
    """

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self._stderr = _temporary_file()
        try:
            self._process, self.connection = _started(target, str(self._stderr), args)
        except BaseException:
            self._stderr.unlink(missing_ok=True)
            raise
        self._root = psutil.Process(self._process.pid) if psutil.pid_exists(self._process.pid) else None
        self._worker: psutil.Process | None = None
        self._is_closed = False
        self._counted: list[psutil.Process] = []
        self._counted_at = -math.inf

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def scratch(self) -> Path:
        """Where the child may leave something for others to read; it goes when the child does."""
        return guard.scratch(self._stderr)

    @property
    def pid(self) -> int:
        """The process id of what runs the target."""
        deadline = time.monotonic() + _GUARD_S
        while (worker := self._working()) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        return int(self._process.pid if worker is None else worker.pid)

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
        self._cut_stderr()
        while not self.connection.poll(min(_POLL_S, max(0.0, deadline - time.monotonic()))):
            on_wait()
            self._cut_stderr()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no answer within {timeout_s:.0f} s")
        gave_up = threading.Event()

        def give_up() -> None:
            gave_up.set()
            self._kill_worker()

        patience = threading.Timer(_MESSAGE_S, give_up)
        patience.daemon = True
        patience.start()
        try:
            return self.connection.recv()
        except (EOFError, OSError) as exc:
            if gave_up.is_set():
                raise TimeoutError(f"a message was not finished within {_MESSAGE_S:.0f} s") from exc
            raise self._died() from exc
        except Exception as exc:
            what = f"sent what is no message ({type(exc).__name__})"
            raise ChildDied(None, self.stderr_tail(), what) from exc
        finally:
            patience.cancel()

    def memory_bytes(self) -> int:
        """The child's own resident memory, in bytes; zero once it is gone."""
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(self.pid).memory_info().rss)
        return 0

    def descendants_bytes(self) -> int:
        """What the processes that the child started share with nobody, in bytes: a loader worker is forked and shares
        nearly everything. Takes a look at every process there is."""
        total_bytes = 0
        for process in self._family():
            if process not in (self._root, self._worker):  # the guard shares all it has
                with contextlib.suppress(psutil.Error):
                    total_bytes += process.memory_full_info().uss
        return total_bytes

    def cpu_s(self) -> float:
        """CPU seconds that the child and all that it started have spent so far.

        Who belongs to it is looked up once a second at most: that takes a look at every process there is.
        """
        if time.monotonic() - self._counted_at > 1.0:
            self._counted, self._counted_at = self._family(), time.monotonic()
        return sum(cpu_s(process.pid) for process in self._counted)

    def stderr_tail(self) -> str:
        """The last lines that the child wrote to stderr, joined into one."""
        try:
            with self._stderr.open("rb") as file:
                file.seek(max(0, self._stderr.stat().st_size - STDERR_TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-STDERR_TAIL_LINES:])

    def close(self) -> None:
        """Kills the child's whole family, waits for it and removes its files. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        with _interrupts_deferred():
            self._kill_all()

    def _kill_all(self) -> None:
        family, worker = self._family(), self._working()
        if worker is not None and worker != self._root:
            self._kill_worker()
            self._process.join(_GUARD_S)  # the guard ends the rest, what was started this moment included
        groups = {self._process.pid, worker.pid if worker else self._process.pid}  # the guard's, and the worker's own
        kill_groups = [functools.partial(os.killpg, group, signal.SIGKILL) for group in groups]
        kill_all: list[Callable[[], object]] = [*kill_groups, *(process.kill for process in family)]
        for kill in kill_all:
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error, AttributeError):
                kill()
        self._process.join(5)
        psutil.wait_procs(family, timeout=5)
        self.connection.close()
        self._stderr.unlink(missing_ok=True)
        self.scratch.unlink(missing_ok=True)

    def _working(self) -> psutil.Process | None:
        """The process that runs the target: the guard's first child where there is a guard."""
        if self._worker is None and self._root is not None:
            if sys.platform != "linux":
                self._worker = self._root
            else:
                with contextlib.suppress(psutil.Error):
                    self._worker = min(self._root.children(), key=lambda process: process.pid, default=None)
        return self._worker

    def _kill_worker(self) -> None:
        worker = self._working()
        with contextlib.suppress(psutil.Error):
            if worker is not None:
                worker.kill()

    def _cut_stderr(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            status = self._stderr.stat()  # Windows says nothing of blocks
            if status.st_blocks * _BLOCK_BYTES > MAX_STDERR_BYTES:
                with self._stderr.open("rb+") as file:
                    _forget(file, status.st_size - STDERR_TAIL_BYTES)

    def _family(self) -> list[psutil.Process]:
        if self._root is None:
            return []
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return []

    def _died(self) -> ChildDied:
        self._process.join(_GUARD_S)
        return ChildDied(self._process.exitcode, self.stderr_tail())


def _forget(file: BinaryIO, num_bytes: int) -> None:
    """Gives the disk the space of the first bytes back; what is appended meanwhile stays (fallocate(2): a hole is
    punched, the size kept). Where there is no such call, the file is cut, and a line may be lost at that moment."""
    if sys.platform == "linux":
        fallocate = ctypes.CDLL(None).fallocate
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
        if fallocate(file.fileno(), _PUNCH_HOLE | _KEEP_SIZE, 0, num_bytes) == 0:
            return
    file.seek(num_bytes)
    tail = file.read(STDERR_TAIL_BYTES)
    file.truncate(0)  # the child appends: it goes on behind what is written here
    file.seek(0)
    file.write(tail)


def _temporary_file() -> Path:
    try:
        descriptor, path = tempfile.mkstemp(prefix="autotune-", suffix=".stderr")
    except OSError as exc:
        raise AutotuneError(
            f"no temporary file can be made: {exc.strerror or exc}; free some space there, or name another folder "
            "with TMPDIR"
        ) from exc
    os.close(descriptor)
    return Path(path)


def _started(target: Callable[..., None], stderr_path: str, args: tuple[Any, ...]) -> tuple[Any, Connection]:
    """The child's process and our end of its pipe. A server that was killed is started again."""
    context = _context()
    _quiet_resource_tracker()
    for attempt in range(_STARTS):
        ours, theirs = context.Pipe()
        process = context.Process(target=guard.entry, args=(theirs, stderr_path, target, args), daemon=False)
        try:
            with _without_main_module(), _interrupts_deferred():
                process.start()
            return process, ours
        except (EOFError, ConnectionError):
            ours.close()
            if attempt == _STARTS - 1:
                raise
            time.sleep(_POLL_S)  # it refuses before it can be waited for
        finally:
            theirs.close()
    raise AssertionError


def warm_up() -> None:
    """Has the server that children are forked from import what they need, while this process goes on; where there is no
    such server, nothing. It ends with this process, even in the middle of an import: it holds the same pipes.
    """
    if sys.platform != "linux":
        return
    from multiprocessing import forkserver

    _context()
    _quiet_resource_tracker()
    with _without_main_module(), _interrupts_deferred():
        forkserver.ensure_running()
    atexit.register(_end_server, os.getpid())


def _end_server(owner: int) -> None:
    if os.getpid() == owner:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                    child.terminate()


def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
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
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C waits until this is over. What is started meanwhile never hears it: Ctrl-C is the parent's to handle, and
    a blocked signal is inherited, from before a child can say anything itself."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_reason(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its pipe but did not exit"
    if exit_code < 0:
        try:
            return f"killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"killed by signal {-exit_code}"
    return f"exited with status {exit_code}"
