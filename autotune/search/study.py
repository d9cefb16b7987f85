"""One search from the first trial to the winner: baseline, expert's guess, Optuna's proposals, the race of the best."""

from __future__ import annotations

import datetime
import statistics
import time
from typing import Protocol

import msgspec

from autotune import __version__
from autotune.backends.base import Backend, Device
from autotune.errors import AutotuneError, InterruptedSearchError
from autotune.measurement import Interval, Measurement, Trial
from autotune.probe import Hardware
from autotune.profile import SCHEMA, Evidence, Figures, Profile, ProfiledDevice, ProfiledWorkload
from autotune.search.finals import FAST_LAPS, Entrant, Final, race, speedup
from autotune.search.objective import Objective, PlannedRun, hopeless, loss_of
from autotune.search.sampling import Sampler
from autotune.search.space import Space, build_space, expert_guess
from autotune.stats import ratio_of_means
from autotune.strategy import Strategy, baseline
from autotune.trial.runner import run_trial
from autotune.trial.worker import Job, Progress
from autotune.workloads.base import Workload, WorkloadRef

NUM_FINALISTS = 3
FINALS_SHARE = 0.3
"""At most this share of the budget goes to the race of the finalists."""
MIN_ROUNDS, MAX_ROUNDS = 3, 5
CLOSE_TO_BEST = 1.15
"""Settings whose trial came within this factor of the best enter the race."""
FREE_MEMORY_SHARE = 0.9
"""Without a budget of the user's, trials may take this much of the memory that is free when the search starts."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked of a search."""

    objective: Objective = "time"
    budget_s: float | None = 300.0
    """Wall time for the trials and the race; None where only ``max_trials`` counts."""
    max_trials: int | None = None
    memory_budget_bytes: int | None = None
    includes_slow: bool = False
    """Whether what the probe found too slow is searched all the same."""
    epochs: int | None = None
    """Epochs of the planned run; the recipe's by default."""
    seed: int = 0


class Observer(Protocol):
    """Hears what a search is doing; the terminal's live display is one."""

    def on_space(self, space: Space) -> None:
        """What will be searched."""

    def on_trial_start(self, number: int, strategy: Strategy, origin: str) -> None:
        """A trial starts; ``origin`` says who proposed it."""

    def on_progress(self, progress: Progress) -> None:
        """The trial under way got on."""

    def on_trial_end(self, trial: Trial, best: Trial | None) -> None:
        """A trial ended."""

    def on_race(self, done: int, of: int, num_entrants: int) -> None:
        """A round of the finals ended."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found."""

    baseline: Trial
    best: Trial
    speedup: Interval
    planned: PlannedRun
    objective: Objective
    trials: tuple[Trial, ...]
    search_s: float
    was_raced: bool
    """Whether baseline and best were timed in turns; else the interval is from their trials alone."""
    was_interrupted: bool


def search(
    ref: WorkloadRef, workload: Workload, hardware: Hardware, backend: Backend, settings: Settings, observer: Observer
) -> Result:
    """Searches until the budget is spent, the space is exhausted or the user interrupts.

    Raises AutotuneError when the baseline does not run, or when nothing fits the memory budget.
    """
    return _Search(ref, workload, hardware, backend, settings, observer).run()


