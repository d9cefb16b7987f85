"""Measurements that claims rest on; each is a command of its own: python -m benchmarks.NAME"""

from pathlib import Path

import msgspec

from autotune import backends
from autotune.flops import flops_of
from autotune.profile import read_profile
from autotune.strategy import Strategy
from autotune.trial.worker import Job
from autotune.workloads.base import Workload, WorkloadRef


def strategy_of(setting: str, workload: Workload) -> Strategy:
    """What an argument names: a profile's file, ``none`` for the plain baseline, or what differs from that, as in
    ``precision=bf16,padding=buckets``. Raises msgspec.ValidationError for a knob or a value that there is not."""
    if "=" not in setting:
        return workload.baseline if setting == "none" else read_profile(Path(setting)).strategy
    changes = dict(part.split("=", 1) for part in setting.split(","))
    return msgspec.convert({**workload.baseline.to_dict(), **changes}, Strategy, strict=False)


def job_of(strategy: Strategy, ref: WorkloadRef, workload: Workload) -> Job:
    """As the search times it on this device."""
    return Job(
        workload=ref,
        strategy=strategy,
        backend=backends.find().name,
        memory_limit_bytes=None,
        seed=0,
        usual_cost=flops_of(workload).cost,
    )
