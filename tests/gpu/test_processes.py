"""Trials on a card as real processes: who has a context there, and what memory that runs out does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from autotune import workloads
from autotune.strategy import Strategy
from autotune.trial.runner import run_trial
from autotune.trial.worker import Job
from autotune.workloads.base import WorkloadRef
from tests.marks import on_a_card

pytestmark = on_a_card

PLENTY = 2**40


@pytest.fixture(scope="module")
def ref(tiny_reviews: Path) -> WorkloadRef:
    return workloads.get("imdb").prepare(tiny_reviews, limit=96, on_progress=lambda _: None)


def job(ref: WorkloadRef, *, limit_bytes: int | None = None, **knobs: Any) -> Job:
    strategy = msgspec.convert({"micro_batch": 32, **knobs}, Strategy)
    return Job(workload=ref, strategy=strategy, backend="cuda", memory_limit_bytes=limit_bytes, seed=0)


ON_THE_CARD = """
import os, sys
import msgspec, psutil, pynvml, torch
from autotune.probe import describe_device
from autotune import backends
from autotune.trial.runner import Session
from autotune.trial.worker import Command, Job

pynvml.nvmlInit()
card = pynvml.nvmlDeviceGetHandleByIndex(0)

def ours():
    family = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    return family & {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card)}

describe_device(backends.get("cuda"))
job = msgspec.json.decode(sys.stdin.read(), type=Job)
with Session(job, memory_limit_bytes=2**40) as session:
    session.time(Command(min_laps=1), timeout_s=120)
    during = ours()
print(len(during), os.getpid() in during, len(ours()), torch.cuda.is_initialized())
"""


def test_only_the_trial_itself_has_a_context(ref: WorkloadRef) -> None:
    """Neither the search nor the warm server that trials are forked from."""
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_CARD],
        input=msgspec.json.encode(job(ref)).decode(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", "False", "0", "False"]


@pytest.mark.parametrize("knobs", [{}, {"graphs": "step"}, {"compile": "reduce-overhead"}], ids=str)
def test_a_trial_without_memory_is_a_record_and_harms_nobody(ref: WorkloadRef, knobs: dict[str, Any]) -> None:
    a, b = (torch.randn(512, 512, device="cuda", dtype=torch.float64) for _ in range(2))
    expected = a.cpu() @ b.cpu()
    outgrown = run_trial(0, job(ref, limit_bytes=300 * 2**20, **knobs), timeout_s=300, memory_limit_bytes=PLENTY)
    assert (outgrown.outcome, outgrown.measurement) == ("oom", None), outgrown.reason
    torch.testing.assert_close((a @ b).cpu(), expected)
    healthy = run_trial(1, job(ref), timeout_s=300, memory_limit_bytes=PLENTY)
    assert healthy.outcome == "ok", healthy.reason
