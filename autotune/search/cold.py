"""How long a compiled setting takes to start cold: what is compiled outlives trials and searches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import msgspec

from autotune.measurement import Measurement, Trial
from autotune.strategy import Strategy
from autotune.trial.runner import Session, TrialEndedError
from autotune.trial.worker import Command, Job

MIN_COLD_S, COLD_S = 60.0, 600.0
"""Compiling for its own sake needs so much of the budget, and ends after so long: max-autotune takes minutes."""
_UNSEEN = ("accumulation", "graphs", "workers", "prefetch", "allocator", "optimizer", "threads")


def known_warm_up_s(trials: Iterable[Trial], strategy: Strategy) -> float | None:
    """The warm-up of the trials that had to compile what the strategy shares; None where none had to."""
    same = [trial.measurement for trial in trials if _graphs(trial.strategy) == _graphs(strategy)]
    return max((one.warm_up_s for one in same if one is not None and not one.is_from_cache), default=None)


def _graphs(strategy: Strategy) -> Strategy:
    """The strategy but for what the compiler does not see: those that are equal share what is compiled."""
    plain = Strategy(micro_batch=strategy.micro_batch)
    return msgspec.structs.replace(strategy, **{knob: getattr(plain, knob) for knob in _UNSEEN})


def cold_start(job: Job, *, timeout_s: float, memory_limit_bytes: int) -> Measurement | None:
    """A compiled setting timed where nothing is compiled yet; None where that fails."""
    with tempfile.TemporaryDirectory(prefix="autotune-compiled-", ignore_cleanup_errors=True) as folder:
        cold = msgspec.structs.replace(job, compiles_into=folder)
        try:
            with Session(cold, memory_limit_bytes=memory_limit_bytes) as session:
                return session.time(Command(min_laps=5), timeout_s=timeout_s).measurement
        except TrialEndedError:
            return None