class _Search:
    def __init__(
        self,
        ref: WorkloadRef,
        workload: Workload,
        hardware: Hardware,
        backend: Backend,
        settings: Settings,
        observer: Observer,
    ) -> None:
        self.ref, self.hardware, self.backend = ref, hardware, backend
        self.settings, self.observer = settings, observer
        self.planned = PlannedRun(
            num_train=workload.num_train,
            num_test=workload.num_test,
            epochs=settings.epochs or workload.recipe.epochs,
        )
        self.space = build_space(hardware, backend, workload, includes_slow=settings.includes_slow)
        self.sampler = Sampler(self.space, settings.seed)
        self.baseline_strategy = baseline(workload.recipe.global_batch)
        self.memory_limit_bytes = settings.memory_budget_bytes or int(
            FREE_MEMORY_SHARE * hardware.device.memory_free_bytes
        )
        self.trials: list[Trial] = []
        self.failed_in_race: set[int] = set()
        self.start = time.monotonic()

    def run(self) -> Result:
        self.observer.on_space(self.space)
        was_interrupted = False
        finals: list[Final] = []
        try:
            self._trials()
            finals = self._finals()
        except KeyboardInterrupt:
            was_interrupted = True
        return self._result(finals, was_interrupted)

    # The trials

    def _trials(self) -> None:
        self.sampler.enqueue(self.baseline_strategy)
        self._next("plain baseline", memory_limit_bytes=self._machine_limit())
        if self.trials[0].measurement is None:
            return
        guess = expert_guess(self.space, self.hardware, self.backend)
        self.sampler.enqueue(guess)
        origin = "expert's guess" if guess != self.baseline_strategy else "search"
        while self._goes_on() and self._next(origin):
            origin = "search"

    def _next(self, origin: str, memory_limit_bytes: int | None = None) -> bool:
        best = self.best()
        strategy = self.sampler.ask(near=best.strategy if best else None)
        if strategy is None:
            return False
        number = len(self.trials)
        self.observer.on_trial_start(number, strategy, origin)
        best_samples_per_s = best.samples_per_s if best and self.settings.objective == "time" else None

        def give_up(progress: Progress) -> str | None:
            is_compiled = strategy.compile != "none"
            return hopeless(progress, best_samples_per_s, is_compiled) if best_samples_per_s and number else None

        trial = run_trial(
            number,
            self._job(strategy),
            timeout_s=self._timeout_s(is_baseline=number == 0),
            memory_limit_bytes=memory_limit_bytes or self.memory_limit_bytes,
            hopeless=give_up,
            on_progress=self.observer.on_progress,
        )
        self.trials.append(trial)
        self.sampler.tell(loss_of(trial, self.settings.objective, self.planned, self.best()))
        self.observer.on_trial_end(trial, self.best())
        return True

    def _goes_on(self) -> bool:
        settings = self.settings
        if settings.max_trials is not None and len(self.trials) >= settings.max_trials:
            return False
        if settings.budget_s is None or len(self.trials) < 2:
            return True
        typical_s = statistics.median(trial.wall_s for trial in self.trials[1:]) if len(self.trials) > 1 else 0.0
        return self._elapsed_s() + typical_s < settings.budget_s - self._race_s(self._finalists())

    def _timeout_s(self, *, is_baseline: bool) -> float:
        """A trial's limit: never more than the budget has left, and a third of it at most once there is a baseline."""
        budget_s = self.settings.budget_s
        if budget_s is None or is_baseline:
            return 600.0
        return max(20.0, min(budget_s / 3, budget_s - self._elapsed_s()))

    # The race

    def _finalists(self) -> list[Trial]:
        """The best few by their trials, the best first."""
        losses = [(loss, trial) for trial in self._usable() if (loss := self._loss(trial)) is not None]
        losses.sort(key=lambda pair: pair[0])
        return [trial for loss, trial in losses[:NUM_FINALISTS] if loss <= losses[0][0] * CLOSE_TO_BEST]

    def _race_s(self, finalists: list[Trial], rounds: int | None = None) -> float:
        """Seconds that a race takes: starting, warming up and evaluating, then the rounds."""
        if not finalists or self.trials[0].measurement is None:
            return 0.0
        steps = [trial.measurement.step_ms / 1000 for trial in finalists if trial.measurement]
        warm_up_s = sum(trial.measurement.warm_up_s for trial in finalists if trial.measurement)
        baseline_s = self.trials[0].measurement.step_ms / 1000
        start_s = 2.5 * baseline_s + warm_up_s + 3 * sum(steps) + len(steps) + 1
        round_s = baseline_s + FAST_LAPS * sum(steps)
        if rounds is not None:
            return start_s + rounds * round_s
        share_s = FINALS_SHARE * self.settings.budget_s if self.settings.budget_s else float("inf")
        return max(start_s + MIN_ROUNDS * round_s, min(share_s, start_s + MAX_ROUNDS * round_s))

    def _finals(self) -> list[Final]:
        reference = self.trials[0]
        entrants = [trial for trial in self._finalists() if trial is not reference]
        if not entrants or reference.measurement is None:
            return []
        left_s = float("inf") if self.settings.budget_s is None else self.settings.budget_s - self._elapsed_s()
        rounds = MAX_ROUNDS
        while rounds > MIN_ROUNDS and self._race_s(entrants, rounds) > left_s:
            rounds -= 1
        if self._race_s(entrants, rounds) > left_s + FINALS_SHARE * (self.settings.budget_s or 0):
            return []
        while len(entrants) > 1 and not self._fits_together([reference, *entrants]):
            entrants.pop()
        if not self._fits_together([reference, *entrants]):
            return []
        finals = race(
            [Entrant(trial=trial, job=self._job(trial.strategy)) for trial in [reference, *entrants]],
            rounds=rounds,
            timeout_s=max(120.0, self._timeout_s(is_baseline=False)),
            memory_limit_bytes=self._machine_limit(),
            on_round=lambda done, of: self.observer.on_race(done, of, len(entrants) + 1),
        )
        fitting = {final.trial.number for final in finals if self._fits_budget(final.measurement)}
        self.failed_in_race = {trial.number for trial in entrants} - fitting
        return finals

    def _fits_together(self, trials: list[Trial]) -> bool:
        peaks = [trial.measurement.peak_memory_bytes for trial in trials if trial.measurement]
        return sum(peaks) < self._machine_limit()

    # The verdict

    def _result(self, finals: list[Final], was_interrupted: bool) -> Result:
        if not self.trials or self.trials[0].measurement is None:
            if was_interrupted:
                raise InterruptedSearchError("interrupted before the baseline was measured; nothing to save")
            trial = self.trials[0]
            raise AutotuneError(f"the plain baseline did not run ({trial.outcome}: {trial.reason}); nothing to compare")
        reference, best = self.trials[0], self.best()
        if best is None and was_interrupted:
            raise InterruptedSearchError("interrupted before any setting fitted the memory budget; nothing to save")
        if best is None:
            raise AutotuneError(
                "no setting fits the memory budget; the leanest took "
                f"{min(t.measurement.peak_memory_bytes for t in self.trials if t.measurement) / 2**30:.2f} GiB, "
                "raise --memory-budget"
            )
        entered = {final.trial.number: final for final in finals}
        rivals = [final for final in finals if final.trial in self._usable()]
        ratio = Interval(ratio=1.0, low=1.0, high=1.0)
        was_raced = reference.number in entered and len(entered) > 1 and bool(rivals)
        if was_raced:
            winner = min(rivals, key=self._final_loss)
            best = winner.trial
            ratio = speedup(entered[reference.number], winner) if best is not reference else ratio
        elif best is not reference and best.measurement and reference.measurement:
            ratio = ratio_of_means(reference.measurement.epoch_s, best.measurement.epoch_s)
        return Result(
            baseline=self._with_final(reference, entered),
            best=self._with_final(best, entered),
            speedup=ratio,
            planned=self.planned,
            objective=self.settings.objective,
            trials=tuple(self.trials),
            search_s=self._elapsed_s(),
            was_raced=was_raced,
            was_interrupted=was_interrupted,
        )

    def _final_loss(self, final: Final) -> float:
        loss = loss_of(_remeasured(final.trial, final.measurement), self.settings.objective, self.planned)
        assert loss is not None
        return loss

    def _with_final(self, trial: Trial, entered: dict[int, Final]) -> Trial:
        final = entered.get(trial.number)
        return trial if final is None else _remeasured(trial, final.measurement)

    # What is known so far

    def best(self) -> Trial | None:
        """The best usable trial by its own figures."""
        finalists = self._finalists()
        return finalists[0] if finalists else None

    def _usable(self) -> list[Trial]:
        """Trials that may win: finished, within the user's memory budget, and not failed since in the race."""
        return [
            trial
            for trial in self.trials
            if trial.outcome == "ok"
            and trial.measurement is not None
            and self._fits_budget(trial.measurement)
            and trial.number not in self.failed_in_race
        ]

    def _fits_budget(self, measurement: Measurement) -> bool:
        return measurement.peak_memory_bytes <= self.memory_limit_bytes

    def _loss(self, trial: Trial) -> float | None:
        return loss_of(trial, self.settings.objective, self.planned)

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
    """The trial with the race's figures, but for the warm-up: in the race what was compiled before is at hand."""
    assert trial.measurement is not None
    warm_up_s = max(trial.measurement.warm_up_s, measurement.warm_up_s)
    measurement = msgspec.structs.replace(measurement, warm_up_s=warm_up_s)
    return msgspec.structs.replace(trial, measurement=measurement, samples_per_s=measurement.samples_per_s)


