"""The search's side of a trial: starts the process, listens, enforces time and memory, names the outcome."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, Self

import msgspec

from autotune import backends
from autotune.backends.cpu import usable_cores
from autotune.contention import QUIET_SHARE, Load
from autotune.measurement import Measurement, Outcome, Trial
from autotune.passes import Way
from autotune.phases import Trained
from autotune.process import Child, ChildDied
from autotune.timing import NARROW
from autotune.trial import worker
from autotune.trial.pulse import Pulse
from autotune.trial.worker import (
    AnyCommand,
    Command,
    Done,
    Failed,
    Job,
    Progress,
    Soak,
    Soaked,
    TimedWays,
    TimeWays,
    Trace,
    Traced,
    Train,
)
from autotune.units import format_bytes

OnProgress = Callable[[Progress], None]
MEMORY_POLL_S = 0.1
"""Between two looks at the trial's own memory."""
FAMILY_POLL_S = 1.0
"""Between two looks at what it started, which takes a look at every process there is."""
ORDINARY = Command(min_laps=5, min_s=1.0, enough_s=10.0, narrow=NARROW, eval_batches=8)
"""How an ordinary trial is timed: laps that cover the lengths until their mean is known, for ten seconds at most
but where a single step takes seconds."""
WITH_BEATS = msgspec.structs.replace(ORDINARY, enough_s=6.0, least_laps=2)
"""As an ordinary trial where the device's speed is known all along: fewer laps tell as much."""
ON_ACCELERATOR = msgspec.structs.replace(ORDINARY, enough_s=3.0)
"""As an ordinary trial where laps are short, a tenth of a second: thirty of them tell who may race."""
ONCE, ONCE_WITH_BEATS = (msgspec.structs.replace(command, least_laps=1) for command in (ORDINARY, WITH_BEATS))
"""The same, but where a step takes those ten or six seconds it is timed once."""


def ordinary(pulse: Pulse) -> Command:
    """How a trial is timed beside this pulse."""
    if not pulse.is_on_host:
        return ON_ACCELERATOR
    return WITH_BEATS if pulse.file() else ORDINARY


def once(pulse: Pulse) -> Command:
    """How the plain baseline is timed, which a race times again."""
    if not pulse.is_on_host:
        return ON_ACCELERATOR
    return ONCE_WITH_BEATS if pulse.file() else ONCE


class TrialEndedError(Exception):
    """A trial ended otherwise than by finishing. Never leaves the search but as a Trial."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome: Outcome = outcome
        self.reason = reason


class Session:
    """A trial process that waits for commands. A context manager: leaving it ends the process and all it started.

    Its methods raise TrialEndedError when the trial fails, when it takes too much memory, when a command is not done
    within ``timeout_s``, and when the process says nothing for ``silence_s``.
    """

    def __init__(
        self, job: Job, *, memory_limit_bytes: int, silence_s: float = math.inf, pulse: Pulse | None = None
    ) -> None:
        """``pulse`` is taken while the process is timed."""
        self._pulse = pulse
        is_watched = backends.get(job.backend).is_host_memory
        self._memory_limit_bytes, self._silence_s = memory_limit_bytes, silence_s
        self._memory = _Watch() if is_watched else None
        self._beats = pulse.file() if pulse else None
        self._child = Child(worker.main, msgspec.structs.replace(job, beats=self._beats))
        self._is_started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and all it started."""
        self._child.close()

    def cpu_s(self) -> float:
        """CPU seconds that the process and all it started have spent so far."""
        return self._child.cpu_s()

    def time(self, command: Command, *, timeout_s: float, on_progress: OnProgress = lambda _: None) -> Done:
        """Times what the command says."""
        with self._pulse.pausing(self._child.pid, self._beats) if self._pulse else contextlib.nullcontext():
            done: Done = self._ask(command, timeout_s, on_progress)
        peak_bytes = self._peak_bytes(done.measurement.peak_memory_bytes)
        return msgspec.structs.replace(
            done, measurement=msgspec.structs.replace(done.measurement, peak_memory_bytes=peak_bytes)
        )

    def soak(self, command: Soak, *, timeout_s: float, on_progress: OnProgress = lambda _: None) -> Soaked:
        """Trains on the longest samples; also fails when the peak is over the memory limit."""
        soaked: Soaked = self._ask(command, timeout_s, on_progress)
        peak_bytes = self._peak_bytes(soaked.peak_memory_bytes)
        if peak_bytes > self._memory_limit_bytes:
            raise TrialEndedError("oom", over_budget(peak_bytes, self._memory_limit_bytes))
        return msgspec.structs.replace(soaked, peak_memory_bytes=peak_bytes)

    def trace(self, command: Trace, *, timeout_s: float, on_progress: OnProgress = lambda _: None) -> tuple[float, ...]:
        """The losses of the first few steps; the session must be a fresh one."""
        traced: Traced = self._ask(command, timeout_s, on_progress)
        return traced.losses

    def train(self, command: Train, *, timeout_s: float, on_progress: OnProgress = lambda _: None) -> Trained:
        """Trains some steps and evaluates; also fails when the peak is over the memory limit."""
        trained: Trained = self._ask(command, timeout_s, on_progress)
        peak_bytes = self._peak_bytes(trained.peak_memory_bytes)
        if peak_bytes > self._memory_limit_bytes:
            raise TrialEndedError("oom", over_budget(peak_bytes, self._memory_limit_bytes))
        return msgspec.structs.replace(trained, peak_memory_bytes=peak_bytes)

    def time_ways(self, command: TimeWays, *, timeout_s: float) -> dict[Way, float]:
        """Seconds of a step in each way; the session is over then."""
        timed: TimedWays = self._ask(command, timeout_s, lambda _: None)
        return timed.seconds

    def _ask(self, command: AnyCommand, timeout_s: float, on_progress: OnProgress) -> Any:
        deadline = time.monotonic() + timeout_s
        try:
            self._child.send(command)
            while True:
                left_s = deadline - time.monotonic()
                message = self._child.receive(min(left_s, self._silence_s), self._look)
                self._is_started = True
                self._check_memory()
                if isinstance(message, Failed):
                    raise TrialEndedError(message.outcome, message.reason)
                if not isinstance(message, Progress):
                    return message
                on_progress(message)
        except TimeoutError as exc:
            is_silent = self._silence_s < left_s
            reason = (
                f"no sign of life for {self._silence_s:.0f} s" if is_silent else f"not done within {timeout_s:.0f} s"
            )
            raise TrialEndedError("timeout", reason) from exc
        except ChildDied as exc:
            if exc.was_killed:
                raise TrialEndedError("oom", "killed by SIGKILL, as the kernel does when out of memory") from exc
            raise TrialEndedError("crashed", exc.reason) from exc

    def _look(self) -> None:
        if self._pulse is not None:
            self._pulse.check()
        self._check_memory()

    def _check_memory(self) -> None:
        """The parent's watch over host memory, where that is the device's: the machine never gets to swap."""
        if self._memory is None or not self._is_started:
            return
        taken_bytes = self._memory.taken_bytes(self._child)
        if taken_bytes > self._memory_limit_bytes:
            raise TrialEndedError("oom", over_budget(taken_bytes, self._memory_limit_bytes))

    def _peak_bytes(self, reported_bytes: int) -> int:
        return reported_bytes if self._memory is None else max(reported_bytes, self._memory.peak_bytes)


