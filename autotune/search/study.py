"""One search from the first trial to the winner: baseline, expert's guess, Optuna's proposals, the race of the best,
the last test of the winner."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from autotune import __version__
from autotune.backends.base import Backend
from autotune.errors import AutotuneError, InterruptedSearchError
from autotune.measurement import Interval, Measurement, Trial
from autotune.probe import Hardware
from autotune.search.finals import MAX_LAPS, MIN_ROUNDS, Entrant, Final, Race, ranked, speedup
from autotune.search.journal import MAX_STARTS, Journal, open_journal
from autotune.search.memory import MemoryModel
from autotune.search.objective import PlannedRun, hopeless, loss_of, slowdown
from autotune.search.proof import SOAK, Proof, prove, reference_losses
from autotune.search.result import Result
from autotune.search.sampling import Sampler
from autotune.search.settings import Observer, Settings
from autotune.search.space import Space, build_space, expert_guess
from autotune.stats import ratio_of_means
from autotune.strategy import Strategy, baseline
from autotune.trial.pulse import Pulse
from autotune.trial.runner import TrialEndedError, run_trial
from autotune.trial.worker import Job, Progress
from autotune.workloads.base import Workload, WorkloadRef

NUM_FINALISTS = 3
FINALS_SHARE = 0.3
"""At most this share of the budget goes to the race of the finalists."""
CLOSE_TO_BEST = 1.15
"""Settings whose trial came within this factor of the best enter the race."""
FREE_MEMORY_SHARE = 0.9
"""Without a budget of the user's, trials may take this much of the memory that is free when the search starts."""
MIN_TIMEOUT_S = 20.0
"""However little is left of the budget, a trial gets so long."""
SILENCE_S = 20.0
"""A trial that says nothing for this and four of the baseline's steps hangs."""
MAX_PROOFS = 6
"""So many settings may fail the last test before the plain baseline is taken."""


def search(
    ref: WorkloadRef,
    workload: Workload,
    hardware: Hardware,
    backend: Backend,
    settings: Settings,
    observer: Observer,
    *,
    journal_path: Path,
    is_fresh: bool = False,
    save: Callable[[Result], None] = lambda _: None,
) -> Result:
    """Searches until the budget is spent, the space is exhausted or the user interrupts.

    Every trial is in the journal when it ends; an unfinished search of the same kind is gone on with, unless
    ``is_fresh``. ``save`` gets the result; a search whose result could not be saved is unfinished. Raises AutotuneError
    when the baseline does not run, when nothing fits the memory budget, or when the journal cannot be written.
    """
    planned = PlannedRun(
        num_train=workload.num_train, num_test=workload.num_test, epochs=settings.epochs or workload.recipe.epochs
    )
    space = build_space(
        hardware,
        backend,
        workload,
        includes_slow=settings.includes_slow,
        has_memory_budget=settings.memory_budget_bytes is not None,
    )
    identity = _identity(ref, workload, hardware, settings, planned, space)
    with open_journal(journal_path, identity, is_fresh=is_fresh) as journal, Pulse(backend.name) as pulse:
        running = _Search(ref, workload, hardware, backend, settings, observer, planned, space, journal, pulse)
        running.run()
        try:
            found = running.result()
        except InterruptedSearchError:
            raise
        except AutotuneError:
            journal.finish()  # going on would come to the same end
            raise
        save(found)
        if not found.was_interrupted:
            journal.finish()
        return found


def _identity(
    ref: WorkloadRef,
    workload: Workload,
    hardware: Hardware,
    settings: Settings,
    planned: PlannedRun,
    space: Space,
) -> dict[str, Any]:
    """All that the figures of a search depend on; how long it may take is not among it."""
    return {
        "autotune": __version__,
        "device": hardware.device.fingerprint,
        "versions": hardware.device.versions,
        "workload": msgspec.to_builtins(ref),
        "recipe": msgspec.to_builtins(workload.recipe),
        "planned": msgspec.to_builtins(planned),
        "space": [list(map(list, space.values.items())), sorted(space.pairs)],
        "objective": settings.objective,
        "memory_budget_bytes": settings.memory_budget_bytes,
        "seed": settings.seed,
    }


