"""The trial process: applies the strategy, then does what it is told to, and says how it went wrong if it does."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Literal

import msgspec

from autotune.cost import BY_TOKENS, Cost
from autotune.errors import AutotuneError
from autotune.measurement import Lap, Measurement, Outcome
from autotune.strategy import Strategy
from autotune.units import format_bytes
from autotune.workloads.base import Recipe, WorkloadRef

if TYPE_CHECKING:
    from autotune.laps import Epoch
    from autotune.passes import Way
    from autotune.phases import Trained

EVAL_ENOUGH_S = 1.0
"""Seconds of evaluation in a process after which no further batch is timed."""
_SAY_EVERY_S = 0.1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial process is to be."""

    workload: WorkloadRef
    strategy: Strategy
    backend: str
    memory_limit_bytes: int | None
    """Device memory that the process may take, where the platform can enforce it."""
    seed: int
    start: float = 0.0
    """Where in the order of the timed batches it begins, as a share of them."""
    usual_cost: Cost = BY_TOKENS
    """How long batches usually take by their shape, until timings say it."""
    recipe: Recipe | None = None
    """In place of the workload's own."""
    total_steps: int | None = None
    """What the learning rate's schedule is for; None: the recipe's epochs."""
    beats: str | None = None
    """The file of the device's beats, if any are taken while it runs."""
    compiles_into: str | None = None
    """A folder for what is compiled, in place of the one that all processes share."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Time laps until both minima are met and their mean is known, or enough seconds are spent."""

    min_laps: int
    min_s: float = 0.0
    enough_s: float = float("inf")
    least_laps: int = 3
    """However many seconds are spent, unless a lap takes as long as all of these should."""
    narrow: float = float("inf")
    """Half the 95 % interval of the mean, relative, at which timing may end."""
    eval_batches: int = 0
    """Afterwards evaluation batches, at most so many."""


class Soak(msgspec.Struct, frozen=True, kw_only=True):
    """Train on the longest samples there are, then on an epoch's, until either is reached."""

    enough_steps: int
    enough_s: float


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Train the first few steps on the batches that all strategies are compared on."""

    num_steps: int
    num_samples: int | None = None
    """Of each batch, where not all of them are wanted."""
    nudge: float = 0.0
    """Share of itself that every weight is changed by first."""


class Train(msgspec.Struct, frozen=True, kw_only=True):
    """Train some steps by the recipe, its phases apart, then evaluate. The process must be a fresh one."""

    num_steps: int
    num_eval: int
    """Test samples, at most."""


class TimeWays(msgspec.Struct, frozen=True, kw_only=True):
    """Time a few steps of so many samples in each of these precisions and memory formats. Nothing can follow it."""

    ways: tuple[Way, ...]
    num_samples: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A lap or a step is done, or a stage is reached (``lap`` is None)."""

    stage: Literal["building", "first step", "timing", "evaluating", "soaking", "comparing losses", "training", "ways"]
    lap: Lap | None = None
    step: int = 0
    """Steps that are trained."""
    num_laps: int = 0
    samples_per_s: float = 0.0
    pulse_s: float | None = None
    """The device's own speed that this is for."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A command is done: the laps it took, and the figures of all laps so far."""

    measurement: Measurement
    laps: tuple[Lap, ...]
    """This command's."""
    epoch: Epoch


class Soaked(msgspec.Struct, frozen=True, kw_only=True):
    """The soak went well."""

    num_steps: int
    peak_memory_bytes: int


class Traced(msgspec.Struct, frozen=True, kw_only=True):
    """The trace's losses."""

    losses: tuple[float, ...]


