"""A setting that is a little off in the last test, in real processes."""

from __future__ import annotations

import psutil
import pytest

from autotune import trace
from autotune.search.proof import prove, reference_losses
from autotune.strategy import Strategy
from autotune.trial.runner import Session
from autotune.trial.worker import Job, Soak
from autotune.workloads.base import WorkloadRef
from tests.faulty import NAME, RECIPE

PLENTY = 2**40


@pytest.mark.parametrize(("rounding", "outcome"), [(1e-3, "ok"), (2e-4, "diverged")])
def test_a_doubtful_setting_is_as_far_off_as_roundings_take_the_baseline(
    rounding: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = WorkloadRef(name=NAME, folder="none", source="made up")
    strategy = Strategy(micro_batch=RECIPE.global_batch)
    job = Job(workload=ref, strategy=strategy, backend="cpu", memory_limit_bytes=None, seed=0)
    plain = reference_losses(job, timeout_s=60, memory_limit_bytes=PLENTY)
    reference = tuple(1.0005 * loss for loss in plain)
    sessions = list[Session]()
    started = Session.__init__

    def start(session: Session, *args: object, **options: object) -> None:
        started(session, *args, **options)  # type: ignore[arg-type]
        sessions.append(session)

    def told() -> float:
        assert [psutil.pid_exists(session._child.pid) for session in sessions] == [False]
        return rounding

    monkeypatch.setattr(Session, "__init__", start)
    soak = Soak(enough_steps=2, enough_s=10.0)
    found = prove(job, reference, soak=soak, timeout_s=60, memory_limit_bytes=PLENTY, rounding=told)
    assert (found.outcome, found.soak_steps > 0) == (outcome, outcome == "ok")
    assert found.loss_deviation == pytest.approx(trace.deviation(reference, plain))
    assert len(sessions) == (2 if outcome == "ok" else 1)
