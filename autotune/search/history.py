"""What the trials so far say: which are the best, how sure that is, what failed and why, what the surrogate is told.

Nothing is run here and nothing is written: all of it follows from the list of trials and the task.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autotune.cost import MIN_FITTED
from autotune.measurement import Measurement, Outcome, Trial
from autotune.pace import drift_doubt, slowdown
from autotune.search import memory
from autotune.search.explain import Share, estimated
from autotune.search.objective import FASTEST, Aim, held_to_speed, loss_of
from autotune.search.proof import Proof
from autotune.search.surrogate import PRIOR_OF_MEMORY, Known, Prior, Surrogate
from autotune.search.task import NO_WAIT, Task
from autotune.strategy import Strategy

NUM_FINALISTS = 3
CLOSE_TO_BEST, CLOSE_WITHIN = 1.15, 1.08
"""Settings whose trial came within this factor of the best enter the race; the second where it was timed with beats."""
LAPS = 6
"""Steps of an ordinary trial, about: what its time grows with."""
START_S, COMPILE_S = 1.0, 40.0
"""What a trial takes beyond its steps before one was tried, and what a compiled one does."""
NOISE, NOISE_PRUNED = 0.05, 0.15
"""Relative standard deviation of a trial's seconds at best, and of one that was given up after two laps."""
NOISE_WITHIN, NOISE_LAP = 0.03, 0.05
"""At best where the device's speed is known all along, and of a single lap then (docs/LOG.md 2026-11-23)."""
TOO_DOUBTFUL = 0.1
"""The best is measured again where the device's drift since makes its figure so uncertain."""
FAILED: tuple[Outcome, ...] = ("crashed", "invalid", "diverged", "timeout", "oom")
ENOUGH_FAILURES = 2
"""A knob's value that alone can be to blame for so many failed trials is not tried again."""


