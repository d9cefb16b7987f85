"""What a search looks for besides time, on scripted trials: memory, memory at some speed, a front, energy."""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec
import pytest

from autotune.errors import AutotuneError
from autotune.measurement import Trial
from autotune.profile import format_profile, parse_profile
from autotune.search import races, trials
from autotune.search.finals import Final
from autotune.search.result import profile_of
from autotune.search.task import Task
from autotune.trial.worker import Job
from tests import factories
from tests.scripted import (
    Prepared,
    ScriptedRace,
    scripted,
    searched,
)


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


def test_energy_is_minimised_where_it_is_counted(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    def frugal(number: int, job: Job, **_: Any) -> Trial:
        joules = {"fp32": 3.0, "tf32": 3.0, "bf16": 2.0, "fp16": 1.0}[job.strategy.precision]
        found = msgspec.structs.replace(scripted(job.strategy), joules_per_sample=joules)
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
    scripted_device.setattr(races, "Race", FrugalRace)
    assert searched(prepared, objective="energy").best.strategy.precision == "fp16"


def test_energy_that_nobody_counts_is_refused_before_a_trial(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(trials, "run_trial", lambda *_, **__: pytest.fail("a trial ran"))
    hardware = factories.hardware(energy_counter="refused: there is none that can be read")
    scripted_device.setattr(factories, "hardware", lambda: hardware)
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
