"""The finalists and the baseline timed in turns, so that the machine's drift hits all alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import msgspec

from autotune.measurement import Interval, Measurement, Trial
from autotune.stats import paired_ratio
from autotune.strategy import Strategy
from autotune.trial.runner import Session, TrialEndedError
from autotune.trial.worker import Command, Job

EVAL_BATCHES = 2
"""Evaluation batches of each round."""
FAST_LAPS = 4
"""Laps of a finalist in one round: consecutive ones cover the lengths. A setting padded to max takes one."""


class Final(msgspec.Struct, frozen=True, kw_only=True):
    """One entrant after the race."""

    trial: Trial
    measurement: Measurement
    """All its laps in the race."""
    epoch_s: tuple[float, ...]
    """Seconds of a training epoch, by round."""


class Entrant(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that enters the race."""

    trial: Trial
    job: Job


def race(
    entrants: Sequence[Entrant],
    *,
    rounds: int,
    timeout_s: float,
    memory_limit_bytes: int,
    on_round: Callable[[int, int], None] = lambda done, of: None,
) -> list[Final]:
    """Times all entrants in turns (A B C, C B A, ...), each in its own process that lives through the race.

    An entrant that fails is left out of the result, as its rivals go on.
    """
    epochs: dict[int, list[float]] = {entrant.trial.number: [] for entrant in entrants}
    measurements: dict[int, Measurement] = {}
    with contextlib.ExitStack() as stack:
        sessions: dict[int, Session] = {}

        def turn(entrant: Entrant, command: Command) -> None:
            number = entrant.trial.number
            try:
                if number not in sessions:
                    sessions[number] = stack.enter_context(Session(entrant.job, memory_limit_bytes=memory_limit_bytes))
                done = sessions[number].time(command, timeout_s=timeout_s)
            except TrialEndedError:
                sessions[number].close()
                running.remove(entrant)
                return
            if not command.longest:
                epochs[number].append(done.epoch_s)
            measurements[number] = done.measurement

        running = list(entrants)
        for entrant in list(running):
            turn(entrant, _warm_up(entrant.job.strategy))
        for number in range(rounds):
            order = list(running) if number % 2 == 0 else list(reversed(running))
            for entrant in order:
                laps = 1 if entrant.job.strategy.padding == "max" else FAST_LAPS
                turn(entrant, Command(min_laps=laps, eval_batches=EVAL_BATCHES))
            on_round(number + 1, rounds)
    return [
        Final(
            trial=entrant.trial,
            measurement=measurements[entrant.trial.number],
            epoch_s=tuple(epochs[entrant.trial.number]),
        )
        for entrant in running
        if epochs[entrant.trial.number]
    ]


def _warm_up(strategy: Strategy) -> Command:
    """One lap and the longest batch; compiled settings get more laps, to meet more shapes before the clock runs."""
    return Command(min_laps=0 if strategy.compile == "none" else 3, longest=True)


def speedup(baseline: Final, best: Final) -> Interval:
    """How many times faster the best trains than the baseline, paired by round."""
    return paired_ratio(baseline.epoch_s, best.epoch_s)