class History:
    """All trials of a search, those of its earlier, interrupted runs included; the first is the plain baseline's."""

    def __init__(self, task: Task, trials: list[Trial]) -> None:
        """``trials`` grows as the search goes on."""
        self._task = task
        self.all = trials
        self.failures: dict[int, Proof] = {}
        """Why a setting that was fine in its trial cannot win all the same, by its trial's number."""

    @property
    def reference(self) -> Trial:
        """The plain baseline's trial."""
        return self.all[0]

    @property
    def reference_step_s(self) -> float | None:
        """Seconds of the plain baseline's step; None until it is measured."""
        measured = self.all[0].measurement if self.all else None
        return None if measured is None else measured.step_ms / 1000

    def estimated_shares(self, best: Strategy) -> tuple[Share, ...]:
        """What each knob of a setting brings to the speed, by all trials; nothing where that is not what is wanted."""
        known = self.known(FASTEST)
        if len(known) < 2 or self._task.aims[0] != FASTEST:
            return ()
        surrogate = Surrogate(self._task.space.values, known, self.prior(FASTEST))
        return estimated(surrogate, best, self._task.baseline, self._task.space)

    def likely_peaks_bytes(self, strategies: Sequence[Strategy]) -> list[int]:
        """What the process of each takes at its peak, by all trials; most take less."""
        surrogate = Surrogate(self._task.space.values, memory.peaks(self.all), PRIOR_OF_MEMORY)
        mean, deviation = surrogate.predict(strategies)
        return [int(peak) + self._task.context_bytes for peak in np.exp(mean + deviation)]

    def finalists(self, num_finalists: int = NUM_FINALISTS) -> list[Trial]:
        """The best few, the best first; of each aim the best, where there are several."""
        ranked = [self._ranked(aim) for aim in self._task.aims]
        num_close = num_finalists if len(self._task.sought) == 1 else 1
        close = [
            trial
            for loss, trial in ranked[0][:num_close]
            if loss <= ranked[0][0][0] * (CLOSE_WITHIN if trial.has_beats else CLOSE_TO_BEST)
        ]
        if all(trial is self.reference for trial in close):
            # drift may be corrected for wrongly: what was faster by the clock is raced before it is dropped
            bar = self.reference.samples_per_s or 0.0
            close += [trial for _, trial in ranked[0] if (trial.samples_per_s or 0.0) > bar][:1]
        others = [trial for found in ranked[1:] for _, trial in found[:1]]
        return list({trial.number: trial for trial in [*close, *others]}.values())

    def best(self, aim: Aim | None = None) -> Trial | None:
        """The best that may win, by the trials; that of the first aim, unless another is named."""
        ranked = self._ranked(aim or self._task.aims[0])
        return ranked[0][1] if ranked else None

    def _ranked(self, aim: Aim) -> list[tuple[float, Trial]]:
        """Those that are fast enough, where any is, with what all trials together expect each to take: figures of their
        own would crown the luckiest."""
        bar = self._least_rate(aim)
        usable = [trial for trial in self.usable() if self.loss(trial, aim, bar) is not None]
        contenders = [trial for trial in usable if self.rate(trial) >= bar] or usable
        if not contenders:
            return []
        surrogate = Surrogate(self._task.space.values, self.known(aim), self.prior(aim))
        expected, _ = surrogate.predict([trial.strategy for trial in contenders])
        ranked = sorted(zip(expected.tolist(), contenders, strict=True), key=lambda pair: pair[0])
        return [(math.exp(log), trial) for log, trial in ranked]

    def may_win(self, trial: Trial, measurement: Measurement) -> bool:
        """Whether it fits the limit by these figures, and has not failed since its trial."""
        return not self.has_failed(trial.strategy) and self._task.fits(measurement)

    def has_failed(self, strategy: Strategy) -> bool:
        """Whether it has failed since its trial, in the race or in the last test."""
        return any(self.all[number].strategy == strategy for number in self.failures)

    def stale(self, pulse_s: float | None) -> Trial | None:
        """The best, where the device has changed too much since for others to be compared with it."""
        best, is_for_memory = self.best(), self._task.aims[0].memory == 1
        if best is None or best is self.reference or self.all[-1].strategy == best.strategy or is_for_memory:
            return None
        return best if drift_doubt(best, pulse_s) > TOO_DOUBTFUL else None

    def usable(self) -> list[Trial]:
        """What may win; a setting's last figures where it was measured several times."""
        finished = [trial for trial in self.last_finished().values() if trial.outcome == "ok"]
        return [trial for trial in finished if trial.measurement and self.may_win(trial, trial.measurement)]

    def last_finished(self) -> dict[Strategy, Trial]:
        """How each setting's last trial ended, but for those that were given up."""
        return {trial.strategy: trial for trial in self.all if trial.outcome != "pruned"}

    @property
    def _usual_pulse_s(self) -> float | None:
        beats = [trial.pulse_s for trial in self.all if trial.pulse_s]
        return statistics.median(beats) if beats else None

    def _least_rate(self, aim: Aim) -> float:
        """Samples a second that the winner of an aim must have."""
        min_speed = self._task.settings.min_speed
        if min_speed is None or aim == FASTEST:
            return 0.0
        return min_speed * max(map(self.rate, self.usable()), default=0.0)

    def loss(self, trial: Trial, aim: Aim, least_rate: float = 0.0) -> float | None:
        """At the speed that the device usually had in this search; raised where a setting is slower than it may be."""
        loss = loss_of(trial, aim, self._task.planned, pulse_s=self._usual_pulse_s, reference=self.reference)
        return loss if loss is None or not least_rate else held_to_speed(loss, self.rate(trial), least_rate)

    def rate(self, trial: Trial) -> float:
        """Samples a second, at the speed that the device usually had in this search."""
        return (trial.samples_per_s or 0.0) * slowdown(trial, self._usual_pulse_s)

    def slowdown_since(self, trial: Trial) -> float:
        """How many times slower than in that trial the device was in the last."""
        return slowdown(self.all[-1], trial.pulse_s)

    # What the sampler is told

    def known(self, aim: Aim) -> list[Known]:
        """What was tried and how sure its figures are."""
        known, may_win, bar = [], {trial.number for trial in self.usable()}, self._least_rate(aim)
        for trial in self.all:
            loss = self.loss(trial, aim, bar)
            # what is over the limit would draw the search to more of its kind
            if loss is not None and (trial.measurement is None or self._task.fits(trial.measurement)):
                known.append(Known(trial.strategy, loss, self.noise(trial, aim), may_win=trial.number in may_win))
        return known

    def noise(self, trial: Trial, aim: Aim) -> float:
        """How sure a trial's loss is: a relative standard deviation."""
        if aim.memory == 1:
            return memory.NOISE
        drift = drift_doubt(trial, self._usual_pulse_s)
        laps = trial.measurement.epoch_s if trial.measurement else ()
        if trial.has_beats and 0 < len(laps) < MIN_FITTED:  # what differs then are their lengths, which even out
            error = NOISE_LAP / math.sqrt(len(laps))
        else:
            error = float(np.std(laps, ddof=1) / np.mean(laps)) / math.sqrt(len(laps)) if len(laps) > 1 else math.inf
        least = NOISE_WITHIN if trial.has_beats else NOISE
        return math.hypot(min(max(error, least), NOISE_PRUNED), drift)

    def cost(self, aim: Aim) -> Callable[[Strategy, float], float]:
        """Gives the seconds that a trial of some strategy and expected loss takes: what others of its kind have taken
        beyond their steps, and its steps."""
        if aim != FASTEST:
            return lambda strategy, loss: 1.0
        beyond_s: dict[bool, list[float]] = {False: [], True: []}
        for trial in self.all:
            if trial.measurement is not None:
                steps_s = LAPS * trial.measurement.step_ms / 1000
                beyond_s[self._task.compiles(trial.strategy)].append(max(0.0, trial.wall_s - steps_s))
        eager_s, compiled_s = (
            statistics.median(found) if found else usual_s
            for found, usual_s in ((beyond_s[False], START_S), (beyond_s[True], COMPILE_S))
        )
        planned = self._task.planned
        num_steps = planned.epochs * planned.num_train / self._task.space.global_batch
        compiles = self._task.compiles
        return lambda strategy, loss: (compiled_s if compiles(strategy) else eager_s) + LAPS * loss / num_steps

    def doubtful(self) -> dict[tuple[str, Any], float]:
        """Knobs' values that were in failed trials alone, and how many failures each has to answer for: those that
        share a failure share the blame. Infinite where a value alone can be to blame for several."""

        def pairs(trial: Trial) -> list[tuple[str, Any]]:
            return [(knob, getattr(trial.strategy, knob)) for knob in self._task.space.values]

        fine = {pair for trial in self.all if trial.outcome in ("ok", "pruned") for pair in pairs(trial)}
        doubts: dict[tuple[str, Any], float] = {}
        alone: Counter[tuple[str, Any]] = Counter()
        for trial in self.all:
            suspects = [pair for pair in pairs(trial) if pair not in fine]
            if trial.outcome in FAILED:
                doubts |= {pair: doubts.get(pair, 0.0) + 1 / len(suspects) for pair in suspects}
                alone.update(suspects if len(suspects) == 1 else ())
        return doubts | {pair: math.inf for pair, count in alone.items() if count >= ENOUGH_FAILURES}

    def prior(self, aim: Aim) -> Prior:
        """What is expected of settings, by what their work is, and by how the fastest without loader processes waits
        for data."""
        alone = [trial for trial in self.all if trial.outcome == "ok" and not trial.strategy.workers]
        return self._task.prior(aim, max(alone, key=lambda trial: trial.samples_per_s or 0.0, default=None))

    def loader_keeps_up(self) -> bool:
        """Whether nothing that was measured waited for data: loader processes could only take cores away."""
        waits = [trial.measurement.loader_wait for trial in self.all if trial.measurement]
        return max(waits, default=1.0) < NO_WAIT
