"""What a search minimises, and when a trial has no hope of winning any more."""

from __future__ import annotations

from typing import Literal

import msgspec

from autotune.measurement import Rates, Trial
from autotune.pace import slowdown
from autotune.trial.worker import Progress

Objective = Literal["time", "memory", "pareto", "energy"]


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    """One way to be the best: least seconds to the power of ``1 - memory`` times bytes to the power of ``memory``, or
    least energy."""

    name: str
    memory: float = 0.0
    is_energy: bool = False

    @property
    def is_time(self) -> bool:
        """Whether nothing but the planned run's seconds counts."""
        return not self.memory and not self.is_energy


FASTEST, BALANCED, LEANEST = (Aim(name=n, memory=m) for n, m in (("fastest", 0.0), ("balanced", 0.5), ("leanest", 1.0)))
THRIFTIEST = Aim(name="thriftiest", is_energy=True)
AIMS: dict[Objective, tuple[Aim, ...]] = {
    "time": (FASTEST,),
    "memory": (LEANEST,),
    "pareto": (FASTEST, BALANCED, LEANEST),
    "energy": (THRIFTIEST,),
}
"""What a search for each objective looks for, the profile's own setting first."""
TOO_SLOW = 4
"""A setting that has to be faster has its loss raised by how much, to this power."""
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

    @property
    def num_trained(self) -> int:
        """Samples trained on, each as often as there are epochs."""
        return self.epochs * self.num_train


def loss_of(
    trial: Trial,
    aim: Aim,
    planned: PlannedRun,
    *,
    pulse_s: float | None = None,
    reference: Trial | None = None,
) -> float | None:
    """What the aim minimises: of the planned run's seconds and of bytes, or joules. None where the trial gives no
    figure.

    With ``pulse_s`` the seconds are those at the speed that the device has at that pulse, so that trials from slower
    and from faster minutes compare. A pruned trial's seconds are an estimate to steer by, and so are those of one that
    ran out of time: the reference's planned run, scaled by the training rates.
    """
    if trial.outcome == "ok" and trial.measurement is not None:
        found = trial.measurement
        if aim.is_energy:
            return None if found.joules_per_sample is None else found.joules_per_sample * planned.num_trained
        seconds = planned.projected_s(found) / slowdown(trial, pulse_s)
        return float(seconds ** (1 - aim.memory) * found.peak_memory_bytes**aim.memory)
    known = reference.measurement if reference else None
    is_partial = trial.outcome in ("pruned", "timeout")
    if is_partial and trial.samples_per_s and aim.is_time and reference and known is not None:
        reference_s = planned.projected_s(known) / slowdown(reference, pulse_s)
        rate = trial.samples_per_s * slowdown(trial, pulse_s)
        return reference_s * known.samples_per_s * slowdown(reference, pulse_s) / rate
    return None


def held_to_speed(loss: float, samples_per_s: float, least_samples_per_s: float) -> float:
    """A loss that grows steeply where a setting is slower than it may be: the slower, the more."""
    return loss * max(1.0, least_samples_per_s / samples_per_s) ** TOO_SLOW


def hopeless(progress: Progress, best_samples_per_s: float, is_compiled: bool) -> str | None:
    """The reason to give a trial up; None while it may still win. Compiled settings get two more laps to compile in."""
    laps = progress.num_laps - (2 if is_compiled else 0)
    if laps < 2 or not progress.samples_per_s:
        return None
    behind = best_samples_per_s / progress.samples_per_s
    if behind >= (HOPELESS_AT_ONCE if laps == 2 else HOPELESS):
        return f"{behind:.1f}x slower than the best after {progress.num_laps} laps"
    return None