class _Watch:
    """What a child and all it started have taken since the first look."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._start_bytes: int | None = None
        self._descendants_bytes = 0
        self._taken_bytes = 0
        self._looked = self._looked_at_all = -FAMILY_POLL_S

    def taken_bytes(self, child: Child) -> int:
        now = time.monotonic()
        if now - self._looked < MEMORY_POLL_S:
            return self._taken_bytes
        self._looked = now
        own_bytes = child.memory_bytes()
        if now - self._looked_at_all >= FAMILY_POLL_S:
            self._looked_at_all = now
            self._descendants_bytes = child.descendants_bytes()
        if self._start_bytes is None:
            self._start_bytes = own_bytes
        self._taken_bytes = own_bytes + self._descendants_bytes - self._start_bytes
        self.peak_bytes = max(self.peak_bytes, self._taken_bytes)
        return self._taken_bytes


def run_trial(
    number: int,
    job: Job,
    *,
    timeout_s: float,
    memory_limit_bytes: int,
    command: Command = ORDINARY,
    silence_s: float = math.inf,
    pulse: Pulse | None = None,
    hopeless: Callable[[Progress], str | None] = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> Trial:
    """One strategy tried in its own process. Never raises for what the strategy does.

    ``hopeless`` sees every progress message; a reason from it ends the trial as ``pruned``, unless others have kept the
    cores busy meanwhile. It may take ``timeout_s``, and say nothing for ``silence_s``.
    """
    start = time.monotonic()
    last: Progress | None = None
    since_first: list[tuple[Load, float]] = []

    def listen(progress: Progress) -> None:
        nonlocal last
        on_progress(progress)
        if progress.lap is not None:
            if last is None:
                since_first.append((Load(), own_cpu_s()))
            last = progress
            reason = hopeless(progress)
            if reason is not None and not was_disturbed():
                raise TrialEndedError("pruned", reason)

    def was_disturbed() -> bool:
        """Whether others had the cores that the laps needed; those of an accelerator need few."""
        is_on_cores = backends.get(job.backend).is_host_memory
        return is_on_cores and others_cores() > QUIET_SHARE * usable_cores()

    def others_cores() -> float:
        (load, before_s), *_ = since_first
        return load.busy_cores(usable_cores(), own_cpu_s() - before_s)

    def own_cpu_s() -> float:
        return session.cpu_s() + (pulse.cpu_s() if pulse else 0.0)

    def ended(outcome: Outcome, reason: str, measurement: Measurement | None = None) -> Trial:
        pulse_s = measurement.pulse_s if measurement else last.pulse_s if last else None
        return Trial(
            number=number,
            strategy=job.strategy,
            outcome=outcome,
            reason=reason,
            measurement=measurement,
            pulse_s=pulse_s,
            has_beats=pulse_s is not None,
            samples_per_s=measurement.samples_per_s if measurement else (last and last.samples_per_s) or None,
            wall_s=time.monotonic() - start,
            others_cores=busy_cores,
        )

    busy_cores: float | None = None
    try:
        with Session(job, memory_limit_bytes=memory_limit_bytes, silence_s=silence_s, pulse=pulse) as session:
            done = session.time(command, timeout_s=timeout_s, on_progress=listen)
            busy_cores = others_cores()
    except TrialEndedError as end:
        return ended(end.outcome, end.reason)
    peak_bytes = done.measurement.peak_memory_bytes
    if peak_bytes > memory_limit_bytes:
        return ended("oom", over_budget(peak_bytes, memory_limit_bytes), done.measurement)
    return ended("ok", done.measurement.remarks, done.measurement)


def over_budget(taken_bytes: int, limit_bytes: int) -> str:
    """The reason for a trial that took too much."""
    return f"{format_bytes(taken_bytes)} is over the memory limit of {format_bytes(limit_bytes)}"
