"""How busy other processes keep this machine's cores: what a timing has to be distrusted for."""

from __future__ import annotations

import os
import time

import psutil

QUIET_SHARE = 0.075
"""Timings during which others had more than this share of the cores are disturbed ones."""


class Load:
    """How busy the machine is with other things, from where it is built on."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._machine_s = machine_cpu_s()
        self._own_s = cpu_s(os.getpid())

    def busy_cores(self, num_cores: int, children_s: float) -> float:
        """Cores of the ``num_cores`` that were not left to this process and its children, of all the machine has."""
        own_s = cpu_s(os.getpid()) - self._own_s + children_s
        elapsed_s = max(time.perf_counter() - self._start_s, 1e-3)
        others = max(0.0, (machine_cpu_s() - self._machine_s - own_s) / elapsed_s)
        return min(float(num_cores), max(0.0, num_cores + others - (psutil.cpu_count() or num_cores)))

    def is_quiet(self, num_cores: int, children_s: float) -> bool:
        """Whether others have left this process and its children the cores."""
        return self.busy_cores(num_cores, children_s) <= QUIET_SHARE * num_cores


def machine_cpu_s() -> float:
    """CPU seconds spent by everybody, those that a hypervisor took among them."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended; zero once it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)