class TimedWays(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step, in the ways in which the model trains."""

    seconds: dict[Way, float]


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The trial is over, and why."""

    outcome: Outcome
    reason: str


AnyCommand = Command | Soak | Trace | Train | TimeWays


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
    from autotune import backends, passes, trace, workloads
    from autotune.apply import apply
    from autotune.compiler import check_compiled
    from autotune.pace import Beats
    from autotune.phases import train_some
    from autotune.timing import Timer, time_until

    backend = backends.get(job.backend)
    connection.send(Progress(stage="building"))
    workload = workloads.open_workload(job.workload)
    if job.recipe is not None:
        workload = workload.with_recipe(job.recipe)
    if job.memory_limit_bytes is not None:
        backend.limit_memory(job.memory_limit_bytes)
    free_bytes = backend.device().memory_free_bytes
    if job.compiles_into is not None:
        os.environ |= dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), job.compiles_into)
    backend.start_memory_window()
    run = apply(job.strategy, workload, backend, total_steps=job.total_steps, seed=job.seed)
    connection.send(Progress(stage="first step"))
    say = _seldom(connection)
    opening = functools.partial(say, Progress(stage="first step"))
    timer = functools.cache(lambda: Timer(run, job.start, Beats(job.beats), job.usual_cost, opening))

    def report(lap: Lap) -> None:
        say(
            Progress(
                stage="timing",
                lap=lap,
                num_laps=len(timer().laps),
                samples_per_s=timer().samples_per_s(),
                pulse_s=timer().pulse_s,
            ),
            is_first=len(timer().laps) <= 1,
        )

    def serve(command: AnyCommand) -> Done | Soaked | Traced | Trained | TimedWays:
        if isinstance(command, Train):
            trained = train_some(
                run,
                command.num_steps,
                command.num_eval,
                on_step=lambda step: say(Progress(stage="training", step=step)),
            )
            check_compiled(job.strategy, run.step)
            return trained
        if isinstance(command, Trace):
            comparing = Progress(stage="comparing losses")
            on_step = functools.partial(connection.send, comparing)
            found = trace.losses(run, command.num_steps, command.num_samples, on_step=on_step, nudge=command.nudge)
            return Traced(losses=found)
        if isinstance(command, TimeWays):
            timing = functools.partial(connection.send, Progress(stage="ways"))
            return TimedWays(seconds=passes.seconds_of(run, command.ways, command.num_samples, on_step=timing))
        if isinstance(command, Soak):
            num_steps = timer().soak(
                enough_steps=command.enough_steps,
                enough_s=command.enough_s,
                on_step=lambda _: say(Progress(stage="soaking")),
            )
            return Soaked(num_steps=num_steps, peak_memory_bytes=backend.peak_memory_bytes())
        first = len(timer().laps)
        timer().resume()
        time_until(
            timer(),
            min_laps=command.min_laps,
            min_s=command.min_s,
            enough_s=command.enough_s,
            least_laps=command.least_laps,
            narrow=command.narrow,
            on_lap=report,
        )
        check_compiled(job.strategy, run.step)
        if command.eval_batches:
            connection.send(Progress(stage="evaluating"))
            timer().evaluate(command.eval_batches, EVAL_ENOUGH_S)
        return Done(measurement=timer().measurement(), laps=tuple(timer().laps[first:]), epoch=timer().epoch)

    while True:
        try:
            command: AnyCommand = connection.recv()
        except EOFError:
            return
        try:
            reply = serve(command)
        except (EOFError, ConnectionError, FileNotFoundError) as exc:
            if not job.strategy.workers:
                raise
            raise ChildProcessError("a DataLoader worker died") from exc
        peak_bytes = backend.peak_memory_bytes()
        if not backend.is_host_memory and peak_bytes > free_bytes:
            raise MemoryError(
                f"its peak of {format_bytes(peak_bytes)} is more than the {format_bytes(free_bytes)} that the device "
                "had free: the driver moved the rest to the host"
            )
        connection.send(reply)


def _seldom(connection: Connection) -> Callable[..., None]:
    """Sends progress about ten times a second at most."""
    said = time.monotonic()

    def say(progress: Progress, is_first: bool = False) -> None:
        nonlocal said
        if time.monotonic() - said > _SAY_EVERY_S or is_first:
            said = time.monotonic()
            connection.send(progress)

    return say


def _outcome(exc: BaseException) -> Outcome:
    """``invalid`` where torch refused the setting, ``diverged`` for a loss that is no number, else ``crashed``."""
    if isinstance(exc, FloatingPointError):
        return "diverged"
    if "DataLoader worker" in str(exc):
        return "crashed"
    refusals = (RuntimeError, NotImplementedError, TypeError, ValueError, AutotuneError)
    return "invalid" if isinstance(exc, refusals) else "crashed"


def _one_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(exc).__name__}: {text}"[:200]
