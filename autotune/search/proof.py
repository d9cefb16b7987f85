"""The last test before a profile is saved: the winner trains as the baseline does, and lasts."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from autotune import trace
from autotune.measurement import Outcome
from autotune.strategy import Padding
from autotune.trial.runner import Session, TrialEndedError
from autotune.trial.worker import Job, Progress, Soak, Trace

LONGEST_SOAK = Soak(enough_steps=50, enough_s=30.0)
NUM_PADDED = 4
"""Samples that tell whether a model masks its padding."""


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What the last test of a setting found."""

    outcome: Outcome
    reason: str = ""
    """Why the outcome is not ``ok``."""
    loss_deviation: float | None = None
    """Largest distance of the first losses from the fp32 baseline's (``trace.deviation``)."""
    not_compared: str = ""
    """Why there were no losses of the baseline's to compare with."""
    soak_steps: int = 0
    """Steps taken, on the longest samples in a row and then as an epoch has them."""
    peak_memory_bytes: int = 0
    """Of those steps and an evaluation among them."""


def needed_s(baseline_step_s: float, soak: Soak, *, has_reference: bool) -> float:
    """Seconds that the last test of one setting takes, and the reference's losses, which it may have already."""
    num_steps = 1 if has_reference else 2
    return min(soak.enough_s, 2 * soak.enough_steps * baseline_step_s) + num_steps * baseline_step_s + 1


def reference_losses(
    job: Job, *, timeout_s: float, silence_s: float = math.inf, memory_limit_bytes: int, nudge: float = 0.0
) -> tuple[float, ...]:
    """The plain baseline's losses on the batches that settings are compared on, its weights nudged or as they are.
    Raises TrialEndedError.

    A model that masks its padding gives the same losses where a batch is padded to its longest sample only, and sooner:
    that is done where the loss of a few samples bears it out.
    """

    def losses(padding: Padding, command: Trace) -> tuple[float, ...]:
        strategy = msgspec.structs.replace(job.strategy, padding=padding)
        padded = msgspec.structs.replace(job, strategy=strategy)
        with Session(padded, memory_limit_bytes=memory_limit_bytes, silence_s=silence_s) as session:
            return session.trace(command, timeout_s=timeout_s)

    def is_masked() -> bool:
        few = Trace(num_steps=1, num_samples=NUM_PADDED)
        try:
            return trace.deviation(losses(plain, few), losses("longest", few)) <= trace.TOLERANCE["fp32"]
        except TrialEndedError:  # a model may be made for batches of one size
            return False

    plain = job.strategy.padding
    padding = "longest" if plain == "longest" or is_masked() else plain
    return losses(padding, Trace(num_steps=trace.NUM_STEPS, nudge=nudge))


def prove(
    job: Job,
    reference: tuple[float, ...] | TrialEndedError,
    *,
    soak: Soak,
    timeout_s: float,
    silence_s: float = math.inf,
    memory_limit_bytes: int,
    rounding: Callable[[], float] = lambda: 0.0,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Proof:
    """Compares a setting's losses with the reference's, then soaks it. Never raises for what the setting does.
    ``rounding`` is ``trace.difference``'s.

    Where the reference does not train these batches there is nothing to compare with: the proof says so.
    """
    deviation, not_compared = None, ""

    def session() -> Session:
        return Session(job, memory_limit_bytes=memory_limit_bytes, silence_s=silence_s)

    def lasted(own: Session) -> Proof:
        soaked = own.soak(soak, timeout_s=timeout_s + soak.enough_s, on_progress=on_progress)
        return Proof(
            outcome="ok",
            loss_deviation=deviation,
            not_compared=not_compared,
            soak_steps=soaked.num_steps,
            peak_memory_bytes=soaked.peak_memory_bytes,
        )

    try:
        with session() as own:
            if isinstance(reference, TrialEndedError):
                not_compared = f"{reference.outcome}: {reference.reason}"
                return lasted(own)
            losses = own.trace(Trace(num_steps=trace.NUM_STEPS), timeout_s=timeout_s, on_progress=on_progress)
            deviation = trace.deviation(reference, losses)
            reason = trace.difference(job.strategy, reference, losses)
            if reason is None:
                return lasted(own)
        if trace.is_doubtful(job.strategy, reference, losses):  # its process has ended: the device is the baseline's
            reason = trace.difference(job.strategy, reference, losses, rounding())
        if reason is None:
            with session() as own:
                return lasted(own)
        return Proof(outcome="diverged", reason=reason, loss_deviation=deviation)
    except TrialEndedError as end:
        return Proof(outcome=end.outcome, reason=end.reason, loss_deviation=deviation)
