"""From the finalists to the profile, on scripted trials: race, knobs taken back, last test, interruption."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from autotune.errors import AutotuneError
from autotune.measurement import Measurement, Trial
from autotune.search import cold, races, study, task, trials
from autotune.search.finals import Final
from autotune.search.proof import Proof
from autotune.search.result import profile_of
from autotune.strategy import Strategy
from autotune.trial.runner import TrialEndedError
from autotune.trial.worker import Job, Soak
from tests import factories
from tests.observing import Silent
from tests.scripted import (
    GUESS,
    Prepared,
    ScriptedRace,
    interrupted_at,
    prove_scripted,
    run_scripted,
    scripted,
    searched,
)

GIB = 2**30


def test_interrupting_keeps_the_best_so_far(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    def interrupted(number: int, job: Job, **_: Any) -> Trial:
        if number == 5:
            raise KeyboardInterrupt
        return run_scripted(number, job)

    scripted_device.setattr(trials, "run_trial", interrupted)
    result = searched(prepared)
    assert result.was_interrupted
    assert not result.num_rounds
    assert len(result.trials) == 5
    assert result.speedup.ratio > 3


def test_interrupting_before_the_baseline_is_done_says_that_nothing_is_saved(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    def interrupted(number: int, job: Job, **_: Any) -> Trial:
        raise KeyboardInterrupt

    scripted_device.setattr(trials, "run_trial", interrupted)
    with pytest.raises(AutotuneError, match="before the baseline") as caught:
        searched(prepared)
    assert caught.value.exit_code == 130


def test_interrupting_before_anything_is_faster_than_the_baseline_saves_nothing(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(trials, "run_trial", interrupted_at(1))
    with pytest.raises(AutotuneError, match="before a setting was faster") as caught:
        searched(prepared)
    assert caught.value.exit_code == 130


def test_a_setting_that_fails_in_the_race_does_not_win(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    best_trial = searched(prepared).best

    class Fails(ScriptedRace):
        """In the final the best runs out of memory."""

        def run(self, **_: Any) -> None:
            super().run()
            is_final = self.entrants[0].trial.number == 0
            lost = [entrant.trial for entrant in self.entrants if entrant.trial.strategy == best_trial.strategy]
            self.failures = {trial.number: TrialEndedError("oom", "scripted") for trial in lost if is_final}

    scripted_device.setattr(races, "Race", Fails)
    result = searched(prepared)
    assert result.best.strategy != best_trial.strategy
    assert result.trials[best_trial.number].outcome == "oom"


def test_what_failed_in_a_race_does_not_win_where_that_is_interrupted(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    best_trial = searched(prepared).best

    class FailsAndStops(ScriptedRace):
        """The best runs out of memory; then comes Ctrl-C."""

        def run(self, **_: Any) -> None:
            self.failures = {best_trial.number: TrialEndedError("oom", "scripted")}
            raise KeyboardInterrupt

    scripted_device.setattr(races, "Race", FailsAndStops)
    result = searched(prepared)
    assert result.was_interrupted
    assert result.best.strategy != best_trial.strategy
    assert result.trials[best_trial.number].outcome == "oom"


def test_when_only_the_baseline_survives_the_race_the_next_best_trial_wins(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    failed = {0}

    class AllFail(ScriptedRace):
        def run(self, **_: Any) -> None:
            super().run()
            self.failures = {entrant.trial.number: TrialEndedError("oom", "") for entrant in self.entrants[1:]}
            failed.update(self.failures)

    scripted_device.setattr(races, "Race", AllFail)
    result = searched(prepared)
    assert result.best.number not in failed
    assert not result.num_rounds


def test_a_setting_that_goes_over_the_memory_budget_in_the_race_does_not_win(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    grown: list[int] = []

    class Growing(ScriptedRace):
        def finals(self) -> list[Final]:
            reference, first, *others = super().finals()
            grown.append(first.trial.number)
            bigger = msgspec.structs.replace(first.measurement, peak_memory_bytes=3 * GIB)
            return [reference, msgspec.structs.replace(first, measurement=bigger), *others]

    scripted_device.setattr(races, "Race", Growing)
    assert searched(prepared, memory_budget_bytes=2 * GIB).best.number not in grown


@pytest.mark.parametrize(("has_compiled", "budget_s"), [(True, None), (False, None), (False, 1.0)])
def test_a_best_that_was_compiled_before_is_started_cold_where_no_trial_was(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, has_compiled: bool, budget_s: float | None
) -> None:
    """As if every trial had found its graphs in the cache, but for those whose allocator is the plain one."""

    def compiled(number: int, job: Job, **_: Any) -> Trial:
        is_first = has_compiled and job.strategy.allocator == "default"
        measured = msgspec.structs.replace(
            scripted(job.strategy), is_from_cache=not is_first, warm_up_s=40.0 if is_first else 2.0
        )
        return factories.trial(number, job.strategy, measurement=measured)

    def started(job: Job, **_: Any) -> Measurement:
        asked.append(job.strategy)
        return msgspec.structs.replace(scripted(job.strategy), warm_up_s=50.0)

    asked: list[Strategy] = []
    scripted_device.setattr(trials, "run_trial", compiled)
    scripted_device.setattr(cold, "cold_start", started)
    if budget_s is not None:
        scripted_device.setattr(races.Races, "left_s", lambda self: budget_s)
    result = searched(prepared)
    best = result.best.measurement
    assert best is not None
    if budget_s is not None:
        assert not asked
        return
    same = [trial for trial in result.trials if cold._graphs(trial.strategy) == cold._graphs(result.best.strategy)]
    was_known = has_compiled and any(trial.strategy.allocator == "default" for trial in same)
    assert asked == ([] if was_known else [result.best.strategy])
    assert best.warm_up_s == (40.0 if was_known else 50.0)


def test_what_was_faster_by_the_clock_is_raced_though_drift_speaks_against_it(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    """The pulse says that the device was four times as slow in the baseline's trial; the race says that it was not."""

    def drifting(number: int, job: Job, **_: Any) -> Trial:
        return msgspec.structs.replace(run_scripted(number, job), pulse_s=0.01 if number else 0.08)

    scripted_device.setattr(trials, "run_trial", drifting)
    result = searched(prepared, max_trials=3)
    assert result.num_rounds
    assert result.best.strategy != result.baseline.strategy


