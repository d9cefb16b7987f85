"""The trial process: applies the strategy, then times what it is told to, and says how it went wrong if it does."""

from __future__ import annotations

import contextlib
import time
import warnings
from multiprocessing.connection import Connection
from typing import Literal

import msgspec

from autotune.measurement import Lap, Measurement, Outcome
from autotune.strategy import Strategy
from autotune.workloads.base import WorkloadRef

EVAL_ENOUGH_S = 1.0
"""Seconds of evaluation after which no further batch is timed."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial process is to be."""

    workload: WorkloadRef
    strategy: Strategy
    backend: str
    memory_limit_bytes: int | None
    """Device memory that the process may take, where the platform can enforce it."""
    seed: int


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What to time next: laps until both minima are met or enough seconds are spent."""

    min_laps: int
    min_s: float = 0.0
    enough_s: float = float("inf")
    longest: bool = False
    """Afterwards the longest batch, untimed, for the peak memory."""
    eval_batches: int = 0
    """Afterwards evaluation batches, at most so many."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A lap is done, or a stage is reached (``lap`` is None)."""

    stage: Literal["building", "first step", "timing", "evaluating"]
    lap: Lap | None = None
    num_laps: int = 0
    samples_per_s: float = 0.0


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A command is done: the laps it took, and the figures of all laps so far."""

    measurement: Measurement
    epoch_s: float
    """Seconds of a whole epoch at the rate of this command's laps alone."""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The trial is over, and why."""

    outcome: Outcome
    reason: str


def main(connection: Connection, job: Job) -> None:
    """Serves commands until the other side closes. Every error becomes one Failed message."""
    from autotune import backends

    warnings.simplefilter("ignore")
    backend = backends.get(job.backend)
    try:
        _serve(connection, job)
    except BaseException as exc:  # noqa: BLE001 - whatever it is, it is this trial's outcome, on record with its text
        outcome = "oom" if backend.is_out_of_memory(exc) else _outcome(exc)
        with contextlib.suppress(OSError):
            connection.send(Failed(outcome=outcome, reason=_one_line(exc)))


def _serve(connection: Connection, job: Job) -> None:
    import torch

    from autotune import backends, workloads
    from autotune.apply import apply
    from autotune.timing import Timer, time_until

    backend = backends.get(job.backend)
    connection.send(Progress(stage="building"))
    workload = workloads.open_workload(job.workload)
    if job.memory_limit_bytes is not None:
        backend.limit_memory(job.memory_limit_bytes)
    backend.start_memory_window()
    timer = Timer(apply(job.strategy, workload, backend, seed=job.seed))
    connection.send(Progress(stage="first step"))
    while True:
        try:
            command: Command = connection.recv()
        except EOFError:
            return
        first = len(timer.laps)
        said = time.monotonic()

        def report(lap: Lap) -> None:
            nonlocal said
            if not all(map(torch.isfinite, map(torch.tensor, lap.losses))):
                raise FloatingPointError(f"loss {lap.losses[-1]} after {sum(x.num_steps for x in timer.laps)} steps")
            if time.monotonic() - said > 0.1 or len(timer.laps) <= 1:
                said = time.monotonic()
                connection.send(
                    Progress(stage="timing", lap=lap, num_laps=len(timer.laps), samples_per_s=timer.samples_per_s())
                )

        try:
            time_until(timer, min_laps=command.min_laps, min_s=command.min_s, enough_s=command.enough_s, on_lap=report)
        except (EOFError, ConnectionError, FileNotFoundError) as exc:
            if not job.strategy.workers:
                raise
            raise ChildProcessError("a DataLoader worker died") from exc
        if command.longest:
            timer.longest()
        if command.eval_batches:
            connection.send(Progress(stage="evaluating"))
            timer.evaluate(command.eval_batches, EVAL_ENOUGH_S)
        connection.send(Done(measurement=timer.measurement(), epoch_s=timer.epoch_s(timer.laps[first:])))


def _outcome(exc: BaseException) -> Outcome:
    """``invalid`` where torch refused the setting, ``diverged`` for a loss that is no number, else ``crashed``."""
    if isinstance(exc, FloatingPointError):
        return "diverged"
    if "DataLoader worker" in str(exc):
        return "crashed"
    refusals = (RuntimeError, NotImplementedError, TypeError, ValueError)
    return "invalid" if isinstance(exc, refusals) else "crashed"


def _one_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(exc).__name__}: {text}"[:200]
