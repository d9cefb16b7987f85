"""What a search minimises, and when a trial has no hope of winning any more."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from autotune.measurement import Rates, Trial
from autotune.trial.worker import Progress

Objective = Literal["time", "memory"]

FOLLOWS, DRIFT_DOUBT = 0.75, 0.4
"""Training's seconds grow with this power of the pulse's, give or take (docs/LOG.md 2026-11-22)."""
HOPELESS_AT_ONCE = 1.6
"""After its second lap a trial so many times slower than the best is given up."""
HOPELESS = 1.25
"""After its third: beyond what laps differ by and what machines usually drift by in a few seconds."""


class PlannedRun(msgspec.Struct, frozen=True, kw_only=True):
    """The training that a search prepares: what projections are for."""

    num_train: int
    num_test: int
    epochs: int

    def projected_s(self, rates: Rates) -> float:
        """Wall time of the planned run at these rates, in seconds."""
        return rates.run_s(num_train=self.num_train, num_test=self.num_test, epochs=self.epochs)


def loss_of(
    trial: Trial,
    objective: Objective,
    planned: PlannedRun,
    *,
    pulse_s: float | None = None,
    reference: Trial | None = None,
) -> float | None:
    """What the objective minimises: seconds of the planned run, or bytes. None where the trial gives no figure.

    With ``pulse_s`` the seconds are those at the speed that the device has at that pulse, so that trials from slower
    and from faster minutes compare. A pruned trial's seconds are an estimate to steer by, and so are those of one that
    ran out of time: the reference's planned run, scaled by the training rates.
    """
    if trial.outcome == "ok" and trial.measurement is not None:
        if objective == "memory":
            return float(trial.measurement.peak_memory_bytes)
        return planned.projected_s(trial.measurement) / slowdown(trial.pulse_s, pulse_s)
    known = reference.measurement if reference else None
    is_partial = trial.outcome in ("pruned", "timeout")
    if is_partial and trial.samples_per_s and objective == "time" and reference and known is not None:
        reference_s = planned.projected_s(known) / slowdown(reference.pulse_s, pulse_s)
        rate = trial.samples_per_s * slowdown(trial.pulse_s, pulse_s)
        return reference_s * known.samples_per_s * slowdown(reference.pulse_s, pulse_s) / rate
    return None


def slowdown(pulse_s: float | None, than_s: float | None) -> float:
    """How many times slower training was at one pulse than at another; 1 where either was not measured."""
    return (pulse_s / than_s) ** FOLLOWS if pulse_s and than_s else 1.0


def drift_doubt(pulse_s: float | None, than_s: float | None) -> float:
    """How wrong that may be: a relative standard deviation."""
    return DRIFT_DOUBT * abs(math.log(pulse_s / than_s)) if pulse_s and than_s else 0.0


def hopeless(progress: Progress, best_samples_per_s: float, is_compiled: bool) -> str | None:
    """The reason to give a trial up; None while it may still win. Compiled settings get two more laps to compile in."""
    laps = progress.num_laps - (2 if is_compiled else 0)
    if laps < 2 or not progress.samples_per_s:
        return None
    behind = best_samples_per_s / progress.samples_per_s
    if behind >= (HOPELESS_AT_ONCE if laps == 2 else HOPELESS):
        return f"{behind:.1f}x slower than the best after {progress.num_laps} laps"
    return None
