"""Takes the device's pulse: a fixed piece of work, timed again and again in a process that lives through the search.

On a CPU under Linux what is timed is paused for it several times a second (SIGSTOP to its process group, SIGCONT), and
goes on none the wiser: nothing else tells as well how fast the machine was just then. Elsewhere the work is timed
before and after, which says less. What follows from it is pace.py's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

from autotune import backends
from autotune.backends.base import Backend, torch_device
from autotune.errors import AutotuneError
from autotune.pace import Beat, written
from autotune.process import Child, ChildDied

_PERIOD_S = 0.35
"""From the end of one beat to the next."""
_SETTLE_S = 0.001
"""For all threads of what is paused to leave the cores."""
_PIECE_S = 0.02
"""A piece of work is done as often as fills this: on a fast device a single one would measure how it is launched."""
_START_S, _ANSWER_S = 60.0, 20.0
WORK = 2
"""Which work it is: the beats of another cannot be compared."""


class Pulse:
    """A context manager; leaving it ends the process."""

    def __init__(self, backend_name: str) -> None:
        self._backend_name = backend_name
        self._child: Child | None = None
        self._paused: int | None = None
        self.is_on_host = backends.get(backend_name).is_host_memory
        """Whether the device is the host's own processor."""
        self.pauses = sys.platform == "linux" and self.is_on_host
        """Whether what is timed can be paused for it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._child is not None:
            self._child.close()
        self._child = None
        self._let_go()

    def beat(self) -> float | None:
        """Seconds that the fixed work takes now; None where it could not be measured, as on a full device."""
        try:
            seconds: float = self._ask("beat")
            return seconds
        except (ChildDied, TimeoutError):
            self.close()
            return None

    def file(self) -> str | None:
        """Starts its process, where there is none, and says where that writes the beats for which something is paused;
        None where nothing can be."""
        if not self.pauses:
            return None
        try:
            return str(self._start().scratch)
        except AutotuneError:
            return None

    @contextlib.contextmanager
    def pausing(self, group: int, file: str | None) -> Iterator[None]:
        """Meanwhile the process group is paused for a beat several times a second. Not where it reads another file than
        the beats would now be written to, as another process takes them: it could not tell a pause from its work."""
        if file is None or file != self.file():
            yield
            return
        try:
            child = self._start()
            child.send((group, str(child.scratch)))
            self._paused = group
        except ChildDied:
            self.close()
        try:
            yield
        finally:
            if self._paused is not None:
                try:
                    self._ask(None)
                    self._paused = None
                except (ChildDied, TimeoutError):
                    self.close()

    def check(self) -> None:
        """Lets what is paused go on where the process that should do so has died."""
        if self._paused is not None and self._child is not None and self._child.connection.poll():
            self.close()

    def cpu_s(self) -> float:
        """CPU seconds that it has spent so far."""
        return self._child.cpu_s() if self._child else 0.0

    def _start(self) -> Child:
        if self._child is None:
            self._child = Child(_serve, self._backend_name, self.pauses)
        return self._child

    def _ask(self, message: object) -> Any:
        timeout_s = _ANSWER_S if self._child else _START_S
        child = self._start()
        child.send(message)
        return child.receive(timeout_s)

    def _let_go(self) -> None:
        if self._paused is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._paused, signal.SIGCONT)
        self._paused = None


def _serve(connection: Connection, backend_name: str, pauses: bool) -> None:
    work = _paused_work() if pauses else _unpaused_work(backends.get(backend_name))
    work.seconds()
    paused: tuple[int, str] | None = None
    next_s = 0.0
    while True:
        try:
            if connection.poll(max(0.0, next_s - time.monotonic()) if paused else None):
                paused = message if isinstance(message := connection.recv(), tuple) else None
                if message == "beat":
                    connection.send(work.seconds())
                elif message is None:
                    connection.send(None)
            elif paused is not None:
                if not _beat_paused(*paused, work.seconds):
                    paused = None
                next_s = time.monotonic() + _PERIOD_S
        except EOFError:
            return


def _beat_paused(group: int, path: str, seconds: Callable[[], float]) -> bool:
    """False where the beat could not be written. It is written while what will read it stands still."""
    start_s = time.perf_counter()
    try:
        os.killpg(group, signal.SIGSTOP)
    except OSError:
        return True  # its process has ended, or is about to begin
    try:
        time.sleep(_SETTLE_S)
        found_s = seconds()
        with Path(path).open("ab", buffering=0) as file:
            file.write(written(Beat(start_s, time.perf_counter(), found_s)))
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGCONT)
    return True


class _Work(NamedTuple):
    """Pieces of work, and how often each is done."""

    pieces: dict[Callable[[], object], int]
    repeats: int = 1
    synchronize: Callable[[], None] = lambda: None

    def seconds(self) -> float:
        """That a piece takes, on average. Each is done once before it is timed: what it costs to wake threads and
        caches differs from process to process, by a fifth."""
        return statistics.geometric_mean(self.piece_s(piece, times) for piece, times in self.pieces.items())

    def piece_s(self, piece: Callable[[], object], times: int) -> float:
        """Of several repeats the median."""
        piece()
        found = []
        for _ in range(self.repeats):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                piece()
            self.synchronize()
            found.append((time.perf_counter() - start) / times)
        return statistics.median(found)


def _unpaused_work(backend: Backend) -> _Work:
    """Adding to more memory than the caches hold, and a softmax: timed before and after training they follow it better
    than matmuls do (docs/LOG.md, 2026-11-21)."""
    import torch

    scores = torch.randn(32, 512, 512, device=torch_device(backend))
    flat = scores.view(-1)
    once = _Work(dict.fromkeys((lambda: flat.add(1.0), lambda: scores.softmax(-1)), 2), 5, backend.synchronize)
    once.seconds()
    return once._replace(
        pieces={piece: max(2, round(_PIECE_S / once.piece_s(piece, times))) for piece, times in once.pieces.items()}
    )


def _paused_work() -> _Work:
    """A matmul, an addition and a small layer's forward and backward: together they follow training better than each
    alone (docs/LOG.md, 2026-11-23), and leave the caches' larger part to what is paused. No size is a power of two,
    whose rows fall onto the same lines of a cache, in some processes more than in others."""
    import torch

    matrix, flat = torch.randn(500, 500), torch.randn(1_000_000)
    product, total = torch.empty_like(matrix), torch.empty_like(flat)
    layer = torch.nn.TransformerEncoderLayer(240, 4, 960, batch_first=True, dropout=0.0)
    tokens = torch.randn(1, 24, 240)

    def step() -> None:
        layer(tokens).square().mean().backward()
        layer.zero_grad()

    pairs = max(1, torch.get_num_threads() // 2)
    return _Work(
        {
            lambda: torch.mm(matrix, matrix, out=product): 2 * pairs,
            lambda: torch.add(flat, 1.0, out=total): 16 * pairs,
            step: 1,  # too small for many threads to share
        }
    )
