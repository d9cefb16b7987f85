"""The trials of a search: which is next, how long it may take, when there have been enough."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from autotune.measurement import Trial
from autotune.pace import drift_doubt, slowdown, with_beats_around
from autotune.passes import Way
from autotune.search.guess import compiled_guess
from autotune.search.history import History
from autotune.search.journal import MAX_STARTS, Journal
from autotune.search.memory import Fit, MemoryModel
from autotune.search.objective import FASTEST, Aim, hopeless
from autotune.search.sampling import Proposal, Sampler
from autotune.search.settings import Observer
from autotune.search.task import Task
from autotune.strategy import Strategy
from autotune.trial.pulse import Pulse
from autotune.trial.runner import ONCE, ORDINARY, Session, TrialEndedError, once, ordinary, run_trial
from autotune.trial.worker import Progress, TimeWays

MIN_TIMEOUT_S = 20.0
"""However little is left of the budget, a trial gets so long."""
SILENCE_S = 20.0
"""A trial that says nothing for this and four of the baseline's steps hangs."""


class Trials:
    """Makes the trials of a search, and goes on with those of its earlier, interrupted runs."""

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
        self._task, self._observer, self._journal, self.pulse = task, observer, journal, pulse
        self.search = journal.name
        """The search's, in the journal."""
        self._run, self._clock = run or run_trial, clock
        self.history = History(task, journal.trials)  # the journal adds to it
        self._memory = MemoryModel()
        for trial in self.history.all:
            self._memory.learn(trial)
        self._sampler = Sampler(
            task.space,
            journal.study,
            seed=task.settings.seed,
            seen=[trial.strategy for trial in self.history.all],
            chances=self._chances,
        )
        self._doubts: dict[tuple[str, Any], float] = {}
        self._fit: Fit | None = None
        self._pulse_s: float | None = None
        self.is_settled = False
        """Whether it ended because no other trial was expected to be worth its time."""
        self.is_time_up = False
        """Whether it ended because no other trial fits into the budget."""
        self._start = clock() - journal.spent_s

    def run(self, reserved_s: Callable[[], float]) -> None:
        """Tries until the budget is spent but for what ``reserved_s`` says, or there is nothing left to try."""
        task, history = self._task, self.history
        if history.all:
            self._observer.on_resume(history.all, history.best(), self._journal.spent_s)
        else:
            self.try_now(task.baseline, "plain baseline")
        if history.reference.measurement is None:
            return
        if self._journal.interrupted is not None:
            strategy, starts = self._journal.interrupted
            if starts < MAX_STARTS:
                self.try_now(strategy, "again, the search was killed in it")
            else:
                self._give_up(strategy, starts)
        origins = self._beginnings()
        for strategy in origins:
            self._sampler.enqueue(strategy)
        while self._goes_on(reserved_s):
            stale = history.stale(self._pulse_s)
            if stale is not None:
                self.try_now(stale.strategy, "the best again: the device's speed has changed")
                continue
            self._doubts = history.doubtful()
            self._fit = Fit(self._memory, task.space.values, history.all, task.memory_limit_bytes)
            aim = self._aim
            known, cost_s, prior = history.known(aim), history.cost(aim), history.prior(aim)
            proposal = self._sampler.propose(known, cost_s, prior)
            if proposal is None:
                break
            if not self._pays(proposal):
                self.is_settled = True
                break
            left_s = self._left_s(reserved_s)
            if proposal.cost_s > left_s:
                proposal = self._sampler.propose(known, cost_s, prior, left_s)
                if proposal is None or not self._pays(proposal):
                    self.is_time_up = True
                    break
            self._sampler.take(proposal)
            self._try(proposal.strategy, origins.get(proposal.strategy, "search"))
        self._leave_device()

    def _beginnings(self) -> dict[Strategy, str]:
        """What is tried behind the baseline, and whose idea it is."""
        task = self._task
        baseline = self.history.reference.measurement
        assert baseline is not None
        ways = task.timed_ways(baseline)
        guess = task.guess(baseline, self._seconds_of(ways) if ways else None)
        found = {guess: "expert's guess"}
        compiled = compiled_guess(task.space, task.backend, guess)
        if compiled is not None:
            found[compiled] = "expert's guess, compiled"
        if task.known_good is not None:
            found.setdefault(task.space.nearest(task.known_good, guess), "as in the nearest profile")
        return {s: origin for s, origin in found.items() if s != task.baseline and task.space.refusal(s) is None}

    def _seconds_of(self, ways: TimeWays) -> dict[Way, float]:
        """Of a step in each way; none where its process does not end well: what is wrong will show in a trial."""
        self._observer.on_guess()
        baseline, limit_bytes = self._task.baseline, self._task.machine_limit_bytes
        try:
            with Session(
                self._task.job(baseline), memory_limit_bytes=limit_bytes, silence_s=self.silence_s(baseline)
            ) as session:
                return session.time_ways(ways, timeout_s=self.timeout_s(baseline))
        except TrialEndedError:
            return {}

    def try_now(self, strategy: Strategy, origin: str) -> None:
        """Tries this one next, even where it was tried before."""
        self._sampler.enqueue(strategy, again=True)
        proposal = self._sampler.ask()
        assert proposal is not None
        self._try(proposal.strategy, origin)

    def reconsider(self) -> None:
        """Tries the fastest of those again that were given up against a setting that has now failed, where it looks
        faster than what is left."""
        ended = {trial.strategy for trial in self.history.all if trial.outcome != "pruned"}
        given_up = [trial for trial in self.history.all if trial.outcome == "pruned" and trial.strategy not in ended]
        hopeful, best = max(given_up, key=self.history.rate, default=None), self.history.best()
        if hopeful is not None and (best is None or self.history.rate(hopeful) > self.history.rate(best)):
            self.try_late(hopeful.strategy, "given up before")

    def try_late(self, strategy: Strategy, origin: str) -> Trial | None:
        """Tries this one when the others are over; None where it cannot win."""
        self.try_now(strategy, origin)
        self._leave_device()
        tried = self.history.all[-1]
        return tried if tried in self.history.usable() else None

    def timeout_s(self, strategy: Strategy) -> float:
        """A trial's limit: a third of the budget, half of it for what compiles until such a one was not done in that,
        and no more than is left of it. The first after the baseline, which may be the only one, has as long as that
        would have taken with as many laps."""
        budget_s, history = self._task.settings.budget_s, self.history
        if budget_s is None or strategy == self._task.baseline:
            return 600.0
        least_s = MIN_TIMEOUT_S
        if len(history.all) == 1:
            more_s = (ORDINARY.least_laps - ONCE.least_laps) * (history.reference_step_s or 0.0)
            least_s = max(least_s, history.reference.wall_s + more_s)
        compiles = self._task.compiles
        has_waited = any(trial.outcome == "timeout" and compiles(trial.strategy) for trial in history.all)
        share = 1 / 2 if compiles(strategy) and not has_waited else 1 / 3
        return max(least_s, min(share * budget_s, budget_s - self.elapsed_s()))

    def silence_s(self, strategy: Strategy) -> float:
        """How long its process may say nothing: several of the baseline's steps; compilers say nothing for minutes."""
        step_s = self.history.reference_step_s
        return math.inf if step_s is None or self._task.compiles(strategy) else SILENCE_S + 4 * step_s

    def elapsed_s(self) -> float:
        """Seconds that the search has taken, its interrupted runs included."""
        return self._clock() - self._start

    def _try(self, strategy: Strategy, origin: str) -> None:
        number, task = len(self.history.all), self._task
        aim = self._aim
        best = self.history.best(aim)
        self._observer.on_trial_start(number, strategy, origin)
        self._journal.start(strategy)
        before_s = self._pulse_s or (None if self.pulse.file() else self.pulse.beat())
        before = self.history.last_finished().get(strategy)
        rival = best if best and best.samples_per_s and before is None and aim == FASTEST else None

        def give_up(progress: Progress) -> str | None:
            if rival is None or rival.samples_per_s is None:
                return None
            now_s = progress.pulse_s or before_s
            rate = rival.samples_per_s * slowdown(rival, now_s) / math.exp(drift_doubt(rival, now_s))
            return hopeless(progress, rate, task.compiles(strategy))

        trial = self._run(
            number,
            task.job(strategy),
            timeout_s=self.timeout_s(strategy),
            silence_s=self.silence_s(strategy),
            memory_limit_bytes=task.memory_limit_bytes if number else task.machine_limit_bytes,
            command=ordinary(self.pulse) if number else once(self.pulse),
            pulse=self.pulse,
            hopeless=give_up,
            on_progress=self._observer.on_progress,
        )
        self._pulse_s = trial.pulse_s if trial.has_beats else self.pulse.beat()
        trial = with_beats_around(trial, before_s, self._pulse_s)
        if before and before.measurement and trial.measurement:
            both = before.measurement.measured_again(trial.measurement)
            trial = msgspec.structs.replace(trial, measurement=both)
        self._record(trial)

    def _give_up(self, strategy: Strategy, starts: int) -> None:
        """On record without a trial: it may be what takes the machine down."""
        self._sampler.enqueue(strategy, again=True)
        self._sampler.ask()
        reason = f"the search was killed {starts} times while it ran"
        self._record(Trial(number=len(self.history.all), strategy=strategy, outcome="crashed", reason=reason))

    def _record(self, trial: Trial) -> None:
        self._journal.record(trial, self._sampler.asked, self.elapsed_s())
        self._memory.learn(trial)
        self._sampler.tell(self.history.loss(trial, self._task.aims[0]))
        self._observer.on_trial_end(trial, self.history.best())

    def _goes_on(self, reserved_s: Callable[[], float]) -> bool:
        settings = self._task.settings
        if settings.max_trials is not None and len(self.history.all) >= settings.max_trials:
            return False
        if settings.budget_s is None or len(self.history.all) < 2:
            return True
        typical_s = statistics.median(trial.wall_s for trial in self.history.all[1:])
        self.is_time_up = typical_s >= self._left_s(reserved_s)
        return not self.is_time_up

    def _left_s(self, reserved_s: Callable[[], float]) -> float:
        """Of the budget, for trials; not less than nothing, which is what queued proposals say they cost."""
        budget_s = self._task.settings.budget_s
        return math.inf if budget_s is None else max(0.0, budget_s - reserved_s() - self.elapsed_s())

    @property
    def _aim(self) -> Aim:
        """What the next trial is for: each aim in its turn."""
        return self._task.aims[len(self.history.all) % len(self._task.aims)]

    def _pays(self, proposal: Proposal) -> bool:
        """Whether the planned run is expected to be shorter by more than the trial takes."""
        settings, best = self._task.settings, self.history.best()
        if proposal.gain is None or best is None or settings.max_trials is not None or self._task.aims != (FASTEST,):
            return True
        loss = self.history.loss(best, FASTEST)
        return loss is None or proposal.gain * loss > proposal.cost_s

    def _chances(self, strategies: Sequence[Strategy]) -> list[float]:
        """How likely each is to run, were nothing known but what failed and what memory is left; 0 where it need not
        be tried."""
        fits = self._fit.chances(strategies) if self._fit else [1.0] * len(strategies)
        keeps_up = self.history.loader_keeps_up()
        return [
            0.0 if strategy.workers > 0 and keeps_up else fit * self._trust(strategy)
            for strategy, fit in zip(strategies, fits, strict=True)
        ]

    def _trust(self, strategy: Strategy) -> float:
        """1 where none of its values was in failed trials alone."""
        doubts = (doubt for (knob, value), doubt in self._doubts.items() if getattr(strategy, knob) == value)
        return float(0.5 ** sum(doubts))

    def _leave_device(self) -> None:
        if not self.pulse.pauses:  # the pulse takes an accelerator's memory
            self.pulse.close()
        self._pulse_s = None
