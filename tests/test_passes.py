"""A few steps of a user's own model in each precision, before the first guess."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotune import backends
from autotune.passes import HOPELESS, NUM_ROUNDS, Way, seconds_of
from autotune.search.guess import expert_guess
from autotune.search.settings import Settings
from autotune.search.task import Task
from autotune.workloads.base import Workload, WorkloadRef
from autotune.workloads.custom import workload_of
from tests import factories
from tests.scripted import CPU

FP32: Way = ("fp32", "contiguous")
BF16: Way = ("bf16", "contiguous")
SLOW_S = 0.05


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


def moody(refuses: bool = False) -> tuple[Workload, list[Any]]:
    """Which keeps the models that are made of it."""
    made = list[Any]()

    def make() -> Any:
        torch.manual_seed(0)
        made.append(Moody(refuses))
        return made[-1], (torch.randn(16, 3, 8, 8), torch.arange(16) % 3)

    return workload_of("moody", make), made


def test_a_precision_that_slows_a_model_down_is_found_and_given_up() -> None:
    workload, made = moody()
    found = seconds_of(workload, [FP32, BF16], sample_s=0.1)
    assert found[BF16] > SLOW_S > found[FP32]
    model = made[-1]
    assert {size for _, size in model.ran} == {2}, "of samples that take a tenth of a second some are enough"
    assert sum(is_short for is_short, _ in model.ran) == 2
    assert sum(not is_short for is_short, _ in model.ran) == 1 + NUM_ROUNDS
    assert HOPELESS * found[FP32] < found[BF16]


def test_a_way_in_which_the_model_does_not_train_is_not_there_and_nothing_is_changed() -> None:
    workload, made = moody(refuses=True)
    before = workload.build_model().state_dict()
    ways: list[Way] = [FP32, BF16, ("fp32", "channels_last"), ("bf16", "channels_last")]
    found = seconds_of(workload, ways, sample_s=1e-6)
    assert set(found) == {FP32, ("fp32", "channels_last")}
    assert seconds_of(workload, ways, sample_s=2.0) == {}, "it would take half a minute"
    assert all(math.isfinite(seconds) for seconds in found.values())
    assert {size for _, size in made[-1].ran} == {16}
    for name, tensor in made[-1].state_dict().items():
        assert tensor.equal(before[name])


def test_the_guess_is_what_was_fast_for_the_model() -> None:
    workload, _ = moody()
    hardware = factories.hardware()
    task = Task(
        ref=WorkloadRef(name="moody", folder="", source=""),
        workload=workload,
        hardware=hardware,
        backend=CPU,
        settings=Settings(),
    )
    assert expert_guess(task.space, hardware, CPU).precision == "bf16", "as products say"
    guess = task.guess(factories.measurement(samples_per_s=100.0))
    assert (guess.precision, guess.micro_batch) == ("fp32", 16)
    assert dataclasses.replace(task, backend=backends.get("cuda")).timed_ways == []


@pytest.mark.parametrize(("sample_s", "micro_batch"), [(0.2, 8), (0.0625, 8), (0.02, 16), (1e-4, 32)])
def test_a_micro_batch_is_worth_its_start(task: Task, sample_s: float, micro_batch: int) -> None:
    """Half a second of the baseline's at the least."""
    found = task.guess(factories.measurement(samples_per_s=1 / sample_s))
    assert found.micro_batch == micro_batch
