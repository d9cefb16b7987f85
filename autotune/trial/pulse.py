"""The device's own speed, measured between trials: a fixed piece of work in a process that lives through the search.

A shared machine gets slower and faster by tens of percent within minutes, and a figure is worth little without the
speed it was taken at. Two pieces of work follow training best here: adding to more memory than the caches hold and a
softmax. Dividing by them took the spread of one setting's step time over five minutes from 10 % to 6 %; matmuls follow
it less well (docs/LOG.md, 2026-11-21).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Self

from autotune.process import Child, ChildDied

_REPEATS = 5
_PIECE_S = 0.02
"""A piece of work is done as often as fills this: on a fast device a single one would measure how it is launched."""
_START_S, _ANSWER_S = 60.0, 20.0


class Pulse:
    """A context manager; leaving it ends the process."""

    def __init__(self, backend_name: str) -> None:
        self._backend_name = backend_name
        self._child: Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._child is not None:
            self._child.close()
        self._child = None

    def beat(self) -> float | None:
        """Seconds that the fixed work takes now; None where it could not be measured, as on a full device."""
        timeout_s = _ANSWER_S
        try:
            if self._child is None:
                self._child = Child(_serve, self._backend_name)
                timeout_s = _START_S
            self._child.send(None)
            return float(self._child.receive(timeout_s))
        except (ChildDied, TimeoutError):
            self.close()
            return None


def _serve(connection: Connection, backend_name: str) -> None:
    import torch

    from autotune import backends
    from autotune.backends.base import torch_device

    backend = backends.get(backend_name)
    device = torch_device(backend)
    scores = torch.randn(32, 512, 512, device=device)
    flat = scores.view(-1)

    pieces: tuple[Callable[[], torch.Tensor], ...] = (lambda: flat.add(1.0), lambda: scores.softmax(-1))

    def piece_s(piece: Callable[[], torch.Tensor], times: int) -> float:
        backend.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            piece()
        backend.synchronize()
        return (time.perf_counter() - start) / times

    def seconds(repeats: int) -> float:
        medians = [
            statistics.median(piece_s(piece, times) for _ in range(repeats))
            for piece, times in zip(pieces, how_often, strict=True)
        ]
        return math.sqrt(medians[0] * medians[1])

    how_often = [2] * len(pieces)
    seconds(2)
    how_often = [max(2, round(_PIECE_S / piece_s(piece, 2))) for piece in pieces]
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        seconds(1)  # wakes the threads and the caches
        connection.send(seconds(_REPEATS))
