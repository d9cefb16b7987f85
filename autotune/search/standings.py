"""Who is the best, and by how much.

Of those who raced, the best is by what races and trials together let expect: three rounds are hardly surer than a
trial. Speed-ups are the race's alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from autotune.measurement import Interval, Measurement, Trial
from autotune.pace import slowdown, sped_up
from autotune.search import finals
from autotune.search.finals import Final, log_error, ranked
from autotune.search.history import History
from autotune.search.objective import FASTEST, Aim, loss_of
from autotune.search.surrogate import Known, Surrogate
from autotune.search.task import Task
from autotune.search.turns import Race
from autotune.stats import ratio_of_means

MIN_RACED = 2
"""Rounds that a race's figures need: each entrant came first and last."""
WITHIN_95 = 1.96
"""Standard deviations that 95 of 100 figures are within."""


class Standings:
    """What trials and races say together."""

    def __init__(self, task: Task, history: History) -> None:
        self._task, self._history = task, history
        self.races: list[Race] = []
        """All that were run, heats among them."""
        self.race: Race | None = None
        """The last that the baseline was in, whose figures are shown."""
        self.cold_warm_up_s: dict[int, float] = {}
        """Seconds of a first start by the trial's number, where the trial itself did not have to compile."""

    def best(self, aim: Aim) -> Trial | None:
        """The best of those in the last race; of those tried where that is no help, or where all who raced have failed
        since."""
        reference, best = self._history.reference, self._history.best(aim)
        rivals = [final for final in self.finals().values() if self._history.may_win(final.trial, final.measurement)]
        raced = {final.trial.number for final in rivals}
        fastest = self._history.best(FASTEST)
        if len(self._task.aims) > 1 and best and fastest and not {best.number, fastest.number} <= raced:
            return best  # the race has no say where one of those that it is about was not in it
        rivals = self._fast_enough(rivals, aim)
        if rivals and (best is reference or any(final.trial is not reference for final in rivals)):
            if aim == FASTEST:
                rivals = [final for final in rivals if self._may_be_faster(final.trial)] or rivals
            return self.in_order(rivals, aim)[0].trial
        return best

    def in_order(self, rivals: Sequence[Final], aim: Aim = FASTEST) -> list[Final]:
        """The best first; those that tie go by simplicity, then by memory. The fastest is told by trials and races
        together; other aims by the race alone, whose doubt is known of times only."""
        if aim != FASTEST:
            return ranked(rivals, lambda final: self._loss(final, aim))
        known = self._history.known(FASTEST)
        for number, race in enumerate(self.races):
            entered = _finals(race)
            if math.isfinite(error := log_error(entered)):
                known += [Known(one.trial.strategy, self._loss(one, FASTEST), error, race=number) for one in entered]
        surrogate = Surrogate(self._task.space.values, known, self._history.prior(FASTEST))
        expected, _ = surrogate.predict([final.trial.strategy for final in rivals])
        losses = dict(zip((final.trial.number for final in rivals), np.exp(expected).tolist(), strict=True))
        return ranked(rivals, lambda final: losses[final.trial.number])

    def finals(self) -> dict[int, Final]:
        """The race's figures by trial; none where it did not get to two rounds."""
        return {final.trial.number: final for final in _finals(self.race)}

    def speedup(self, trial: Trial) -> Interval:
        """Over the baseline, by the race; by the trials where not both were in it. What was timed once has no spread of
        its own to tell how sure it is: where the device's speed is known all along, it is as sure as such figures are.
        """
        reference, entered = self._history.reference, self.finals()
        if {reference.number, trial.number} <= entered.keys() and trial is not reference:
            return finals.ratio(entered[reference.number], entered[trial.number])
        if trial is not reference and trial.measurement and reference.measurement:
            found = ratio_of_means(reference.measurement.epoch_s, self._beside_the_baseline(trial).epoch_s)
            if math.isinf(found.high) and reference.has_beats and trial.has_beats:
                error = math.hypot(self._history.noise(reference, FASTEST), self._history.noise(trial, FASTEST))
                factor = math.exp(WITHIN_95 * error)
                return Interval(ratio=found.ratio, low=found.ratio / factor, high=found.ratio * factor)
            return found
        return Interval(ratio=1.0, low=1.0, high=1.0)

    def at_last(self, trial: Trial, peak_bytes: int = 0) -> Trial:
        """The trial with the race's figures, or else at the speed that the device had in the baseline's; with a first
        start's warm-up, and the larger peak, if another was seen."""
        final = self.finals().get(trial.number)
        measured = final.measurement if final else self._beside_the_baseline(trial)
        measured = msgspec.structs.replace(measured, peak_memory_bytes=max(measured.peak_memory_bytes, peak_bytes))
        if trial.number in self.cold_warm_up_s:
            warm_up_s = max(measured.warm_up_s, self.cold_warm_up_s[trial.number])
            measured = msgspec.structs.replace(measured, warm_up_s=warm_up_s, is_from_cache=False)
        return _remeasured(trial, measured)

    def _beside_the_baseline(self, trial: Trial) -> Measurement:
        assert trial.measurement is not None
        return sped_up(trial.measurement, slowdown(trial, self._history.reference.pulse_s))

    def _may_be_faster(self, trial: Trial) -> bool:
        """Than the plain baseline, whatever is expected of its knobs: it was not surely slower in turns, and by its own
        trial or in turns it was as fast."""
        in_turns, reference = self.speedup(trial), self._history.reference.measurement
        if in_turns.ratio >= 1 or trial.measurement is None or reference is None:
            return in_turns.ratio >= 1
        return in_turns.high >= 1 and self._beside_the_baseline(trial).samples_per_s >= reference.samples_per_s

    def _fast_enough(self, rivals: list[Final], aim: Aim) -> list[Final]:
        min_speed = self._task.settings.min_speed
        if min_speed is None or aim == FASTEST:
            return rivals
        least = min_speed * max((final.measurement.samples_per_s for final in rivals), default=0.0)
        return [final for final in rivals if final.measurement.samples_per_s >= least]

    def _loss(self, final: Final, aim: Aim) -> float:
        """What the aim minimises, by a race's figures; infinite where they lack it."""
        loss = loss_of(_remeasured(final.trial, final.measurement), aim, self._task.planned)
        return math.inf if loss is None else loss  # a counter that could not be read in the end


def _finals(race: Race | None) -> list[Final]:
    return race.finals() if race and race.num_rounds >= MIN_RACED else []


def _remeasured(trial: Trial, measurement: Measurement) -> Trial:
    """The trial with later figures."""
    assert trial.measurement is not None
    measurement = trial.measurement.measured_again(measurement)
    return msgspec.structs.replace(trial, measurement=measurement, samples_per_s=measurement.samples_per_s)