def profile_of(result: Result, device: Device, workload: Workload) -> Profile:
    """The profile that a search's result becomes."""
    return Profile(
        schema=SCHEMA,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        autotune=__version__,
        device=ProfiledDevice(
            fingerprint=device.fingerprint,
            kind=device.kind,
            name=device.name,
            architecture=device.architecture,
            num_cores=device.num_cores,
            memory_total_bytes=device.memory_total_bytes,
        ),
        workload=ProfiledWorkload(
            name=workload.name,
            source=workload.source,
            global_batch=workload.recipe.global_batch,
            epochs=result.planned.epochs,
            num_train=result.planned.num_train,
            num_test=result.planned.num_test,
        ),
        strategy=result.best.strategy,
        evidence=Evidence(
            objective=result.objective,
            search_s=round(result.search_s, 1),
            num_trials=len(result.trials),
            versions=device.versions,
            speedup=result.speedup,
            baseline_strategy=result.baseline.strategy,
            baseline=figures(result.baseline, result.planned),
            best=figures(result.best, result.planned),
        ),
    )


def figures(trial: Trial, planned: PlannedRun) -> Figures:
    """A finished trial's figures, with the planned run's projection. The trial must have a measurement."""
    assert trial.measurement is not None
    shared = {name: getattr(trial.measurement, name) for name in Figures.__struct_fields__ if name != "projected_s"}
    return Figures(**shared, projected_s=planned.projected_s(trial.measurement))
