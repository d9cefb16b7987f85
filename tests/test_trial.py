"""Trials as real processes: what they measure, and every way they fail on record."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from autotune import workloads
from autotune.contention import Load
from autotune.search.cold import cold_start
from autotune.strategy import Strategy
from autotune.trial import worker
from autotune.trial.pulse import Pulse
from autotune.trial.runner import Session, TrialEndedError, run_trial
from autotune.trial.worker import Command, Failed, Job, Progress
from autotune.workloads.base import WorkloadRef
from tests import marks, own_script

PLENTY = 2**40


@pytest.fixture(scope="module")
def ref(tiny_reviews: Path) -> WorkloadRef:
    return workloads.get("imdb").prepare(tiny_reviews, limit=48, on_progress=lambda _: None)


def job(ref: WorkloadRef, **knobs: Any) -> Job:
    strategy = msgspec.convert({"micro_batch": 8, "accumulation": 4, "padding": "longest", **knobs}, Strategy)
    return Job(workload=ref, strategy=strategy, backend="cpu", memory_limit_bytes=None, seed=0)


def test_a_trial_measures_in_its_own_process_and_leaves_none_behind(ref: WorkloadRef) -> None:
    heard: list[Progress] = []
    trial = run_trial(3, job(ref), timeout_s=60, memory_limit_bytes=PLENTY, on_progress=heard.append)
    assert (trial.number, trial.outcome, trial.reason) == (3, "ok", "")
    assert trial.measurement is not None
    assert trial.samples_per_s == trial.measurement.samples_per_s > 0
    assert trial.measurement.peak_memory_bytes > 5_851_138 * 4 * 3  # weights, gradients and two AdamW moments at least
    assert [p.stage for p in heard][:2] == ["building", "first step"]
    assert heard[-1].stage == "evaluating"


@marks.pauses
def test_a_trials_rates_are_for_the_speed_that_its_beats_tell(ref: WorkloadRef) -> None:
    """Though its loader has a worker, which stands still with it."""
    with Pulse("cpu") as pulse:
        trial = run_trial(
            0,
            job(ref, workers=1),
            timeout_s=60,
            memory_limit_bytes=PLENTY,
            command=Command(min_laps=2, min_s=2.0),
            pulse=pulse,
        )
        assert pulse.cpu_s() > 0
    assert (trial.outcome, trial.has_beats) == ("ok", True)
    assert trial.measurement is not None
    assert trial.pulse_s == trial.measurement.pulse_s
    assert 0 < (trial.pulse_s or 0) < 0.1


@marks.pauses
def test_a_trial_goes_on_where_the_pulse_dies_in_the_middle_of_a_beat(ref: WorkloadRef) -> None:
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.lap is not None and not killed:
            assert pulse._child is not None
            assert pulse._paused is not None
            killed.append(pulse._paused)
            os.kill(pulse._child.pid, signal.SIGKILL)
            os.killpg(pulse._paused, signal.SIGSTOP)

    with Pulse("cpu") as pulse:
        trial = run_trial(
            0,
            job(ref),
            timeout_s=60,
            memory_limit_bytes=PLENTY,
            command=Command(min_laps=4, min_s=1.0),
            pulse=pulse,
            on_progress=kill,
        )
    assert killed
    assert (trial.outcome, trial.reason) == ("ok", "")


def test_a_cold_start_compiles_whatever_was_compiled_before(tmp_path: Path) -> None:
    """And leaves nothing behind."""
    script = WorkloadRef(name=own_script.write(tmp_path), folder="", source="")
    strategy, kept = Strategy(micro_batch=8, compile="default"), tmp_path / "kept"
    compiled = Job(
        workload=script, strategy=strategy, backend="cpu", memory_limit_bytes=None, seed=0, compiles_into=str(kept)
    )
    cold = cold_start(compiled, timeout_s=120, memory_limit_bytes=PLENTY)
    assert cold is not None
    assert not cold.is_from_cache
    assert not kept.exists()
    assert cold_start(compiled, timeout_s=0.05, memory_limit_bytes=PLENTY) is None


def test_a_setting_that_torch_refuses_is_invalid(ref: WorkloadRef) -> None:
    trial = run_trial(0, job(ref, attention="sdpa_cudnn"), timeout_s=60, memory_limit_bytes=PLENTY)
    assert trial.outcome == "invalid"
    assert "No viable backend" in trial.reason


def test_a_trial_over_its_time_is_killed_and_recorded(ref: WorkloadRef) -> None:
    trial = run_trial(0, job(ref), timeout_s=0.05, memory_limit_bytes=PLENTY)
    assert trial.outcome == "timeout"
    assert trial.wall_s < 10


def test_a_trial_over_the_memory_budget_is_oom_with_both_figures(ref: WorkloadRef) -> None:
    trial = run_trial(0, job(ref), timeout_s=60, memory_limit_bytes=2**20)
    assert trial.outcome == "oom"
    assert "over the memory limit of 1.00 MiB" in trial.reason


@pytest.mark.parametrize(("busy_cores", "outcome"), [(0.0, "pruned"), (1.0, "ok")])
def test_a_hopeless_trial_is_pruned_where_others_have_not_slowed_it(
    ref: WorkloadRef, monkeypatch: pytest.MonkeyPatch, busy_cores: float, outcome: str
) -> None:
    monkeypatch.setattr(Load, "busy_cores", lambda self, num_cores, children_s: busy_cores)
    trial = run_trial(
        0, job(ref), timeout_s=60, memory_limit_bytes=PLENTY, hopeless=lambda p: "too slow" if p.num_laps > 1 else None
    )
    assert (trial.outcome, trial.reason) == (outcome, "too slow" if outcome == "pruned" else "")
    assert trial.samples_per_s is not None
    assert (trial.measurement is None) == (outcome == "pruned")


@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGSEGV, "crashed"), (signal.SIGKILL, "oom")])
def test_a_trial_that_dies_of_a_signal_is_recorded(ref: WorkloadRef, number: int, outcome: str) -> None:
    with Session(job(ref), memory_limit_bytes=PLENTY) as session, pytest.raises(TrialEndedError) as caught:
        session.time(
            Command(min_laps=10_000),
            timeout_s=60,
            on_progress=lambda progress: os.kill(session._child.pid, number),
        )
    assert caught.value.outcome == outcome
    assert signal.Signals(number).name in caught.value.reason


def test_a_loader_worker_that_dies_is_a_crash_not_a_hang(ref: WorkloadRef) -> None:
    def kill_a_worker(progress: Progress) -> None:
        if progress.stage == "timing":
            with contextlib.suppress(psutil.NoSuchProcess):  # the trial may have ended of it already
                for process in psutil.Process(session._child.pid).children():
                    process.kill()

    with (
        Session(job(ref, workers=1), memory_limit_bytes=PLENTY) as session,
        pytest.raises(TrialEndedError) as caught,
    ):
        session.time(Command(min_laps=10_000), timeout_s=60, on_progress=kill_a_worker)
    assert caught.value.outcome == "crashed"
    assert "DataLoader worker" in caught.value.reason


def test_a_session_goes_on_where_it_stopped(ref: WorkloadRef) -> None:
    with Session(job(ref), memory_limit_bytes=PLENTY) as session:
        first = session.time(Command(min_laps=1), timeout_s=60)
        second = session.time(Command(min_laps=2), timeout_s=60)
    assert len(second.measurement.losses) > len(first.measurement.losses)
    assert second.laps


def test_a_loss_that_is_no_number_is_diverged(ref: WorkloadRef, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's own code in a thread of this process, with a loss that breaks at the third micro batch."""
    calls = [0]

    def broken(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return output.sum() * (math.nan if calls[0] >= 3 else 1.0)

    monkeypatch.setattr("autotune.workloads.imdb.CrossEntropy", lambda: broken)
    ours, theirs = Pipe()
    thread = threading.Thread(target=worker.main, args=(theirs, job(ref)))
    thread.start()
    ours.send(Command(min_laps=5))
    while not isinstance(message := ours.recv(), Failed):
        assert isinstance(message, Progress)
    thread.join(30)
    ours.close()
    theirs.close()
    assert message.outcome == "diverged"
    assert "nan" in message.reason