def test_a_winner_that_does_not_train_as_the_baseline_does_is_passed_over(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    def without_bf16(job: Job, reference: object, **_: Any) -> Proof:
        if job.strategy.precision == "bf16":
            return Proof(outcome="diverged", reason="scripted", loss_deviation=0.5)
        return prove_scripted(job, reference)

    scripted_device.setattr(study, "prove", without_bf16)
    scripted_device.setattr(study, "MAX_PROOFS", 40)
    result = searched(prepared)
    assert result.best.strategy.precision != "bf16"
    assert result.proof is not None
    assert result.proof.outcome == "ok"
    failed = [trial for trial in result.trials if trial.outcome == "diverged"]
    assert failed
    assert all(trial.reason == "in the last test: scripted" for trial in failed)


@pytest.mark.parametrize(
    ("settings", "soak_s"),
    [
        ({"budget_s": 60.0}, 6.0),
        ({"budget_s": 300.0}, 30.0),
        ({"budget_s": 3600.0}, 30.0),
        ({"budget_s": None}, 30.0),
        ({"budget_s": 60.0, "memory_budget_bytes": 8 * GIB}, 30.0),
    ],
)
def test_the_winner_soaks_for_a_tenth_of_the_budget_or_half_a_minute(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, settings: dict[str, Any], soak_s: float
) -> None:
    soaks: list[Soak] = []

    def proved(job: Job, reference: object, *, soak: Soak, **_: Any) -> Proof:
        soaks.append(soak)
        return prove_scripted(job, reference)

    scripted_device.setattr(study, "prove", proved)
    searched(prepared, max_trials=3, **settings)
    assert [soak.enough_s for soak in soaks] == [soak_s]


def test_what_was_given_up_against_a_setting_that_fails_is_tried_again(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    """Only bf16 trials finish at first, everything slower is given up; then bf16 fails the last test."""

    def pruning(number: int, job: Job, **_: Any) -> Trial:
        found = scripted(job.strategy)
        is_given_up = 0 < number < 40 and job.strategy.precision != "bf16"
        if is_given_up:
            return factories.trial(
                number, job.strategy, outcome="pruned", measurement=None, samples_per_s=found.samples_per_s
            )
        return factories.trial(number, job.strategy, measurement=found)

    def without_bf16(job: Job, reference: object, **_: Any) -> Proof:
        outcome = "diverged" if job.strategy.precision == "bf16" else "ok"
        return Proof(outcome=outcome)  # type: ignore[arg-type]

    scripted_device.setattr(trials, "run_trial", pruning)
    scripted_device.setattr(study, "prove", without_bf16)
    scripted_device.setattr(study, "MAX_PROOFS", 60)
    result = searched(prepared)
    assert result.best.number >= 40
    assert result.best.strategy.precision == "fp16"


def test_each_knob_is_taken_back_and_what_brings_nothing_stays_back(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(task, "expert_guess", lambda *_, **__: GUESS)
    observer = Silent()
    result = searched(prepared, observer, max_trials=2, budget_s=1000.0)
    by_knob = {share.knob: share for share in result.shares}
    assert list(by_knob) == ["precision", "padding", "workers"], "the largest first"
    assert [share.ratio and round(share.ratio.ratio, 2) for share in result.shares] == [2.0, 1.8, 0.95]
    assert all(share.num_rounds == 3 for share in result.shares)
    assert by_knob["workers"].brings_nothing
    assert result.best.strategy == msgspec.structs.replace(GUESS, workers=0)
    assert result.num_rounds == 3, "raced against the baseline itself"
    assert observer.origins[-1] == "without what brings nothing"


def test_where_there_is_no_time_each_knobs_share_is_estimated(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(task, "expert_guess", lambda *_, **__: GUESS)
    for explains, budget_s in ((False, None), (None, 10.0)):
        result = searched(prepared, max_trials=2, explains=explains, budget_s=budget_s)
        assert result.best.strategy == GUESS
        assert {share.num_rounds for share in result.shares} == {0}
    asked = searched(prepared, max_trials=2, explains=True, budget_s=10.0)
    assert all(share.num_rounds for share in asked.shares)


def test_a_knob_without_which_it_does_not_run_is_kept(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    class NoneWithoutBuckets(ScriptedRace):
        def run(self, **_: Any) -> None:
            super().run()
            for entrant in self.entrants[1:]:
                if entrant.trial.number < 0 and entrant.job.strategy.padding == "max":
                    self.failures[entrant.trial.number] = TrialEndedError("crashed", "scripted")
                if entrant.trial.number < 0 and entrant.job.strategy.workers == 0:
                    self.failures[entrant.trial.number] = TrialEndedError("oom", "its neighbours took it")

    scripted_device.setattr(task, "expert_guess", lambda *_, **__: GUESS)
    scripted_device.setattr(races, "Race", NoneWithoutBuckets)
    result = searched(prepared, max_trials=2, budget_s=1000.0)
    assert result.shares[0].knob == "padding"
    assert (result.shares[0].ratio, result.shares[0].reason) == (None, "crashed: scripted")
    assert "workers" not in {share.knob for share in result.shares}, "whose fault it was is not known"
    assert result.best.strategy.padding == "buckets"


def test_the_profile_holds_the_winner_and_its_evidence(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    result = searched(prepared)
    profile = profile_of(result, factories.device(), prepared[1])
    assert profile.strategy == result.best.strategy
    assert profile.evidence.speedup == result.speedup
    assert profile.evidence.num_trials == 40
    assert profile.evidence.baseline.projected_s > profile.evidence.best.projected_s > 0
