"""The search's logic on scripted trials: what is tried, what wins, what a failure does. No process is started here
(tests/test_trial.py and tests/test_cli.py do that)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import optuna
import pytest
import torch

from autotune.errors import AutotuneError
from autotune.measurement import Outcome, Trial
from autotune.search import races, trials, turns
from autotune.search.journal import Journal
from autotune.search.sampling import Proposal, Sampler
from autotune.search.settings import Settings
from autotune.search.space import build_space
from autotune.search.standings import Standings
from autotune.search.study import search
from autotune.search.task import Task
from autotune.strategy import Attention, Strategy, baseline
from autotune.trial.worker import Job
from tests import factories
from tests.observing import Silent, SilentPulse
from tests.scripted import (
    CPU,
    Prepared,
    run_scripted,
    scripted,
    searched,
)


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


def test_a_device_that_does_not_heed_the_work_is_searched_to_its_best(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    def wayward(number: int, job: Job, **_: Any) -> Trial:
        rate = {"max": 10.0, "longest": 8.0, "buckets": 6.0, "packed": 6.0}[job.strategy.padding]
        rate *= 1.2 if job.strategy.checkpoint == "every_2nd" else 1.0
        return factories.trial(number, job.strategy, measurement=factories.measurement(rate))

    scripted_device.setattr(trials, "run_trial", wayward)
    found = [trial.strategy for trial in searched(prepared).trials if trial.samples_per_s == 12.0]
    assert found, "the best was tried"


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


def test_the_guess_has_as_long_as_the_baseline_took_however_short_the_budget(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    limits_s: list[float] = []

    def slow(number: int, job: Job, timeout_s: float, **_: Any) -> Trial:
        limits_s.append(timeout_s)
        return msgspec.structs.replace(run_scripted(number, job), wall_s=50.0)

    scripted_device.setattr(trials, "run_trial", slow)
    searched(prepared, budget_s=60.0, max_trials=3)
    step_s = scripted(baseline(32)).step_ms / 1000
    assert limits_s[:2] == [600.0, pytest.approx(50.0 + 2 * step_s)], "and two laps more than the baseline's one"


def trials_so_far(task: Task, *found: Trial) -> trials.Trials:
    journal = mock.Mock(trials=list(found), spent_s=0.0)
    return trials.Trials(task, Silent(), journal, SilentPulse("cpu"), clock=lambda: 0.0)


@pytest.mark.parametrize("is_any_left", [True, False])
def test_time_is_up_where_what_is_left_takes_too_long_not_where_nothing_is_left(
    task: Task, monkeypatch: pytest.MonkeyPatch, is_any_left: bool
) -> None:
    """The race then takes all that is left of the budget."""
    propose = Sampler.propose

    def slow_ones(self: Sampler, known: Any, *rest: Any) -> Proposal | None:
        if not known:  # what is queued
            return propose(self, known, *rest)
        return Proposal(baseline(16), cost_s=100.0) if is_any_left and len(rest) < 3 else None

    monkeypatch.setattr(Sampler, "propose", slow_ones)
    task = dataclasses.replace(task, settings=Settings(budget_s=60.0))
    journal = Journal(optuna.create_study())
    tried = trials.Trials(task, Silent(), journal, SilentPulse("cpu"), run=run_scripted, clock=lambda: 0.0)
    tried.run(lambda: 0.0)
    assert len(tried.history.all) == 1, "the baseline"
    assert tried.is_time_up == is_any_left


def test_what_is_compiled_may_take_half_of_the_budget_until_that_was_not_enough(task: Task) -> None:
    task = dataclasses.replace(task, settings=Settings(budget_s=300.0))
    plain = msgspec.structs.replace(baseline(32), precision="bf16")
    compiled = msgspec.structs.replace(plain, compile="default")
    first = [factories.trial(0), factories.trial(1, plain)]
    tried = trials_so_far(task, *first)
    assert [tried.timeout_s(one) for one in (plain, compiled)] == [100.0, 150.0]
    tried = trials_so_far(task, *first, factories.trial(2, compiled, outcome="timeout", measurement=None))
    assert [tried.timeout_s(one) for one in (plain, compiled)] == [100.0, 100.0]


def test_a_compiled_winner_has_time_left_to_compile_in_its_last_test(task: Task) -> None:
    task = dataclasses.replace(task, settings=Settings(budget_s=300.0))
    left_s = []
    for compile_mode in ("none", "default"):
        best = msgspec.structs.replace(baseline(32), precision="bf16", compile=compile_mode)
        fast = factories.measurement(samples_per_s=100.0, warm_up_s=30.0)
        tried = trials_so_far(task, factories.trial(0), factories.trial(1, best, measurement=fast))
        left_s.append(races.Races(task, Silent(), tried, Standings(task, tried.history)).left_s())
    assert left_s[0] - left_s[1] == pytest.approx(turns.CACHED_SHARE * 30.0)


def test_the_nearest_profiles_setting_is_tried_third(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ref, workload = prepared
    """With the guess's attention, as the device has none of that name."""
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
    assert third == Strategy(micro_batch=4, accumulation=8, precision="bf16", attention="sdpa_flash", padding="longest")


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


def test_a_tiny_budget_still_compares_the_guess_with_the_baseline(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    result = searched(prepared, budget_s=1e-6, max_trials=None)
    assert len(result.trials) == 2
    assert result.best.number == 1
    assert not result.num_rounds, "there is no time for a race"


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
