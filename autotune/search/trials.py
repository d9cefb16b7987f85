"""The trials of a search: which is next, how long it may take, what is on record, and which are the best so far."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from autotune.errors import AutotuneError
from autotune.measurement import Measurement, Outcome, Trial
from autotune.search.explain import Share, estimated
from autotune.search.journal import MAX_STARTS, Journal
from autotune.search.memory import MemoryModel
from autotune.search.objective import FASTEST, Aim, drift_doubt, held_to_speed, hopeless, loss_of, slowdown
from autotune.search.proof import Proof
from autotune.search.sampling import Proposal, Sampler
from autotune.search.settings import Observer
from autotune.search.space import expert_guess
from autotune.search.surrogate import USUAL_OF_MEMORY, Known, Surrogate, usual_of
from autotune.search.task import Task
from autotune.strategy import Strategy
from autotune.trial.pulse import Pulse
from autotune.trial.runner import run_trial
from autotune.trial.worker import Progress

NUM_FINALISTS = 3
CLOSE_TO_BEST = 1.15
"""Settings whose trial came within this factor of the best enter the race."""
MIN_TIMEOUT_S = 20.0
"""However little is left of the budget, a trial gets so long."""
LAPS = 6
"""Steps of an ordinary trial, about: what its time grows with."""
START_S, COMPILE_S = 1.0, 40.0
"""What a trial takes beyond its steps before one was tried, and what a compiled one does."""
NOISE, NOISE_PRUNED = 0.03, 0.15
"""Relative standard deviation of a trial's figure at best, and of one that was given up after two laps."""
TOO_DOUBTFUL = 0.1
"""The best is measured again where the device's drift since makes its figure so uncertain."""
NO_WAIT = 0.01
"""A loader that takes less than this share of the step's time is fast enough."""
FAILED: tuple[Outcome, ...] = ("crashed", "invalid", "diverged", "timeout", "oom")
ENOUGH_FAILURES = 2
"""A knob's value that alone can be to blame for so many failed trials is not tried again."""
SILENCE_S = 20.0
"""A trial that says nothing for this and four of the baseline's steps hangs."""


