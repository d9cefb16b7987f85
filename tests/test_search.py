"""The search's logic on scripted trials: what is tried, what wins, what a failure does. No process is started here
(tests/test_trial.py and tests/test_cli.py do that)."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from autotune.errors import AutotuneError
from autotune.measurement import Outcome, Trial
from autotune.profile import format_profile, parse_profile
from autotune.search import study, trials
from autotune.search.finals import Final
from autotune.search.proof import Proof
from autotune.search.result import profile_of
from autotune.search.settings import Settings
from autotune.search.space import build_space
from autotune.search.study import search
from autotune.search.task import Task
from autotune.strategy import Attention, Strategy, baseline
from autotune.trial.runner import TrialEndedError
from autotune.trial.worker import Job, Progress
from tests import factories
from tests.observing import Silent, SilentPulse
from tests.scripted import (
    CPU,
    Prepared,
    ScriptedRace,
    interrupted_at,
    prove_scripted,
    run_scripted,
    scripted,
    searched,
)

GIB = 2**30


def test_the_baseline_comes_first_the_guess_second_and_nothing_twice(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    observer = Silent()
    result = searched(prepared, observer)
    assert result.trials[0].strategy == baseline(32)
    assert observer.origins[:3] == ["plain baseline", "expert's guess", "search"]
    assert result.trials[1].strategy == Strategy(
        attention="sdpa_flash", precision="bf16", micro_batch=8, accumulation=4, padding="buckets", allocator="retain"
    )
    assert len({trial.strategy for trial in result.trials}) == len(result.trials) == 40


def test_micro_batch_times_accumulation_is_the_global_batch_always(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    assert {trial.strategy.global_batch for trial in searched(prepared).trials} == {32}


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_the_space_is_found(prepared: Prepared, scripted_device: pytest.MonkeyPatch, seed: int) -> None:
    result = searched(prepared, seed=seed)
    assert result.best.strategy == Strategy(
        attention="sdpa_flash", precision="bf16", micro_batch=8, accumulation=4, padding="buckets", allocator="retain"
    )
    assert result.num_rounds == 3
    best, base = result.best.measurement, result.baseline.measurement
    assert best is not None
    assert base is not None
    assert result.speedup.ratio == pytest.approx(best.samples_per_s / base.samples_per_s)


def test_the_nearest_profiles_setting_is_tried_third(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ref, workload = prepared
    elsewhere = Strategy(micro_batch=6, accumulation=8, precision="bf16", attention="sdpa_cudnn", padding="longest")
    task = Task(
        ref=ref,
        workload=workload,
        hardware=factories.hardware(),
        backend=CPU,
        settings=Settings(budget_s=None, max_trials=3),
        known_good=elsewhere,
    )
    observer = Silent()
    third = search(task, observer, journal_path=tmp_path / "imdb.journal").trials[2].strategy
    assert observer.origins[2] == "as in the nearest profile"
    assert third == Strategy(micro_batch=4, accumulation=8, precision="bf16", attention="eager", padding="longest")


def test_a_misleading_guess_does_not_win(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    def no_flash(number: int, job: Job, **_: Any) -> Trial:
        found = scripted(job.strategy)
        if job.strategy.attention == "sdpa_flash":
            found = factories.measurement(found.samples_per_s / 2)
        return factories.trial(number, job.strategy, measurement=found)

    scripted_device.setattr(trials, "run_trial", no_flash)
    assert searched(prepared).best.strategy.attention == "sdpa"


def test_failing_trials_are_on_record_and_the_search_goes_on(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    outcomes = {1: "oom", 2: "timeout", 3: "crashed", 4: "diverged", 5: "invalid", 6: "pruned"}

    def failing(number: int, job: Job, **_: Any) -> Trial:
        if number in outcomes:
            return factories.trial(number, job.strategy, outcome=outcomes[number], reason="scripted", measurement=None)
        return run_scripted(number, job)

    scripted_device.setattr(trials, "run_trial", failing)
    result = searched(prepared)
    assert {trial.number: trial.outcome for trial in result.trials if trial.outcome != "ok"} == outcomes
    assert result.best.outcome == "ok"
    assert result.speedup.ratio > 3


def test_a_baseline_that_does_not_run_ends_the_search_with_its_reason(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(
        trials,
        "run_trial",
        lambda number, job, **_: factories.trial(number, outcome="oom", reason="too big", measurement=None),
    )
    observer = Silent()
    with pytest.raises(AutotuneError, match=r"baseline did not run .*too big"):
        searched(prepared, observer)
    assert observer.origins == ["plain baseline"], "the budget must not be spent on what cannot be compared"


def test_the_memory_objective_finds_the_leanest(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    assert searched(prepared, objective="memory").best.strategy.micro_batch == 1


def test_what_is_leanest_has_to_be_fast_enough_where_that_is_asked(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    best = searched(prepared, objective="memory", min_speed=0.8, max_trials=60).best
    assert best.strategy.micro_batch == 4, "1.1 / 1.3 of the speed; micro batches of 2 have 0.8 / 1.3"
    assert best.strategy.precision == "bf16"


def test_the_front_has_the_fastest_the_leanest_and_one_between(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    result = searched(prepared, objective="pareto", max_trials=60)
    front = {choice.name: choice for choice in result.front}
    assert list(front) == ["fastest", "balanced", "leanest"]
    assert result.best.strategy == front["fastest"].trial.strategy
    assert front["fastest"].trial.strategy.micro_batch == 8
    assert front["leanest"].trial.strategy.micro_batch == 1
    assert all(choice.proof is not None and choice.proof.outcome == "ok" for choice in result.front)
    products = [
        found.peak_memory_bytes / found.samples_per_s
        for found in (choice.trial.measurement for choice in result.front)
        if found is not None
    ]
    assert products[1] == min(products)
    assert front["fastest"].speedup.ratio > front["leanest"].speedup.ratio > 1
    profile = profile_of(result, factories.device(), prepared[1])
    again = parse_profile(tomllib.loads(format_profile(profile)), "again")
    assert again == profile
    assert again.pick("leanest").strategy == front["leanest"].trial.strategy


def test_much_less_memory_does_not_make_up_for_being_too_slow(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    def lean_and_slow(number: int, job: Job, **_: Any) -> Trial:
        found = scripted(job.strategy)
        if job.strategy.micro_batch == 1:
            found = msgspec.structs.replace(found, peak_memory_bytes=2**20)  # a thousandth
        return factories.trial(number, job.strategy, measurement=found)

    scripted_device.setattr(trials, "run_trial", lean_and_slow)
    best = searched(prepared, objective="memory", min_speed=0.8, max_trials=60).best
    assert best.strategy.micro_batch > 1


def test_a_front_that_does_not_fit_into_memory_side_by_side_keeps_its_leanest(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    crowded = 45 * 60 * 2**20  # the baseline takes 32 of these, the fastest 8, the leanest one
    scripted_device.setattr(Task, "machine_limit_bytes", property(lambda self: crowded))
    result = searched(prepared, objective="pareto", max_trials=60)
    front = {choice.name: choice.trial.strategy.micro_batch for choice in result.front}
    assert front["leanest"] == 1
    assert front["fastest"] == 8


def test_a_best_that_fails_when_it_is_measured_again_is_the_best_no_more(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    tried: list[Strategy] = []

    def once(number: int, job: Job, **_: Any) -> Trial:
        tried.append(job.strategy)
        if tried.count(job.strategy) > 1:
            return factories.trial(number, job.strategy, outcome="crashed", measurement=None)
        return run_scripted(number, job)

    scripted_device.setattr(trials, "run_trial", once)
    scripted_device.setattr(study, "Pulse", DriftingPulse)
    result = searched(prepared, max_trials=20, explains=False)
    failed = [trial.strategy for trial in result.trials if trial.outcome == "crashed"]
    assert failed
    assert len(failed) == len(set(failed)), "not again and again"
    assert result.best.strategy not in failed


@pytest.mark.parametrize("has_counter", [True, False])
def test_energy_is_minimised_where_it_is_counted(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, has_counter: bool
) -> None:
    def frugal(number: int, job: Job, **_: Any) -> Trial:
        joules = {"fp32": 3.0, "tf32": 3.0, "bf16": 2.0, "fp16": 1.0}[job.strategy.precision]
        found = msgspec.structs.replace(scripted(job.strategy), joules_per_sample=joules if has_counter else None)
        return factories.trial(number, job.strategy, measurement=found)

    class FrugalRace(ScriptedRace):
        def finals(self) -> list[Final]:
            found = []
            for entrant, final in zip(self.entrants, super().finals(), strict=True):
                measurement = frugal(0, entrant.job).measurement
                assert measurement is not None
                found.append(msgspec.structs.replace(final, measurement=measurement))
            return found

    scripted_device.setattr(trials, "run_trial", frugal)
    scripted_device.setattr(study, "Race", FrugalRace)
    if has_counter:
        assert searched(prepared, objective="energy").best.strategy.precision == "fp16"
    else:
        with pytest.raises(AutotuneError, match="no energy counter"):
            searched(prepared, objective="energy")


def test_a_memory_budget_keeps_bigger_settings_from_winning_the_baseline_too(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    result = searched(prepared, memory_budget_bytes=270 * 2**20)
    assert result.best.strategy.micro_batch == 4
    assert result.baseline.measurement is not None
    with pytest.raises(AutotuneError, match=r"no setting stays below .*raise --memory-budget"):
        searched(prepared, memory_budget_bytes=2**20)


def test_a_tiny_budget_still_compares_the_guess_with_the_baseline(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    result = searched(prepared, budget_s=1e-6, max_trials=None)
    assert len(result.trials) == 2
    assert result.best.number == 1
    assert not result.num_rounds, "there is no time for a race"


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


class FirstFails(ScriptedRace):
    """The best finalist runs out of memory in the race."""

    def run(self, **_: Any) -> None:
        super().run()
        self.failures = {self.entrants[1].trial.number: TrialEndedError("oom", "scripted")}


def test_a_setting_that_fails_in_the_race_does_not_win(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    best_trial = searched(prepared).best
    scripted_device.setattr(study, "Race", FirstFails)
    result = searched(prepared)
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

    scripted_device.setattr(study, "Race", AllFail)
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

    scripted_device.setattr(study, "Race", Growing)
    assert searched(prepared, memory_budget_bytes=2 * GIB).best.number not in grown


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


class DriftingPulse(SilentPulse):
    """Says of the first beats that the device was slow; its trials were not, however."""

    def __init__(self, backend_name: str) -> None:
        self.num_beats = 0

    def beat(self) -> float:
        self.num_beats += 1
        return 0.018 if self.num_beats <= 3 else 0.010


def test_a_pulse_that_misleads_about_the_best_does_not_decide(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    guess = msgspec.structs.replace(baseline(32), precision="bf16", padding="buckets", workers=2)

    def given_up(number: int, job: Job, *, hopeless: Callable[[Progress], str | None], **_: Any) -> Trial:
        found = scripted(job.strategy)
        reason = hopeless(Progress(stage="timing", num_laps=3, samples_per_s=found.samples_per_s))
        if reason is None:
            return factories.trial(number, job.strategy, measurement=found)
        rate = found.samples_per_s
        return factories.trial(number, job.strategy, outcome="pruned", measurement=None, samples_per_s=rate)

    scripted_device.setattr(trials, "run_trial", given_up)
    scripted_device.setattr(trials, "expert_guess", lambda *_: guess)
    scripted_device.setattr(study, "Pulse", DriftingPulse)
    observer = Silent()
    result = searched(prepared, observer)
    assert any("again" in origin for origin in observer.origins)
    best = max(scripted(trial.strategy).samples_per_s for trial in result.trials)
    assert scripted(result.best.strategy).samples_per_s == best


GUESS = msgspec.structs.replace(baseline(32), precision="bf16", padding="buckets", workers=1)


def test_each_knob_is_taken_back_and_what_brings_nothing_stays_back(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(trials, "expert_guess", lambda *_: GUESS)
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
    scripted_device.setattr(trials, "expert_guess", lambda *_: GUESS)
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

    scripted_device.setattr(trials, "expert_guess", lambda *_: GUESS)
    scripted_device.setattr(study, "Race", NoneWithoutBuckets)
    result = searched(prepared, max_trials=2, budget_s=1000.0)
    assert result.shares[0].knob == "padding"
    assert (result.shares[0].ratio, result.shares[0].reason) == (None, "crashed: scripted")
    assert "workers" not in {share.knob for share in result.shares}, "whose fault it was is not known"
    assert result.best.strategy.padding == "buckets"


def test_a_small_space_is_exhausted_and_the_search_ends(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ref, workload = prepared
    tiny = dataclasses.replace(
        workload, build_model=torch.nn.Module, recipe=msgspec.structs.replace(workload.recipe, global_batch=1)
    )
    refused = {f"attention__{a}__{p}": "no" for a in ("sdpa", "sdpa_math") for p in ("fp32", "bf16", "fp16")}
    hardware = factories.hardware(
        **refused,
        matmul__fp16="no",
        matmul__tf32="no",
        allocator__retain="no",
        optimizer__foreach="no",
        optimizer__fused="no",
        compile__default="no",
        **{"compile__max-autotune": "no"},
    )
    waiting = factories.measurement(loader_wait=0.5)  # else loader processes are not tried
    scripted_device.setattr(
        trials, "run_trial", lambda number, job, **_: factories.trial(number, job.strategy, measurement=waiting)
    )
    task = Task(
        ref=ref, workload=tiny, hardware=hardware, backend=CPU, settings=Settings(budget_s=None, max_trials=1000)
    )
    result = search(task, Silent(), journal_path=tmp_path / "imdb.journal")
    assert len(result.trials) == build_space(hardware, CPU, tiny).size


def test_the_profile_holds_the_winner_and_its_evidence(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    result = searched(prepared)
    profile = profile_of(result, factories.device(), prepared[1])
    assert profile.strategy == result.best.strategy
    assert profile.evidence.speedup == result.speedup
    assert profile.evidence.num_trials == 40
    assert profile.evidence.baseline.projected_s > profile.evidence.best.projected_s > 0


def test_what_is_larger_than_a_setting_that_ran_out_of_memory_is_not_tried(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    limit = 500 * 2**20

    def full(number: int, job: Job, **_: Any) -> Trial:
        found = scripted(job.strategy)
        if number and found.peak_memory_bytes > limit:
            return factories.trial(number, job.strategy, outcome="oom", reason="scripted", measurement=None)
        return factories.trial(number, job.strategy, measurement=found)

    scripted_device.setattr(trials, "run_trial", full)
    result = searched(prepared, memory_budget_bytes=limit, max_trials=60)
    kinds: dict[Strategy, list[int]] = {}
    for trial in result.trials[1:]:
        kind = msgspec.structs.replace(trial.strategy, micro_batch=1, accumulation=1)
        smallest = min(kinds.get(kind, [64]))
        assert trial.strategy.micro_batch < smallest, "a smaller one of the kind was too big already"
        if trial.outcome == "oom":
            kinds.setdefault(kind, []).append(trial.strategy.micro_batch)


def test_a_search_ends_when_no_trial_is_expected_to_pay(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    """The scripted trials take five seconds each; how much there is to gain grows with the planned epochs."""
    short = searched(prepared, budget_s=3600.0, max_trials=None, epochs=50)
    longer = searched(prepared, budget_s=3600.0, max_trials=None, epochs=5000)
    assert short.is_settled
    assert 2 <= len(short.trials) < len(longer.trials)
    assert longer.is_settled
    assert not searched(prepared, max_trials=len(short.trials) + 5, epochs=50).is_settled, "as many as were asked for"


def test_loader_processes_are_not_tried_where_nothing_waits_for_data(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    assert {trial.strategy.workers for trial in searched(prepared).trials} == {0}


def failing_with(attention: Attention, outcome: Outcome) -> Callable[..., Trial]:
    """The scripted device, but that nothing runs with some attention."""

    def run(number: int, job: Job, **_: Any) -> Trial:
        if job.strategy.attention == attention:
            return factories.trial(number, job.strategy, outcome=outcome, reason="scripted", measurement=None)
        return run_scripted(number, job)

    return run


def test_a_guess_that_fails_does_not_discredit_what_it_is_made_of(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(trials, "run_trial", failing_with("sdpa_flash", "crashed"))
    result = searched(prepared)
    assert result.trials[1].outcome == "crashed", "the guess itself"
    assert (result.best.strategy.attention, result.best.strategy.precision) == ("sdpa", "bf16")
    assert result.best.strategy.padding == "buckets"
    assert sum(trial.outcome == "crashed" for trial in result.trials) < 8


def test_what_may_not_win_is_not_what_others_have_to_beat(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    """The baseline is the fastest here, and over the memory budget."""

    def big_is_fast(number: int, job: Job, **_: Any) -> Trial:
        rate = 50.0 if job.strategy.micro_batch == 32 else scripted(job.strategy).samples_per_s / 10
        memory = scripted(job.strategy).peak_memory_bytes
        measurement = factories.measurement(rate, peak_memory_bytes=memory)
        fits = memory < 500 * 2**20 or job.memory_limit_bytes is None
        return factories.trial(number, job.strategy, measurement=measurement, outcome="ok" if fits else "oom")

    scripted_device.setattr(trials, "run_trial", big_is_fast)
    result = searched(prepared, memory_budget_bytes=600 * 2**20, budget_s=1e9, max_trials=None, epochs=100)
    assert len(result.trials) > 5
    assert result.best.strategy.precision == "bf16"
    assert result.best.strategy.micro_batch <= 8


def test_a_value_that_fails_whatever_it_is_combined_with_is_given_up(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(trials, "run_trial", failing_with("sdpa", "invalid"))
    result = searched(prepared)
    assert 1 <= sum(trial.strategy.attention == "sdpa" for trial in result.trials) <= 2
    assert result.best.strategy.attention == "sdpa_flash"
