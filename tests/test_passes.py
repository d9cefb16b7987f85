"""A few steps of a user's own model in each precision, before the first guess."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotune import backends, workloads
from autotune.apply import Run, apply
from autotune.passes import HOPELESS, NUM_ROUNDS, Way, num_samples, seconds_of
from autotune.search.guess import expert_guess
from autotune.search.settings import Settings
from autotune.search.study import search
from autotune.search.task import Task
from autotune.workloads.base import Workload, WorkloadRef
from autotune.workloads.custom import workload_of
from tests import factories
from tests.brief import short_timings
from tests.observing import Silent
from tests.scripted import CPU

FP32: Way = ("fp32", "contiguous")
BF16: Way = ("bf16", "contiguous")
SLOW_S = 0.05
MORTAL = """
import os, time, torch
from torch import nn

class Mortal(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            os._exit(7) if DIES else time.sleep(0.05)
        return self.head(x)

def make():
    return Mortal(), (torch.randn(64, 8), torch.arange(64) % 3)
"""


class Moody(nn.Module):
    """Sleeps in half precision, or does not run in it; says in which it ran, and for how many samples."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__()
        self.refuses, self.ran = refuses, list[tuple[bool, int]]()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        is_short = torch.is_autocast_enabled("cpu")
        self.ran.append((is_short, len(x)))
        if is_short and self.refuses:
            raise NotImplementedError("no kernel for Half")
        if is_short:
            time.sleep(SLOW_S)
        return self.head(self.convolution(x).mean((2, 3)))  # type: ignore[no-any-return]


def moody(refuses: bool = False) -> Workload:
    def make() -> Any:
        torch.manual_seed(0)
        return Moody(refuses), (torch.randn(16, 3, 8, 8), torch.arange(16) % 3)

    return workload_of("moody", make)


def plain_run(workload: Workload) -> tuple[Run, Any]:
    """The baseline's, and its model."""
    run = apply(workload.baseline, workload, CPU)
    model: Any = run.model
    model.ran.clear()
    return run, model


def test_a_precision_that_slows_a_model_down_is_found_and_given_up() -> None:
    count = num_samples(0.1, num_ways=2, global_batch=16)
    run, model = plain_run(moody())
    found = seconds_of(run, [FP32, BF16], count)
    assert found[BF16] > SLOW_S > found[FP32]
    assert {size for _, size in model.ran} == {2}, "of samples that take a tenth of a second some are enough"
    assert sum(is_short for is_short, _ in model.ran) == 2
    assert sum(not is_short for is_short, _ in model.ran) == 1 + NUM_ROUNDS
    assert HOPELESS * found[FP32] < found[BF16]


def test_a_way_in_which_the_model_does_not_train_is_not_there() -> None:
    run, model = plain_run(moody(refuses=True))
    ways: list[Way] = [FP32, BF16, ("fp32", "channels_last"), ("bf16", "channels_last")]
    steps = list[None]()
    found = seconds_of(run, ways, 16, on_step=lambda: steps.append(None))
    assert set(found) == {FP32, ("fp32", "channels_last")}
    assert all(math.isfinite(seconds) for seconds in found.values())
    assert {size for _, size in model.ran} == {16}
    assert len(steps) == len(model.ran)


@pytest.mark.parametrize(("sample_s", "count"), [(1e-6, 16), (0.1, 2), (0.6, 2), (2.0, 0)])
def test_a_step_has_samples_enough_unless_all_would_take_too_long(sample_s: float, count: int) -> None:
    assert num_samples(sample_s, num_ways=2, global_batch=16) == count


def test_the_guess_is_what_was_fast_for_the_model() -> None:
    hardware = factories.hardware()
    task = Task(
        ref=WorkloadRef(name="moody", folder="", source=""),
        workload=moody(),
        hardware=hardware,
        backend=CPU,
        settings=Settings(),
    )
    assert expert_guess(task.space, hardware, CPU).precision == "bf16", "as products say"
    baseline = factories.measurement(samples_per_s=100.0)
    guess = task.guess(baseline, {FP32: 0.1, BF16: 0.2})
    assert (guess.precision, guess.micro_batch) == ("fp32", 16)
    timed = task.timed_ways(baseline)
    assert timed is not None
    assert timed.num_samples == 16
    assert {FP32, BF16} <= set(timed.ways)
    assert task.timed_ways(factories.measurement(samples_per_s=0.1)) is None, "it would take minutes"
    assert dataclasses.replace(task, backend=backends.get("cuda")).timed_ways(baseline) is None


@pytest.mark.parametrize(("sample_s", "micro_batch"), [(0.2, 8), (0.0625, 8), (0.02, 16), (1e-4, 32)])
def test_a_micro_batch_is_worth_its_start(task: Task, sample_s: float, micro_batch: int) -> None:
    """Half a second of the baseline's at the least."""
    found = task.guess(factories.measurement(samples_per_s=1 / sample_s))
    assert found.micro_batch == micro_batch


@pytest.mark.parametrize("dies_in", ["bf16", "nothing"])
def test_a_model_that_takes_its_process_down_leaves_the_guess_to_the_probe(dies_in: str, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(MORTAL.replace("DIES", str(dies_in == "bf16")))
    workload = workloads.get(f"{script}:make")
    ref = workload.prepare(None, limit=None, on_progress=lambda _: None)
    task = Task(
        ref=ref,
        workload=workload.open_workload(ref),
        hardware=factories.hardware(),
        backend=CPU,
        settings=Settings(budget_s=None, max_trials=2, explains=False),
    )
    with short_timings():
        result = search(task, Silent(), journal_path=tmp_path / "mine.journal")
    guess = result.trials[1]
    if dies_in == "bf16":
        assert (guess.strategy.precision, guess.outcome) == ("bf16", "crashed"), guess.reason
        assert "status 7" in guess.reason
        assert result.best.strategy == task.baseline
    else:
        assert guess.outcome == "ok", "what was slow in bf16 is not the guess"
        assert guess.strategy.precision == "fp32"
