"""Everything that can go wrong in a trial, in real processes: each time the search ends normally, the trial is on
record with the right outcome, nothing is left running, and the best of the healthy settings wins.

``python -m tests.test_faults`` prints the table.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec
import psutil
import pytest

from autotune import backends
from autotune.measurement import Outcome, Trial
from autotune.search import study, surrogate, task, trials
from autotune.search.result import Result
from autotune.search.settings import Settings
from autotune.search.study import search
from autotune.search.task import Task
from autotune.strategy import Strategy
from tests import factories
from tests.brief import short_timings
from tests.faulty import BASELINE, BEST, FAULTY, WORKLOAD
from tests.observing import Silent, SilentPulse, SleepingPulse

MEMORY_BUDGET = 400 * 2**20
"""More than a healthy trial takes, less than a growing one is let have."""


class Expected(NamedTuple):
    """What a fault must end as."""

    outcome: Outcome
    words: str = ""
    """Part of the reason."""


SIGSTOP = "SIGSTOP"
"""Without the device's pulse: the end of the next beat would wake it."""
EXPECTED: dict[str, Expected] = {
    "an allocation that torch cannot serve": Expected("oom", "can't allocate memory"),
    "an allocation that Python cannot serve": Expected("oom", "MemoryError"),
    "std::bad_alloc": Expected("oom", "bad_alloc"),
    "resident memory over the budget": Expected("oom", "over the memory limit"),
    "a grandchild's memory over the budget": Expected("oom", "over the memory limit"),
    "a leak that shows in the soak": Expected("oom", "in the last test: "),
    "SIGKILL, as by the kernel's OOM killer": Expected("oom", "SIGKILL"),
    "fake device: full": Expected("oom", "fake device out of memory"),
    "fake device: hangs in synchronize": Expected("timeout", "no sign of life"),
    "fake device: lost": Expected("crashed", "device lost"),
    "while True": Expected("timeout", "no sign of life"),
    "sleeps for ever": Expected("timeout", "no sign of life"),
    SIGSTOP: Expected("timeout", "no sign of life"),
    "os._exit(3)": Expected("crashed", "exited with status 3"),
    "sys.exit(4)": Expected("crashed", "SystemExit: 4"),
    "SIGSEGV": Expected("crashed", "killed by SIGSEGV"),
    "SIGABRT": Expected("crashed", "killed by SIGABRT"),
    "an exception that is not torch's": Expected("crashed", "no such key"),
    "an exception with a message of 10 MB": Expected("crashed", "KeyError: 'xxx"),
    "NaN at step 7": Expected("diverged", "loss nan at step 7"),
    "a gradient that is no number": Expected("diverged", "gradient norm nan"),
    "a model that learns nothing": Expected("diverged", "in the last test: its losses leave the fp32 baseline's"),
    "a kernel that torch refuses": Expected("invalid", "No viable backend"),
    "100 MB of stderr": Expected("ok"),
    "100 MB of stderr, then death": Expected("crashed", "the last line"),
    "a daemon that outlives the trial": Expected("crashed", "exited with status 5"),
    "twenty forks in sessions of their own": Expected("crashed", "after twenty forks"),
    "a thread that never ends": Expected("crashed", "with a thread left over"),
    "a broken pipe": Expected("crashed", "closed its pipe"),
    "garbage in the pipe": Expected("crashed", "no message"),
    "a clock that jumps": Expected("ok"),
    "an exception in a loader worker": Expected("crashed", "DataLoader worker"),
    "a loader worker that hangs": Expected("timeout", "no sign of life"),
    "a loader worker that dies": Expected("crashed", "DataLoader worker"),
}


class Seen(NamedTuple):
    """What a fault did end as."""

    result: Result
    faulty: Trial
    goes_on_s: float
    """Seconds from the faulty trial's start to the next thing that the search did."""
    left_over: list[psutil.Process]


