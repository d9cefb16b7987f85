"""What is expected of settings before any is tried, and what the guess makes of the baseline's trial."""

from __future__ import annotations

import dataclasses
from typing import get_args

import msgspec
import pytest

from autotune.backends.base import Capability
from autotune.checks.kernels import UNMASKED_MS
from autotune.search.objective import FASTEST
from autotune.search.settings import Settings
from autotune.search.task import Task
from autotune.search.work import ATTENTION_POWER
from autotune.strategy import Attention, Checkpoint, Precision, Strategy
from tests import factories
from tests.scripted import CPU, Prepared


def test_the_tokens_that_a_setting_computes_are_known_without_a_trial(prepared: Prepared) -> None:
    ref, workload = prepared
    task = Task(ref=ref, workload=workload, hardware=factories.hardware(), backend=CPU, settings=Settings())
    found = {padding: task.tokens(padding, 4) for padding in ("max", "longest", "buckets", "packed")}
    assert found["max"] == workload.max_tokens
    assert found["max"] > found["longest"] > found["buckets"] >= workload.train.lengths.mean()
    assert task.tokens("longest", 1) < found["longest"] < task.tokens("longest", 32)
    bucketed = msgspec.structs.replace(task.baseline, padding="buckets", micro_batch=4)
    prior = task.prior(FASTEST)
    assert prior.work(task.baseline) / prior.work(bucketed) == pytest.approx(found["max"] / found["buckets"])
    work = {name: prior.work(msgspec.structs.replace(task.baseline, checkpoint=name)) for name in get_args(Checkpoint)}
    assert work["every_block"] == pytest.approx(work["none"] * 4 / 3)
    assert work["every_block"] > work["every_2nd"] > work["every_4th"] > work["none"] == work["memory_budget"]
    halved = msgspec.structs.replace(task.baseline, threads=1)
    assert prior.work(halved) == 2 * prior.work(task.baseline), "the probe found one thread half as fast as all"


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        (1.0, {(0, 0): 10, (0, 1): 14, (2, 0): 10, (1, 1): 8, (2, 1): 14}),  # one thread computes half as fast
        (0.0, {(0, 0): 10, (1, 0): 6, (2, 0): 4, (4, 0): 4}),
    ],
)
def test_loader_processes_are_expected_to_read_beside_the_step(
    prepared: Prepared, busy: float, expected: dict[tuple[int, int], float]
) -> None:
    """Of ten seconds the baseline waits six for data, on two cores, which reading takes or leaves."""
    ref, workload = prepared
    workload = dataclasses.replace(workload, reading_busy=busy)
    task = Task(ref=ref, workload=workload, hardware=factories.hardware(), backend=CPU, settings=Settings())
    waiting = factories.trial(measurement=factories.measurement(loader_wait=0.6), strategy=task.baseline)
    work = task.prior(FASTEST, waiting).work
    for (workers, threads), seconds in expected.items():
        found = 10 * work(msgspec.structs.replace(task.baseline, workers=workers, threads=threads))
        assert found == pytest.approx(seconds), (workers, threads)


@pytest.mark.parametrize(
    ("busy", "wait", "precision", "num_cores", "workers"),
    [
        (0.0, 0.6, "fp32", 16, 2),  # two read as fast as it computes
        (0.0, 0.6, "bf16", 16, 8),
        (0.0, 0.6, "bf16", 2, 2),
        (0.0, 0.09, "fp32", 16, 0),
        (1.0, 0.6, "fp32", 2, 0),  # what reads would take what computes
    ],
)
def test_a_guess_reads_ahead_where_the_baseline_waited(
    prepared: Prepared, busy: float, wait: float, precision: Precision, num_cores: int, workers: int
) -> None:
    ref, workload = prepared
    workload = dataclasses.replace(workload, reading_busy=busy)
    rates = {"fp32": 100.0, "bf16": 500.0}
    hardware = factories.hardware()
    matmuls = [
        Capability(name=f"matmul.{name}", value=True, measured={"gflop_per_s": rate}) for name, rate in rates.items()
    ]
    others = [one for one in hardware.capabilities if not one.name.startswith("matmul.")]
    hardware = msgspec.structs.replace(
        hardware,
        device=msgspec.structs.replace(hardware.device, num_cores=num_cores),
        capabilities=(*others, *matmuls),
    )
    task = Task(ref=ref, workload=workload, hardware=hardware, backend=CPU, settings=Settings())
    guess = msgspec.structs.replace(task.baseline, precision=precision)
    waited = factories.measurement(loader_wait=wait)
    assert task.read_ahead(guess, waited).workers == workers
    task = dataclasses.replace(task, settings=Settings(objective="memory"))
    assert task.read_ahead(guess, waited).workers == 0


def test_attention_kernels_are_expected_to_be_as_fast_as_the_probe_found_them(prepared: Prepared) -> None:
    ref, workload = prepared
    plain = factories.hardware()
    others = tuple(one for one in plain.capabilities if not one.name.startswith("attention.sdpa_math"))
    maskless = Capability(name="attention.sdpa_math.fp32", value=False, reason="no mask", measured={UNMASKED_MS: 1.0})
    window = Capability(
        name="attention.window.fp32", value=True, reason="ok", measured={"forward_ms": 40.0, "backward_ms": 1.0}
    )
    hardware = msgspec.structs.replace(plain, capabilities=(*others, maskless, window))
    task = Task(ref=ref, workload=workload, hardware=hardware, backend=CPU, settings=Settings())
    names: tuple[Attention, ...] = ("sdpa", "sdpa_flash", "eager", "flash_attn", "sdpa_math", "window")
    works = {name: task.prior(FASTEST).work(Strategy(attention=name, micro_batch=32)) for name in names}
    slower = works["eager"] / works["sdpa"]
    assert slower == pytest.approx((5 / 4) ** ATTENTION_POWER), "4 + 1 ms instead of 3 + 1, a part of the step"
    assert works["sdpa_flash"] == works["sdpa"], "on a CPU they are one kernel, which was timed twice"
    assert works["flash_attn"] == works["sdpa"], "nothing is held against what has no figure"
    assert works["sdpa_math"] == works["sdpa"], "nor held for what was timed without the mask that others had"
    assert works["window"] == works["sdpa"], "the probe's window leaves nothing out"
