"""One search from the first trial to the winner: trials, the race of the best, the last test, the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from autotune import trace
from autotune.errors import AutotuneError, InterruptedSearchError
from autotune.measurement import Trial
from autotune.search import cold, explain
from autotune.search.explain import Share
from autotune.search.journal import open_journal
from autotune.search.objective import Aim
from autotune.search.proof import Proof, prove, reference_losses
from autotune.search.races import MIN_LAST_TEST_S, Races
from autotune.search.result import Choice, Result
from autotune.search.settings import Observer
from autotune.search.standings import Standings
from autotune.search.task import Task
from autotune.search.trials import Trials
from autotune.strategy import Strategy
from autotune.trial.pulse import Pulse
from autotune.trial.runner import TrialEndedError
from autotune.units import format_bytes

EXPLAIN_S = 60.0
"""So long are the shares of the winner's knobs measured, where the budget has so much left."""
MAX_PROOFS = 6
"""So many settings may fail the last test before the plain baseline is taken."""


def search(
    task: Task,
    observer: Observer,
    *,
    journal_path: Path,
    is_fresh: bool = False,
    save: Callable[[Result], None] = lambda _: None,
) -> Result:
    """Searches until the budget is spent, the space is exhausted or the user interrupts.

    Every trial is in the journal when it ends; an unfinished search of the same kind is gone on with, unless
    ``is_fresh``. ``save`` gets the result; a search whose result could not be saved is unfinished. Raises AutotuneError
    when the baseline does not run, when nothing fits the memory budget, when energy is to be saved that nobody counts,
    or when the journal cannot be written.
    """
    if task.aims[0].is_energy and not task.hardware.allows("energy_counter"):
        raise AutotuneError("this device has no energy counter that can be read; choose another --objective")
    with open_journal(journal_path, task.identity(), is_fresh=is_fresh) as journal, Pulse(task.backend.name) as pulse:
        running = _Search(task, observer, Trials(task, observer, journal, pulse))
        try:
            running.run()
        except KeyboardInterrupt:
            running.was_interrupted = True
            journal.stop()
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