class _Search:
    def __init__(
        self,
        ref: WorkloadRef,
        workload: Workload,
        hardware: Hardware,
        backend: Backend,
        settings: Settings,
        observer: Observer,
        planned: PlannedRun,
        space: Space,
        journal: Journal,
        pulse: Pulse,
    ) -> None:
        self.ref, self.hardware, self.backend = ref, hardware, backend
        self.settings, self.observer = settings, observer
        self.planned, self.space, self.journal, self.pulse = planned, space, journal, pulse
        self.baseline_strategy = baseline(workload.recipe.global_batch)
        self.memory_limit_bytes = settings.memory_budget_bytes or self._machine_limit()
        self.trials = journal.trials
        self.memory = MemoryModel()
        for trial in self.trials:
            self.memory.learn(trial)
        self.sampler = Sampler(
            space,
            journal.study,
            seed=settings.seed,
            seen=[trial.strategy for trial in self.trials],
            is_hopeless=lambda strategy: self.memory.is_over(strategy, self.memory_limit_bytes),
        )
        self.pulse_s: float | None = None
        self.race: Race | None = None
        self.failures: dict[int, Proof] = {}
        """Why a setting that was fine in its trial cannot win, by its trial's number."""
        self.winner: tuple[Trial, Proof | None] | None = None
        self.was_interrupted = False
        self.start = time.monotonic() - journal.spent_s

    def run(self) -> None:
        """Trials, race and last test, as far as the user lets them come."""
        self.observer.on_space(self.space)
        try:
            self._trials()
            self.pulse.close()
            self.pulse_s = None
            self._race()
            self._prove()
        except KeyboardInterrupt:
            self.was_interrupted = True
            self.journal.stop()

    # The trials

    def _trials(self) -> None:
        if self.trials:
            self.observer.on_resume(self.trials, self.best(), self.journal.spent_s)
        else:
            self._next(self.baseline_strategy, "plain baseline", memory_limit_bytes=self._machine_limit())
        if self.trials[0].measurement is None:
            return
        origin = "search"
        if self.journal.interrupted is not None:
            strategy, starts = self.journal.interrupted
            if starts < MAX_STARTS:
                self._next(strategy, "again, the search was killed in it")
            else:
                self._give_up(strategy, starts)
        if len(self.trials) == 1:
            guess = expert_guess(self.space, self.hardware, self.backend)
            self.sampler.enqueue(guess)
            origin = "expert's guess" if guess != self.baseline_strategy else "search"
        while self._goes_on():
            best = self.best()
            asked = self.sampler.ask(near=best.strategy if best else None)
            if asked is None:
                return
            self._try(asked, origin)
            origin = "search"

    def _next(self, strategy: Strategy, origin: str, memory_limit_bytes: int | None = None) -> None:
        self.sampler.enqueue(strategy, again=True)
        asked = self.sampler.ask()
        assert asked == strategy
        self._try(strategy, origin, memory_limit_bytes)

    def _try(self, strategy: Strategy, origin: str, memory_limit_bytes: int | None = None) -> None:
        number, best = len(self.trials), self.best()
        self.observer.on_trial_start(number, strategy, origin)
        self.journal.start(strategy)
        before_s = self.pulse_s or self.pulse.beat()
        best_samples_per_s = None
        if best and best.samples_per_s and self.settings.objective == "time":
            best_samples_per_s = best.samples_per_s * slowdown(best.pulse_s, before_s)

        def give_up(progress: Progress) -> str | None:
            is_compiled = strategy.compile != "none"
            return hopeless(progress, best_samples_per_s, is_compiled) if best_samples_per_s and number else None

        trial = run_trial(
            number,
            self._job(strategy),
            timeout_s=self._timeout_s(strategy),
            silence_s=self._silence_s(strategy),
            memory_limit_bytes=memory_limit_bytes or self.memory_limit_bytes,
            hopeless=give_up,
            on_progress=self.observer.on_progress,
        )
        self.pulse_s = self.pulse.beat()
        if before_s and self.pulse_s:
            trial = msgspec.structs.replace(trial, pulse_s=math.sqrt(before_s * self.pulse_s))
        self._record(trial)

    def _give_up(self, strategy: Strategy, starts: int) -> None:
        """On record without a trial: it may be what takes the machine down."""
        self.sampler.enqueue(strategy)
        self.sampler.ask()
        reason = f"the search was killed {starts} times while it ran"
        self._record(Trial(number=len(self.trials), strategy=strategy, outcome="crashed", reason=reason))

    def _record(self, trial: Trial) -> None:
        self.journal.record(trial, self.sampler.asked, self._elapsed_s())
        self.memory.learn(trial)
        self.sampler.tell(self._loss(trial))
        self.observer.on_trial_end(trial, self.best())

    def _goes_on(self) -> bool:
        settings = self.settings
        if settings.max_trials is not None and len(self.trials) >= settings.max_trials:
            return False
        if settings.budget_s is None or len(self.trials) < 2:
            return True
        typical_s = statistics.median(trial.wall_s for trial in self.trials[1:])
        reserved_s = self._race_s(self._finalists()) + self._proof_s()
        return self._elapsed_s() + typical_s < settings.budget_s - reserved_s

    def _timeout_s(self, strategy: Strategy) -> float:
        """A trial's limit: a third of the budget, and no more than is left of it."""
        budget_s = self.settings.budget_s
        if budget_s is None or strategy == self.baseline_strategy:
            return 600.0
        return max(MIN_TIMEOUT_S, min(budget_s / 3, budget_s - self._elapsed_s()))

    def _silence_s(self, strategy: Strategy) -> float:
        """How long a trial may say nothing: several of the baseline's steps; a compiler says nothing for minutes."""
        measured = self.trials[0].measurement if self.trials else None
        if measured is None or strategy.compile != "none":
            return math.inf
        return SILENCE_S + 4 * measured.step_ms / 1000

    # The race

    def _finalists(self) -> list[Trial]:
        """The best few by their trials, the best first."""
        losses = [(loss, trial) for trial in self._usable() if (loss := self._loss(trial)) is not None]
        losses.sort(key=lambda pair: pair[0])
        return [trial for loss, trial in losses[:NUM_FINALISTS] if loss <= losses[0][0] * CLOSE_TO_BEST]

    def _race_s(self, finalists: list[Trial]) -> float:
        """Seconds that the shortest race takes: starting, warming up and evaluating, then the rounds."""
        if not finalists or self.trials[0].measurement is None:
            return 0.0
        steps = [trial.measurement.step_ms / 1000 for trial in finalists if trial.measurement]
        warm_up_s = sum(trial.measurement.warm_up_s for trial in finalists if trial.measurement)
        baseline_s = self.trials[0].measurement.step_ms / 1000
        start_s = 2 * baseline_s + warm_up_s + 3 * sum(steps) + 1
        return start_s + MIN_ROUNDS * (baseline_s + MAX_LAPS * sum(steps))

    def _race(self) -> None:
        reference = self.trials[0]
        entrants = [trial for trial in self._finalists() if trial is not reference]
        if not entrants or reference.measurement is None:
            return
        budget_s = self.settings.budget_s
        share_s = FINALS_SHARE * (300.0 if budget_s is None else budget_s)
        left_s = math.inf if budget_s is None else budget_s - self._elapsed_s() - self._proof_s()
        if self._race_s(entrants) > left_s + share_s:
            return
        while len(entrants) > 1 and not self._fits_together([reference, *entrants]):
            entrants.pop()
        if not self._fits_together([reference, *entrants]):
            return
        self.race = Race(
            [Entrant(trial=trial, job=self._job(trial.strategy)) for trial in [reference, *entrants]],
            timeout_s=max(120.0, self._timeout_s(entrants[0].strategy)),
            memory_limit_bytes=self._machine_limit(),
        )
        self.observer.on_race(0, len(entrants) + 1)
        self.race.run(
            enough_s=min(share_s, left_s), on_round=lambda done: self.observer.on_race(done, len(entrants) + 1)
        )
        for number, end in self.race.failures.items():
            self.failures[number] = Proof(outcome=end.outcome, reason=end.reason)

    def _fits_together(self, trials: list[Trial]) -> bool:
        peaks = [trial.measurement.peak_memory_bytes for trial in trials if trial.measurement]
        return sum(peaks) < self._machine_limit()

    # The last test

    def _proof_s(self) -> float:
        """Seconds that the last test of one setting takes, with the reference's losses."""
        measured = self.trials[0].measurement if self.trials else None
        if measured is None:
            return 0.0
        step_s = measured.step_ms / 1000
        return min(SOAK.enough_s, 2 * SOAK.enough_steps * step_s) + 3 * step_s + 1

    def _prove(self) -> None:
        """Tests the best, and where it fails the next best. The plain baseline needs no test."""
        for _ in range(MAX_PROOFS):
            trial = self._standing()
            if trial is None:
                return
            proof = None
            if trial.strategy != self.baseline_strategy:
                self.observer.on_proof(trial)
                timeout_s = self._timeout_s(trial.strategy) + (trial.measurement.warm_up_s if trial.measurement else 0)
                proof = prove(
                    self._job(trial.strategy),
                    self._reference,
                    timeout_s=max(120.0, timeout_s),
                    memory_limit_bytes=self.memory_limit_bytes,
                    on_progress=self.observer.on_progress,
                )
                self.observer.on_proof_end(trial, proof)
                if proof.outcome != "ok":
                    self.failures[trial.number] = proof
                    self._reconsider()
                    best = self.best()
                    if best is not None and best.number not in self._finals():
                        self._race()
                    continue
            self.winner = trial, proof
            return
        reference_trial = self.trials[0]
        if reference_trial.measurement is not None and self._fits_budget(reference_trial.measurement):
            self.winner = reference_trial, None

    def _reconsider(self) -> None:
        """Tries the fastest of those again that were given up against a setting that has now failed, where it looks
        faster than what is left."""
        tried_again = {trial.strategy for trial in self.trials if trial.outcome != "pruned"}
        given_up = [trial for trial in self.trials if trial.outcome == "pruned" and trial.strategy not in tried_again]
        best = self.best()
        hopeful = max(given_up, key=self._rate, default=None)
        if hopeful is not None and (best is None or self._rate(hopeful) > self._rate(best)):
            self._next(hopeful.strategy, "given up before")
            self.pulse.close()
            self.pulse_s = None

    @functools.cached_property
    def _reference(self) -> tuple[float, ...] | None:
        """The baseline's losses; None where it does not train these batches."""
        measured = self.trials[0].measurement
        try:
            return reference_losses(
                self._job(self.baseline_strategy),
                timeout_s=120.0 + (0 if measured is None else 40 * measured.step_ms / 1000),
                memory_limit_bytes=self._machine_limit(),
            )
        except TrialEndedError:
            return None

    def _standing(self) -> Trial | None:
        """The best by the race; by the trials where that is no help, or where those who raced have failed since."""
        entered, best = self._finals(), self.best()
        rivals = [final for final in entered.values() if self._may_win(final.trial, final.measurement)]
        if best is self.trials[0] or any(final.trial is not self.trials[0] for final in rivals):
            return ranked(rivals, self._final_loss)[0].trial if rivals else best
        return best

    # The verdict

    def result(self) -> Result:
        """What was found. Raises AutotuneError where there is nothing to save."""
        was_interrupted = self.was_interrupted
        if not self.trials or self.trials[0].measurement is None:
            if was_interrupted:
                raise InterruptedSearchError("interrupted before the baseline was measured; nothing to save")
            trial = self.trials[0]
            raise AutotuneError(f"the plain baseline did not run ({trial.outcome}: {trial.reason}); nothing to compare")
        reference, entered = self.trials[0], self._finals()
        best, proof = self.winner or (self._standing() if was_interrupted else None, None)
        if best is None:
            raise self._no_winner()
        ratio = Interval(ratio=1.0, low=1.0, high=1.0)
        was_raced = reference.number in entered and best.number in entered
        if best is not reference and was_raced:
            ratio = speedup(entered[reference.number], entered[best.number])
        elif best is not reference and best.measurement and reference.measurement:
            ratio = ratio_of_means(reference.measurement.epoch_s, best.measurement.epoch_s)
        best = self._with_final(best, entered)
        if proof is not None:
            best = _with_peak(best, proof.peak_memory_bytes)
        return Result(
            baseline=self._with_final(reference, entered),
            best=best,
            speedup=ratio,
            planned=self.planned,
            objective=self.settings.objective,
            trials=tuple(self._as_it_ended(trial) for trial in self.trials),
            search_s=self._elapsed_s(),
            num_rounds=self.race.num_rounds if self.race and was_raced else 0,
            proof=proof,
            was_interrupted=was_interrupted,
        )

    def _no_winner(self) -> AutotuneError:
        if self.was_interrupted:
            return InterruptedSearchError("interrupted before any setting fitted the memory budget; nothing to save")
        fitting = [trial for trial in self.trials if trial.measurement and self._fits_budget(trial.measurement)]
        if fitting and self.failures:
            number, failure = next(iter(self.failures.items()))
            return AutotuneError(
                f"no setting passed the last test (trial {number}: {failure.outcome}, {failure.reason}); nothing saved"
            )
        peaks = [trial.measurement.peak_memory_bytes for trial in self.trials if trial.measurement]
        return AutotuneError(
            f"no setting fits the memory budget; the leanest took {min(peaks) / 2**30:.2f} GiB, raise --memory-budget"
        )

    def _finals(self) -> dict[int, Final]:
        """The race's figures by trial; none where it did not get to two rounds."""
        finals = self.race.finals() if self.race and self.race.num_rounds >= 2 else []
        return {final.trial.number: final for final in finals}

    def _final_loss(self, final: Final) -> float:
        loss = loss_of(_remeasured(final.trial, final.measurement), self.settings.objective, self.planned)
        assert loss is not None
        return loss

    def _with_final(self, trial: Trial, entered: dict[int, Final]) -> Trial:
        final = entered.get(trial.number)
        return trial if final is None else _remeasured(trial, final.measurement)

    def _as_it_ended(self, trial: Trial) -> Trial:
        failure = self.failures.get(trial.number)
        if failure is None:
            return trial
        return msgspec.structs.replace(trial, outcome=failure.outcome, reason=f"in the last test: {failure.reason}")

    # What is known so far

    def best(self) -> Trial | None:
        """The best usable trial by its own figures."""
        finalists = self._finalists()
        return finalists[0] if finalists else None

    def _usable(self) -> list[Trial]:
        """Trials that may win: finished, within the user's memory budget, and not failed since."""
        return [
            trial
            for trial in self.trials
            if trial.outcome == "ok" and trial.measurement is not None and self._may_win(trial, trial.measurement)
        ]

    def _may_win(self, trial: Trial, measurement: Measurement) -> bool:
        return trial.number not in self.failures and self._fits_budget(measurement)

    def _fits_budget(self, measurement: Measurement) -> bool:
        return measurement.peak_memory_bytes <= self.memory_limit_bytes

    def _loss(self, trial: Trial) -> float | None:
        """At the speed that the device had during the baseline."""
        reference = self.trials[0] if self.trials else trial
        return loss_of(trial, self.settings.objective, self.planned, pulse_s=reference.pulse_s, reference=reference)

    def _rate(self, trial: Trial) -> float:
        """Samples a second, at the speed that the device had during the baseline."""
        return (trial.samples_per_s or 0.0) * slowdown(trial.pulse_s, self.trials[0].pulse_s)

    def _job(self, strategy: Strategy) -> Job:
        """The baseline is what others are compared with, so it may go over the user's budget; it cannot win then."""
        is_baseline = strategy == self.baseline_strategy
        return Job(
            workload=self.ref,
            strategy=strategy,
            backend=self.backend.name,
            memory_limit_bytes=None if is_baseline else self.settings.memory_budget_bytes,
            seed=self.settings.seed,
        )

    def _machine_limit(self) -> int:
        return int(FREE_MEMORY_SHARE * self.hardware.device.memory_free_bytes)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.start


def _remeasured(trial: Trial, measurement: Measurement) -> Trial:
    """The trial with the race's figures, but for the warm-up, which in the race finds compiled code at hand, and the
    peak memory, which is the larger."""
    assert trial.measurement is not None
    measurement = msgspec.structs.replace(
        measurement,
        warm_up_s=max(trial.measurement.warm_up_s, measurement.warm_up_s),
        peak_memory_bytes=max(trial.measurement.peak_memory_bytes, measurement.peak_memory_bytes),
    )
    return msgspec.structs.replace(trial, measurement=measurement, samples_per_s=measurement.samples_per_s)


def _with_peak(trial: Trial, peak_memory_bytes: int) -> Trial:
    assert trial.measurement is not None
    peak_bytes = max(trial.measurement.peak_memory_bytes, peak_memory_bytes)
    return msgspec.structs.replace(
        trial, measurement=msgspec.structs.replace(trial.measurement, peak_memory_bytes=peak_bytes)
    )
