"""Measurements that claims rest on; each is a command of its own: python -m benchmarks.NAME"""

from pathlib import Path

from autotune.profile import read_profile
from autotune.strategy import Strategy
from autotune.workloads.base import Workload


def strategy_of(setting: str, workload: Workload) -> Strategy:
    """What an argument names: a profile's file, or ``none`` for the plain baseline."""
    return workload.baseline if setting == "none" else read_profile(Path(setting)).strategy