class Clock(Silent):
    """Takes the time at which the search starts each thing."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[tuple[int, float]] = []

    def on_trial_start(self, number: int, strategy: Strategy, origin: str) -> None:
        super().on_trial_start(number, strategy, origin)
        self.starts.append((number, time.monotonic()))


def search_with(fault: str, folder: Path) -> Seen:
    """A search in which the second trial is the faulty one."""
    backend = backends.get("fake" if fault.startswith("fake") else "cpu")
    ref = WORKLOAD.prepare(Path(fault), limit=None, on_progress=lambda _: None)
    # the micro batch alone is searched, four values in four trials; but one that runs out of memory rules out the
    # larger ones, unless they are padded otherwise
    without = {"padding", "prefetch", "workers"}
    faulty = Strategy(micro_batch=FAULTY, accumulation=BASELINE // FAULTY)
    if EXPECTED[fault].outcome == "oom":
        faulty = msgspec.structs.replace(faulty, padding="longest")
        without.remove("padding")
    if "loader worker" in fault:
        faulty = msgspec.structs.replace(faulty, workers=1)
        without.remove("workers")
    settings = Settings(
        budget_s=None,
        max_trials=4,
        epochs=1000,
        memory_budget_bytes=MEMORY_BUDGET,
        without=tuple(without),
        explains=False,
    )
    clock = Clock()
    before = set(psutil.Process().children(recursive=True))
    pulse = SilentPulse if fault == SIGSTOP else SleepingPulse
    with (
        quick(),
        mock.patch.object(study, "Pulse", pulse),
        mock.patch.object(task, "expert_guess", return_value=faulty),
    ):
        result = search(
            Task(
                ref=ref,
                workload=WORKLOAD.open_workload(ref),
                hardware=factories.plain_hardware(),
                backend=backend,
                settings=settings,
            ),
            clock,
            journal_path=folder / "faulty.journal",
        )
    starts = dict(clock.starts)
    after = time.monotonic()
    left_over = [process for process in _new_processes(before) if process.is_running()]
    return Seen(result, result.trials[1], starts.get(2, after) - starts[1], left_over)


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Hangs are found sooner, trials and races are shorter than a user would want; and the search expects what is so
    here, that the micro batch tells."""
    with (
        short_timings(),
        mock.patch.object(trials, "SILENCE_S", 3.0),
        mock.patch.dict(surrogate.USUAL, {**dict.fromkeys(surrogate.USUAL, 0.01), "micro_batch": 2.0}),
        mock.patch.dict(surrogate.JOINT, dict.fromkeys(surrogate.JOINT, 0.001)),
    ):
        yield


def _new_processes(before: set[psutil.Process]) -> Iterator[psutil.Process]:
    """This process's, but for the warm server and Python's resource tracker; and orphans of whatever kind, but for
    those of the suite's other workers."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            is_ours = process in set(psutil.Process().children(recursive=True)) - before
            is_orphan = (
                process.ppid() == 1
                and "forkserver" in command
                and process.environ().get("PYTEST_XDIST_WORKER") == worker
            )
            is_server = process.ppid() == os.getpid() and ("forkserver" in command or "resource_tracker" in command)
            if (is_ours and not is_server) or is_orphan:
                yield process


# Two at a time at most: they hang and spin, and wait more than they compute.
@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=pytest.mark.xdist_group(f"faults {place % 2}")) for place, fault in enumerate(EXPECTED)],
)
def test_a_fault_is_on_record_and_the_best_healthy_setting_wins(fault: str, tmp_path: Path) -> None:
    seen = search_with(fault, tmp_path)
    expected = EXPECTED[fault]
    assert (seen.faulty.outcome, expected.words in seen.faulty.reason) == (expected.outcome, True), seen.faulty.reason
    assert len(seen.faulty.reason) < 1000
    records = [(trial.outcome, trial.reason, trial.samples_per_s) for trial in seen.result.trials]
    assert seen.result.best.strategy.micro_batch == BEST, records
    assert seen.result.proof is not None
    assert seen.result.proof.outcome == "ok"
    assert not seen.left_over
    assert len(seen.result.trials) >= 4


def main() -> None:
    """Prints the table."""
    from tests import faulty

    assert set(EXPECTED) == {*faulty.MODEL_FAULTS, *faulty.LOADER_FAULTS}
    print(f"{'fault':<42} {'outcome':<9} {'s':>5}  best    reason")
    for fault in sys.argv[1:] or EXPECTED:
        with tempfile.TemporaryDirectory() as folder:
            seen = search_with(fault, Path(folder))
        wrong = "" if seen.faulty.outcome == EXPECTED[fault].outcome else f"  WRONG, not {EXPECTED[fault].outcome}"
        best = "right" if seen.result.best.strategy.micro_batch == BEST else "WRONG"
        left = f"  LEFT OVER {len(seen.left_over)}" if seen.left_over else ""
        print(
            f"{fault:<42} {seen.faulty.outcome:<9} {seen.goes_on_s:5.1f}  {best:<6}  {seen.faulty.reason[:60]}"
            f"{wrong}{left}",
            flush=True,
        )


if __name__ == "__main__":
    main()
