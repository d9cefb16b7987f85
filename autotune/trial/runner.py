"""The search's side of a trial: starts the process, listens, enforces time and memory, names the outcome."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Self

from autotune import backends
from autotune.measurement import Measurement, Outcome, Trial
from autotune.process import Child, ChildDied
from autotune.trial import worker
from autotune.trial.worker import Command, Done, Failed, Job, Progress
from autotune.units import format_bytes

OnProgress = Callable[[Progress], None]
MEMORY_POLL_S = 0.5
ORDINARY = Command(min_laps=6, min_s=3.0, enough_s=10.0, longest=True, eval_batches=8)
"""How an ordinary trial is timed: six laps that cover the lengths, fewer where a single step takes seconds."""


class TrialEndedError(Exception):
    """A trial ended otherwise than by finishing. Never leaves this package but as a Trial."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome: Outcome = outcome
        self.reason = reason


class Session:
    """A trial process that waits for commands. A context manager: leaving it ends the process and all it started."""

    def __init__(self, job: Job, *, memory_limit_bytes: int) -> None:
        is_watched = backends.get(job.backend).is_host_memory
        self._memory_limit_bytes = memory_limit_bytes if is_watched else None
        self._child = Child(worker.main, job)
        self._is_started = False
        self._memory_at_start: int | None = None
        self._memory_checked = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and all it started."""
        self._child.close()

    def time(self, command: Command, *, timeout_s: float, on_progress: OnProgress = lambda _: None) -> Done:
        """Times what the command says. Raises TrialEndedError when the trial fails, hangs or takes too much memory."""
        deadline = time.monotonic() + timeout_s
        try:
            self._child.send(command)
            while True:
                message = self._child.receive(deadline - time.monotonic(), self._check_memory)
                self._is_started = True
                self._check_memory()
                if isinstance(message, Done):
                    return message
                if isinstance(message, Failed):
                    raise TrialEndedError(message.outcome, message.reason)
                on_progress(message)
        except TimeoutError as exc:
            raise TrialEndedError("timeout", f"not done within {timeout_s:.0f} s") from exc
        except ChildDied as exc:
            if exc.exit_code == -signal.SIGKILL:
                raise TrialEndedError("oom", "killed by SIGKILL, as the kernel does when out of memory") from exc
            raise TrialEndedError("crashed", exc.reason) from exc

    def _check_memory(self) -> None:
        """The parent's watch over host memory, where that is the device's: the machine never gets to swap."""
        if self._memory_limit_bytes is None or not self._is_started:
            return
        now = time.monotonic()
        if now - self._memory_checked < MEMORY_POLL_S:
            return
        self._memory_checked = now
        memory_bytes = self._child.memory_bytes()
        if self._memory_at_start is None:
            self._memory_at_start = memory_bytes
        taken_bytes = memory_bytes - self._memory_at_start
        if taken_bytes > self._memory_limit_bytes:
            raise TrialEndedError("oom", over_budget(taken_bytes, self._memory_limit_bytes))


def run_trial(
    number: int,
    job: Job,
    *,
    timeout_s: float,
    memory_limit_bytes: int,
    hopeless: Callable[[Progress], str | None] = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> Trial:
    """One strategy tried in its own process. Never raises for what the strategy does.

    ``hopeless`` sees every progress message; a reason from it ends the trial as ``pruned``.
    """
    start = time.monotonic()
    last: Progress | None = None

    def listen(progress: Progress) -> None:
        nonlocal last
        on_progress(progress)
        if progress.lap is not None:
            last = progress
            reason = hopeless(progress)
            if reason is not None:
                raise TrialEndedError("pruned", reason)

    def ended(outcome: Outcome, reason: str, measurement: Measurement | None = None) -> Trial:
        return Trial(
            number=number,
            strategy=job.strategy,
            outcome=outcome,
            reason=reason,
            measurement=measurement,
            samples_per_s=measurement.samples_per_s if measurement else (last and last.samples_per_s) or None,
            wall_s=time.monotonic() - start,
        )

    try:
        with Session(job, memory_limit_bytes=memory_limit_bytes) as session:
            done = session.time(ORDINARY, timeout_s=timeout_s, on_progress=listen)
    except TrialEndedError as end:
        return ended(end.outcome, end.reason)
    peak_bytes = done.measurement.peak_memory_bytes
    if peak_bytes > memory_limit_bytes:
        return ended("oom", over_budget(peak_bytes, memory_limit_bytes), done.measurement)
    return ended("ok", "", done.measurement)


def over_budget(taken_bytes: int, limit_bytes: int) -> str:
    """The reason for a trial that took too much."""
    return f"{format_bytes(taken_bytes)} is over the memory budget of {format_bytes(limit_bytes)}"


__all__ = ["ORDINARY", "Command", "Session", "TrialEndedError", "over_budget", "run_trial"]