class _Search:
    def __init__(self, task: Task, observer: Observer, trials: Trials) -> None:
        self.task, self.observer, self.trials, self.history = task, observer, trials, trials.history
        self.standings = Standings(task, self.history)
        self.races = Races(task, observer, trials, self.standings)
        self.winners: dict[Aim, tuple[Trial, Proof | None]] = {}
        self.reference_losses: tuple[float, ...] | TrialEndedError | None = None
        """The baseline's, or why it does not train these batches; None until they are needed."""
        self.rounding: float | None = None
        """How far the baseline's losses go where its weights are nudged; None until it is needed."""
        self.proofs: dict[int, Proof] = {}
        """Last tests by the trial's number."""
        self.shares: tuple[Share, ...] = ()
        self.explained: set[Strategy] = set()
        """The settings whose knobs' shares were measured."""
        self.was_interrupted = False

    def run(self) -> None:
        """Trials, race, what each knob brings, last test."""
        self.observer.on_space(self.task.space)
        self.trials.run(reserved_s=self.races.reserved_s)
        finalists = self.races.finalists()
        if any(trial is not self.history.reference for trial in finalists):
            self._train_reference()  # the race may take what this leaves of the budget
        self.races.run(finalists)
        self._take_knobs_back()
        for aim in self.task.sought:
            if (winner := self._winner(aim)) is not None:
                self.winners[aim] = winner
        self._start_cold()

    # What each knob brings

    def _explain_s(self, best: Trial | None) -> float | None:
        """Seconds for measuring the shares of this one's knobs; None where no budget has them and nobody asks for them
        in any case, or there is nothing to measure."""
        explains, budget_s = self.task.settings.explains, self.task.settings.budget_s
        if best is None or best.measurement is None or not (budget_s if explains is None else explains):
            return None
        shares = self.history.estimated_shares(best.strategy)
        warm_up_s = best.measurement.warm_up_s if self.task.compiles(best.strategy) else 0.0
        needed_s = explain.needed_s(best.measurement.step_ms / 1000, warm_up_s, shares, self.task.backend.name)
        if not shares or (explains is None and needed_s > self.races.left_s()):
            return None
        return max(needed_s, EXPLAIN_S if explains else min(EXPLAIN_S, self.races.left_s() - self._again_s(best)))

    def _again_s(self, best: Trial) -> float:
        """Seconds for the best without what brings nothing: a trial, and a race against it."""
        return best.wall_s + self.races.shortest_s([best, best])

    def _take_knobs_back(self) -> None:
        """Times the winner in turns with what it is without each of its knobs. Where some bring nothing, the winner
        without them is tried, and raced against it."""
        task, best = self.task, self.standings.best(self.task.sought[0])
        enough_s = self._explain_s(best)
        if best is None or enough_s is None:
            return
        without = explain.taken_back(best.strategy, task.baseline, task.space)
        found: list[Share] = []
        own_bytes, *peaks = self.history.likely_peaks_bytes([best.strategy, *without.values()])
        for group in explain.groups(without, peaks, task.machine_limit_bytes - own_bytes):
            found += explain.measured(
                best,
                group,
                task.baseline,
                race_of=self.races.race_of,
                enough_s=enough_s * len(group) / len(without),
                on_round=self.observer.on_taking_back,
            )
        if not found:
            return
        self.shares = explain.largest_first(found)
        needless = [share.knob for share in self.shares if share.brings_nothing]
        simpler = explain.set_back(best.strategy, task.baseline, needless)
        self.explained = {best.strategy, simpler}
        if not task.settings.explains and self._again_s(best) > self.races.left_s():
            return
        is_refused = task.space.refusal(simpler) is not None or self.history.has_failed(simpler)
        if simpler in (best.strategy, task.baseline) or is_refused:
            return
        tried = self.trials.try_late(simpler, "without what brings nothing")
        if tried is not None:
            others = [trial for trial in self.history.finalists() if trial.number not in (best.number, tried.number)]
            self._race_again([best, tried, *(others if len(task.sought) > 1 else ())])

    def _race_again(self, finalists: list[Trial]) -> None:
        """Whatever it takes, where shares were asked for: they are of no use to a winner that is not sure."""
        is_wanted = bool(self.task.settings.explains and self.explained)
        self.races.run(list({one.number: one for one in finalists}.values()), in_any_case=is_wanted)

    # The last test

    def _winner(self, aim: Aim) -> tuple[Trial, Proof | None] | None:
        """The best that passes the last test; the plain baseline needs none."""
        for _ in range(MAX_PROOFS):
            trial = self.standings.best(aim)
            if trial is None:
                break
            if trial.strategy == self.task.baseline:
                return trial, None
            found = self.proofs.get(trial.number) or self._proof(trial)
            self.proofs[trial.number] = found
            if found.outcome == "ok":
                return trial, found
            self.history.failures[trial.number] = msgspec.structs.replace(
                found, reason=f"in the last test: {found.reason}"
            )
            self.trials.reconsider()
            best = self.history.best(aim)
            if best is not None and best.number not in self.standings.finals():
                settled = [winner for winner, _ in self.winners.values()]
                self._race_again([*self.history.finalists(), *settled])
        reference = self.history.reference
        fits = reference.measurement is not None and self.task.fits(reference.measurement)
        return (reference, None) if fits else None

    def _proof(self, trial: Trial) -> Proof:
        reference = self._train_reference()
        self.observer.on_proof(trial)
        warm_up_s = trial.measurement.warm_up_s if trial.measurement else 0.0
        found = prove(
            self.task.job(trial.strategy),
            reference,
            soak=self.races.soak,
            timeout_s=max(MIN_LAST_TEST_S, self.trials.timeout_s(trial.strategy) + warm_up_s),
            silence_s=self.trials.silence_s(trial.strategy),
            memory_limit_bytes=self.task.memory_limit_bytes,
            rounding=self._rounding,
            on_progress=self.observer.on_progress,
        )
        self.observer.on_proof_end(trial, found)
        return found

    def _train_reference(self) -> tuple[float, ...] | TrialEndedError:
        """The baseline's losses, trained when they are first asked for."""
        if self.reference_losses is None:
            self.observer.on_reference()
            self.reference_losses = self._baseline_losses()
            self.races.has_reference = True
        return self.reference_losses

    def _rounding(self) -> float:
        """How far roundings take the baseline's losses, tried when it is first asked for."""
        if self.rounding is None:
            reference = self._train_reference()
            self.observer.on_rounding()
            nudged = self._baseline_losses(trace.NUDGE)
            if isinstance(reference, TrialEndedError) or isinstance(nudged, TrialEndedError):
                self.rounding = 0.0
            else:
                self.rounding = trace.deviation(reference, nudged)
        return self.rounding

    def _baseline_losses(self, nudge: float = 0.0) -> tuple[float, ...] | TrialEndedError:
        try:
            return reference_losses(
                self.task.job(self.task.baseline),
                timeout_s=MIN_LAST_TEST_S + 40 * (self.history.reference_step_s or 0.0),
                silence_s=self.trials.silence_s(self.task.baseline),
                memory_limit_bytes=self.task.machine_limit_bytes,
                nudge=nudge,
            )
        except TrialEndedError as end:
            return end

    def _start_cold(self) -> None:
        """How long the best takes to compile, where that was done before its trial: by another trial, or else, where
        the budget has the time, by starting it once more. Where neither is known the profile says so."""
        best, left_s = next((trial for trial, _ in self.winners.values()), None), self.races.left_s()
        if best is None or best.measurement is None or not best.measurement.is_from_cache:
            return
        warm_up_s = cold.known_warm_up_s(self.history.all, best.strategy)
        if warm_up_s is None and left_s >= cold.MIN_COLD_S:
            self.observer.on_cold_start(best)
            with contextlib.suppress(KeyboardInterrupt):  # all that counts is measured
                started = cold.cold_start(
                    self.task.job(best.strategy),
                    timeout_s=min(left_s, cold.COLD_S),
                    memory_limit_bytes=self.task.machine_limit_bytes,
                )
                warm_up_s = started.warm_up_s if started else None
        if warm_up_s is not None:
            self.standings.cold_warm_up_s[best.number] = warm_up_s

    # The verdict

    def result(self) -> Result:
        """What was found. Raises AutotuneError where there is nothing to save."""
        if not self.history.all or self.history.reference.measurement is None:
            if self.was_interrupted:
                raise InterruptedSearchError("interrupted before the baseline was measured; nothing to save")
            trial = self.history.reference
            raise AutotuneError(f"the plain baseline did not run ({trial.outcome}: {trial.reason}); nothing to compare")
        reference, entered = self.history.reference, self.standings.finals()
        first = self.task.sought[0]
        best, found = self.winners.get(first) or (self.standings.best(first) if self.was_interrupted else None, None)
        if best is None:
            raise self._no_winner()
        if self.was_interrupted and best is reference:
            raise InterruptedSearchError(
                "interrupted before a setting was faster than the baseline; nothing to save, the same command goes on"
            )
        was_raced = {reference.number, best.number} <= entered.keys()
        is_compiled = best.strategy.compile != "none"
        cached_s = best.measurement.warm_up_s if best.measurement and best.measurement.is_from_cache else None

        front = tuple(
            Choice(
                name=aim.name,
                trial=self.standings.at_last(trial, passed.peak_memory_bytes if passed else 0),
                speedup=self.standings.speedup(trial),
                num_rounds=len(entered[trial.number].epoch_s) if trial.number in entered else 0,
                proof=passed,
            )
            for aim, (trial, passed) in self.winners.items()
        )
        return Result(
            baseline=self.standings.at_last(reference),
            best=self.standings.at_last(best, found.peak_memory_bytes if found else 0),
            speedup=self.standings.speedup(best),
            front=front if len(self.task.sought) > 1 else (),
            planned=self.task.planned,
            objective=self.task.settings.objective,
            search=self.trials.search,
            trials=tuple(map(self._as_it_ended, self.history.all)),
            search_s=self.trials.elapsed_s(),
            warm_up_cached_s=entered[best.number].measurement.warm_up_s if was_raced and is_compiled else cached_s,
            num_rounds=len(entered[best.number].epoch_s) if was_raced else 0,
            proof=found,
            was_interrupted=self.was_interrupted,
            shares=self.shares if best.strategy in self.explained else self.history.estimated_shares(best.strategy),
            is_settled=self.trials.is_settled,
            lacked_time=self.races.lacked_time,
            flops=self.task.flops,
            matmul_flops=self.task.matmul_flops,
        )

    def _no_winner(self) -> AutotuneError:
        if self.was_interrupted:
            return InterruptedSearchError(
                "interrupted before any setting fitted the memory budget; nothing to save, the same command goes on"
            )
        measured = [trial.measurement for trial in self.history.all if trial.measurement]
        if self.history.failures and any(map(self.task.fits, measured)):
            number, failure = next(iter(self.history.failures.items()))
            return AutotuneError(
                f"no setting is left (trial {number}: {failure.outcome} {failure.reason}); nothing saved"
            )
        leanest = format_bytes(min(measurement.peak_memory_bytes for measurement in measured))
        limit = format_bytes(self.task.memory_limit_bytes)
        return AutotuneError(
            f"no setting stays below {limit}, which the memory budget allows; the leanest took {leanest}, raise "
            "--memory-budget"
        )

    def _as_it_ended(self, trial: Trial) -> Trial:
        failure = self.history.failures.get(trial.number)
        if failure is None:
            return trial
        return msgspec.structs.replace(trial, outcome=failure.outcome, reason=failure.reason)
