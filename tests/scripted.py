"""A scripted device to search on: trials, race and last test without a process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from autotune import backends
from autotune.measurement import Measurement, Trial
from autotune.search.finals import Final
from autotune.search.proof import Proof
from autotune.search.result import Result
from autotune.search.settings import Settings
from autotune.search.study import search
from autotune.search.task import Task
from autotune.search.turns import Entrant
from autotune.strategy import Strategy
from autotune.trial.runner import TrialEndedError
from autotune.trial.worker import Job
from autotune.workloads.base import Workload, WorkloadRef
from tests import factories
from tests.observing import Silent

CPU = backends.get("cpu")
GUESS = Strategy(micro_batch=32, precision="bf16", padding="buckets", workers=1)
"""An expert's guess of which the loader process brings nothing."""

Prepared = tuple[WorkloadRef, Workload]


def scripted(strategy: Strategy) -> Measurement:
    """A device on which bf16, flash and buckets pay, micro batch 8 is best, and everything else costs."""
    rate = 5.0
    rate *= {"fp32": 1, "tf32": 1, "bf16": 2, "fp16": 1.8}[strategy.precision]
    rate *= {"eager": 1, "sdpa": 1.1, "sdpa_math": 0.9, "sdpa_flash": 1.2}.get(strategy.attention, 1)
    rate *= {"max": 1, "longest": 1.2, "buckets": 1.8, "packed": 1.7}[strategy.padding]
    rate *= {1: 0.5, 2: 0.8, 4: 1.1, 8: 1.3, 16: 1.2, 32: 1}[strategy.micro_batch]
    rate *= {"none": 1, "every_4th": 0.95, "every_2nd": 0.9}.get(strategy.checkpoint, 0.8)
    rate *= 1 - 0.05 * strategy.workers
    rate *= {"default": 1, "retain": 1.1}[strategy.allocator]
    memory = strategy.micro_batch * 60 * 2**20
    return factories.measurement(rate, peak_memory_bytes=memory)


def run_scripted(number: int, job: Job, **_: Any) -> Trial:
    return factories.trial(number, job.strategy, measurement=scripted(job.strategy))


def interrupted_at(end: int) -> Any:
    def trial(number: int, job: Job, **_: Any) -> Trial:
        if number == end:
            raise KeyboardInterrupt
        return run_scripted(number, job)

    return trial


class ScriptedRace:
    """A race that ends as the trials did."""

    def __init__(self, entrants: Sequence[Entrant], **_: Any) -> None:
        self.entrants = list(entrants)
        self.num_rounds = 0
        self.num_disturbed = 0
        self.failures: dict[int, TrialEndedError] = {}

    def run(self, **_: Any) -> None:
        self.num_rounds = 3

    def finals(self) -> list[Final]:
        found = [(entrant, scripted(entrant.job.strategy)) for entrant in self.entrants]
        return [
            Final(trial=entrant.trial, measurement=m, epoch_s=(1000 / m.samples_per_s,) * self.num_rounds)
            for entrant, m in found
            if entrant.trial.number not in self.failures and self.num_rounds
        ]


def prove_scripted(job: Job, reference: object, **_: Any) -> Proof:
    peak_bytes = scripted(job.strategy).peak_memory_bytes
    return Proof(outcome="ok", loss_deviation=0.001, soak_steps=50, peak_memory_bytes=peak_bytes)


def searched(
    prepared: tuple[WorkloadRef, Workload],
    observer: Silent | None = None,
    *,
    journal_path: Path | None = None,
    **settings: Any,
) -> Result:
    """A search on the scripted device, in a journal of its own where none is given."""
    ref, workload = prepared
    wanted = msgspec.convert({"budget_s": None, "max_trials": 40, **settings}, Settings)
    with tempfile.TemporaryDirectory() as folder:
        path = journal_path or Path(folder) / "imdb.journal"
        task = Task(ref=ref, workload=workload, hardware=factories.hardware(), backend=CPU, settings=wanted)
        return search(task, observer or Silent(), journal_path=path)