class Trials:
    """All trials of a search, those of its earlier, interrupted runs included; the first is the plain baseline's."""

    def __init__(
        self,
        task: Task,
        observer: Observer,
        journal: Journal,
        pulse: Pulse,
        *,
        run: Callable[..., Trial] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``run`` stands in for ``run_trial`` and ``clock`` for the wall's, where a recorded grid is searched."""
        self._task, self._observer, self._journal, self._pulse = task, observer, journal, pulse
        self._run, self._clock = run or run_trial, clock
        self.aims = task.aims
        self.all = journal.trials  # the journal adds to it
        self.failures: dict[int, Proof] = {}
        """Why a setting that was fine in its trial cannot win all the same, by its trial's number."""
        self._memory = MemoryModel()
        for trial in self.all:
            self._memory.learn(trial)
        self._sampler = Sampler(
            task.space,
            journal.study,
            seed=task.settings.seed,
            seen=[trial.strategy for trial in self.all],
            chance=self._chance,
        )
        self._doubts: dict[tuple[str, Any], float] = {}
        self._pulse_s: float | None = None
        self.is_settled = False
        """Whether it ended because no other trial was expected to be worth its time."""
        self._start = clock() - journal.spent_s

    @property
    def reference(self) -> Trial:
        """The plain baseline's trial."""
        return self.all[0]

    @property
    def reference_step_s(self) -> float | None:
        """Seconds of the plain baseline's step; None until it is measured."""
        measured = self.all[0].measurement if self.all else None
        return None if measured is None else measured.step_ms / 1000

    def run(self, reserved_s: Callable[[], float]) -> None:
        """Tries until the budget is spent but for what ``reserved_s`` says, or there is nothing left to try."""
        task = self._task
        if self.all:
            self._observer.on_resume(self.all, self.best(), self._journal.spent_s)
        else:
            self.try_now(task.baseline, "plain baseline")
        if self.reference.measurement is None:
            return
        if self.aims[0].is_energy and self.reference.measurement.joules_per_sample is None:
            self._journal.finish()  # going on would come to the same end
            raise AutotuneError("this device has no energy counter that can be read; choose another --objective")
        if self._journal.interrupted is not None:
            strategy, starts = self._journal.interrupted
            if starts < MAX_STARTS:
                self.try_now(strategy, "again, the search was killed in it")
            else:
                self._give_up(strategy, starts)
        origins = self._beginnings() if len(self.all) <= 2 else {}  # the second of a killed search may be the guess
        for strategy in origins:
            self._sampler.enqueue(strategy)
        while self._goes_on(reserved_s):
            stale = self._stale()
            if stale is not None:
                self.try_now(stale.strategy, "the best again: the device's speed has changed")
                continue
            self._doubts = self._doubtful()
            aim = self._aim
            proposal = self._sampler.propose(self._known(aim), self._cost(aim), usual_of(aim.memory))
            if proposal is None:
                break
            if not self._pays(proposal):
                self.is_settled = True
                break
            self._sampler.take(proposal)
            self._try(proposal.strategy, origins.get(proposal.strategy, "search"))
        self._stop_pulse()

    def _beginnings(self) -> dict[Strategy, str]:
        """What is tried behind the baseline, and whose idea it is."""
        task = self._task
        found = {expert_guess(task.space, task.hardware, task.backend): "expert's guess"}
        if task.known_good is not None:
            found.setdefault(task.space.nearest(task.known_good), "as in the nearest profile")
        return {s: origin for s, origin in found.items() if s != task.baseline and task.space.refusal(s) is None}

    def try_now(self, strategy: Strategy, origin: str) -> None:
        """Tries this one next, even where it was tried before."""
        self._sampler.enqueue(strategy, again=True)
        proposal = self._sampler.ask()
        assert proposal is not None
        self._try(proposal.strategy, origin)

    def reconsider(self) -> None:
        """Tries the fastest of those again that were given up against a setting that has now failed, where it looks
        faster than what is left."""
        ended = {trial.strategy for trial in self.all if trial.outcome != "pruned"}
        given_up = [trial for trial in self.all if trial.outcome == "pruned" and trial.strategy not in ended]
        hopeful, best = max(given_up, key=self._rate, default=None), self.best()
        if hopeful is not None and (best is None or self._rate(hopeful) > self._rate(best)):
            self.try_late(hopeful.strategy, "given up before")

    def try_late(self, strategy: Strategy, origin: str) -> Trial | None:
        """Tries this one when the others are over; None where it cannot win."""
        self.try_now(strategy, origin)
        self._stop_pulse()
        tried = self.all[-1]
        return tried if tried in self._usable() else None

    def estimated_shares(self, best: Strategy) -> tuple[Share, ...]:
        """What each knob of a setting brings to the speed, by all trials; nothing where that is not what is wanted."""
        known = self._known(FASTEST)
        if len(known) < 2 or self.aims[0] != FASTEST:
            return ()
        surrogate = Surrogate(self._task.space.values, known)
        return estimated(surrogate, best, self._task.baseline, self._task.space)

    def likely_peaks_bytes(self, strategies: Sequence[Strategy]) -> list[int]:
        """Peak memory of each, by all trials; most take less."""
        known = [
            Known(trial.strategy, trial.measurement.peak_memory_bytes, NOISE) for trial in self.all if trial.measurement
        ]
        mean, deviation = Surrogate(self._task.space.values, known, USUAL_OF_MEMORY).predict(strategies)
        return [int(peak) for peak in np.exp(mean + deviation)]

    def finalists(self) -> list[Trial]:
        """The best few by their own figures, the best first; of each aim the best, where there are several."""
        ranked = [self._ranked(aim) for aim in self.aims]
        num_close = NUM_FINALISTS if len(self._task.sought) == 1 else 1
        close = [trial for loss, trial in ranked[0][:num_close] if loss <= ranked[0][0][0] * CLOSE_TO_BEST]
        others = [trial for found in ranked[1:] for _, trial in found[:1]]
        return list({trial.number: trial for trial in [*close, *others]}.values())

    def best(self, aim: Aim | None = None) -> Trial | None:
        """The best that may win, by its own figures; that of the first aim, unless another is named."""
        ranked = self._ranked(aim or self.aims[0])
        return ranked[0][1] if ranked else None

    def _ranked(self, aim: Aim) -> list[tuple[float, Trial]]:
        """Those that are fast enough, where any is."""
        bar = self._least_rate(aim)
        losses = [(loss, trial) for trial in self._usable() if (loss := self._loss(trial, aim, bar)) is not None]
        fast = [pair for pair in losses if self._rate(pair[1]) >= bar]
        return sorted(fast or losses, key=lambda pair: pair[0])

    def may_win(self, trial: Trial, measurement: Measurement) -> bool:
        """Whether it fits the limit by these figures, and has not failed since its trial."""
        return not self.has_failed(trial.strategy) and self._task.fits(measurement)

    def has_failed(self, strategy: Strategy) -> bool:
        """Whether it has failed since its trial, in the race or in the last test."""
        return any(self.all[number].strategy == strategy for number in self.failures)

    def timeout_s(self, strategy: Strategy) -> float:
        """A trial's limit: a third of the budget, and no more than is left of it."""
        budget_s = self._task.settings.budget_s
        if budget_s is None or strategy == self._task.baseline:
            return 600.0
        return max(MIN_TIMEOUT_S, min(budget_s / 3, budget_s - self.elapsed_s()))

    def silence_s(self, strategy: Strategy) -> float:
        """How long its process may say nothing: several of the baseline's steps; compilers say nothing for minutes."""
        step_s = self.reference_step_s
        return math.inf if step_s is None or self._task.compiles(strategy) else SILENCE_S + 4 * step_s

    def elapsed_s(self) -> float:
        """Seconds that the search has taken, its interrupted runs included."""
        return self._clock() - self._start

    def _try(self, strategy: Strategy, origin: str) -> None:
        number, task = len(self.all), self._task
        aim = self._aim
        best = self.best(aim)
        self._observer.on_trial_start(number, strategy, origin)
        self._journal.start(strategy)
        before_s = self._pulse_s or self._pulse.beat()
        before = self._last_finished().get(strategy)
        best_samples_per_s = None
        if best and best.samples_per_s and before is None and aim == FASTEST:
            doubt = math.exp(drift_doubt(best.pulse_s, before_s))
            best_samples_per_s = best.samples_per_s * slowdown(best.pulse_s, before_s) / doubt

        def give_up(progress: Progress) -> str | None:
            is_compiled = task.compiles(strategy)
            return hopeless(progress, best_samples_per_s, is_compiled) if best_samples_per_s else None

        trial = self._run(
            number,
            task.job(strategy),
            timeout_s=self.timeout_s(strategy),
            silence_s=self.silence_s(strategy),
            memory_limit_bytes=task.memory_limit_bytes if number else task.machine_limit_bytes,
            hopeless=give_up,
            on_progress=self._observer.on_progress,
        )
        self._pulse_s = self._pulse.beat()
        if before_s and self._pulse_s:
            trial = msgspec.structs.replace(trial, pulse_s=math.sqrt(before_s * self._pulse_s))
        if before and before.measurement and trial.measurement:
            both = before.measurement.measured_again(trial.measurement)
            trial = msgspec.structs.replace(trial, measurement=both)
        self._record(trial)

    def _give_up(self, strategy: Strategy, starts: int) -> None:
        """On record without a trial: it may be what takes the machine down."""
        self._sampler.enqueue(strategy, again=True)
        self._sampler.ask()
        reason = f"the search was killed {starts} times while it ran"
        self._record(Trial(number=len(self.all), strategy=strategy, outcome="crashed", reason=reason))

    def _record(self, trial: Trial) -> None:
        self._journal.record(trial, self._sampler.asked, self.elapsed_s())
        self._memory.learn(trial)
        self._sampler.tell(self._loss(trial, self.aims[0]))
        self._observer.on_trial_end(trial, self.best())

    def _goes_on(self, reserved_s: Callable[[], float]) -> bool:
        settings = self._task.settings
        if settings.max_trials is not None and len(self.all) >= settings.max_trials:
            return False
        if settings.budget_s is None or len(self.all) < 2:
            return True
        typical_s = statistics.median(trial.wall_s for trial in self.all[1:])
        return self.elapsed_s() + typical_s < settings.budget_s - reserved_s()

    # What the sampler is told

    @property
    def _aim(self) -> Aim:
        """What the next trial is for: each aim in its turn."""
        return self.aims[len(self.all) % len(self.aims)]

    def _known(self, aim: Aim) -> list[Known]:
        """What was tried and how sure its figures are."""
        known, may_win, bar = [], {trial.number for trial in self._usable()}, self._least_rate(aim)
        for trial in self.all:
            loss = self._loss(trial, aim, bar)
            # what is over the limit would draw the search to more of its kind
            if loss is not None and (trial.measurement is None or self._task.fits(trial.measurement)):
                known.append(Known(trial.strategy, loss, self._noise(trial, aim), may_win=trial.number in may_win))
        return known

    def _noise(self, trial: Trial, aim: Aim) -> float:
        if aim.memory == 1:
            return NOISE
        drift = drift_doubt(trial.pulse_s, self._usual_pulse_s)
        laps = trial.measurement.epoch_s if trial.measurement else ()
        error = statistics.stdev(laps) / statistics.mean(laps) / math.sqrt(len(laps)) if len(laps) > 1 else math.inf
        return math.hypot(min(max(error, NOISE), NOISE_PRUNED), drift)

    def _cost(self, aim: Aim) -> Callable[[Strategy, float], float]:
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

    def _pays(self, proposal: Proposal) -> bool:
        """Whether the planned run is expected to be shorter by more than the trial takes."""
        settings, best = self._task.settings, self.best()
        if proposal.gain is None or best is None or settings.max_trials is not None or self.aims != (FASTEST,):
            return True
        loss = self._loss(best, FASTEST)
        return loss is None or proposal.gain * loss > proposal.cost_s

    def _chance(self, strategy: Strategy) -> float:
        """How likely it is to run, were nothing known but what failed; 0 where it need not be tried."""
        is_over = self._memory.is_over(strategy, self._task.memory_limit_bytes)
        if is_over or (strategy.workers > 0 and self._loader_keeps_up()):
            return 0.0
        doubts = (doubt for (knob, value), doubt in self._doubts.items() if getattr(strategy, knob) == value)
        return 0.5 ** sum(doubts)

    def _doubtful(self) -> dict[tuple[str, Any], float]:
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

    def _loader_keeps_up(self) -> bool:
        """Whether nothing that was measured waited for data: loader processes could only take cores away."""
        waits = [trial.measurement.loader_wait for trial in self.all if trial.measurement]
        return max(waits, default=1.0) < NO_WAIT

    def _stale(self) -> Trial | None:
        """The best, where too much has changed since it was measured for others to be compared with it."""
        best = self.best()
        if best is None or best is self.reference or self.all[-1].strategy == best.strategy or self.aims[0].memory == 1:
            return None
        return best if drift_doubt(best.pulse_s, self._pulse_s) > TOO_DOUBTFUL else None

    def _usable(self) -> list[Trial]:
        """What may win; a setting's last figures where it was measured several times."""
        finished = [trial for trial in self._last_finished().values() if trial.outcome == "ok"]
        return [trial for trial in finished if trial.measurement and self.may_win(trial, trial.measurement)]

    def _last_finished(self) -> dict[Strategy, Trial]:
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
        return min_speed * max(map(self._rate, self._usable()), default=0.0)

    def _loss(self, trial: Trial, aim: Aim, least_rate: float = 0.0) -> float | None:
        """At the speed that the device usually had in this search; raised where a setting is slower than it may be."""
        loss = loss_of(trial, aim, self._task.planned, pulse_s=self._usual_pulse_s, reference=self.reference)
        return loss if loss is None or not least_rate else held_to_speed(loss, self._rate(trial), least_rate)

    def _rate(self, trial: Trial) -> float:
        """Samples a second, at the speed that the device usually had in this search."""
        return (trial.samples_per_s or 0.0) * slowdown(trial.pulse_s, self._usual_pulse_s)

    def _stop_pulse(self) -> None:
        self._pulse.close()
        self._pulse_s = None
