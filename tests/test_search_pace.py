"""The search on a device whose speed wanders, as its pulse tells: scripted trials."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from autotune.measurement import Trial
from autotune.pace import AROUND, WITHIN
from autotune.search import study, task, trials
from autotune.search.history import NOISE_LAP, NOISE_WITHIN, History
from autotune.search.objective import FASTEST
from autotune.search.standings import Standings
from autotune.search.task import Task
from autotune.search.turns import CACHED_SHARE, shortest_s
from autotune.strategy import Strategy, baseline
from autotune.trial.pulse import Pulse
from autotune.trial.runner import ONCE, ONCE_WITH_BEATS, ORDINARY, WITH_BEATS
from autotune.trial.worker import Command, Job, Progress
from tests import factories
from tests.observing import Silent, SilentPulse
from tests.scripted import (
    Prepared,
    run_scripted,
    scripted,
    searched,
)


def test_the_baseline_alone_is_timed_once(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    commands: list[Command] = []

    def run(number: int, job: Job, *, command: Command, **_: Any) -> Trial:
        commands.append(command)
        return run_scripted(number, job)

    scripted_device.setattr(trials, "run_trial", run)
    searched(prepared, max_trials=3)
    assert commands == [ONCE, ORDINARY, ORDINARY]


class BeatingPulse(Pulse):
    """What is timed is paused for it, so that nothing is timed between trials."""

    def file(self) -> str:
        return "beats"

    def beat(self) -> float:
        raise AssertionError("nobody asks for it")


def test_trials_with_beats_are_shorter_and_keep_their_own(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    commands: list[Command] = []

    def run(number: int, job: Job, *, command: Command, pulse: Pulse, **_: Any) -> Trial:
        assert isinstance(pulse, BeatingPulse)
        commands.append(command)
        return msgspec.structs.replace(run_scripted(number, job), pulse_s=0.01 * number + 0.01, has_beats=True)

    scripted_device.setattr(trials, "run_trial", run)
    scripted_device.setattr(study, "Pulse", BeatingPulse)
    found = searched(prepared, max_trials=3).trials
    assert commands == [ONCE_WITH_BEATS, WITH_BEATS, WITH_BEATS]
    assert [trial.pulse_s for trial in found] == pytest.approx([0.01, 0.02, 0.03])


def test_figures_with_beats_are_believed_more(task: Task) -> None:
    """So that a setting must have come closer to the best to be raced with it."""
    best, other = (
        msgspec.structs.replace(task.baseline, padding="buckets", allocator=a) for a in ("retain", "default")
    )
    rates = {task.baseline: 10.0, best: 40.0, other: 35.0}
    without = [
        factories.trial(number, strategy, measurement=factories.measurement(rate))
        for number, (strategy, rate) in enumerate(rates.items())
    ]
    with_beats = [msgspec.structs.replace(trial, has_beats=True) for trial in without]
    before, after = History(task, without), History(task, with_beats)
    assert [trial.strategy for trial in before.finalists()] == [best, other]
    assert [trial.strategy for trial in after.finalists()] == [best]
    noise, less = ([known.noise for known in found.known(FASTEST)] for found in (before, after))
    assert all(many > few > 0 for many, few in zip(noise, less, strict=True))


def test_separate_trials_are_compared_at_one_speed(task: Task) -> None:
    slow = msgspec.structs.replace(task.baseline, padding="buckets")
    found = [
        factories.trial(0, task.baseline, pulse_s=0.01, has_beats=True),
        factories.trial(1, slow, pulse_s=0.02, has_beats=True),
    ]
    standings = Standings(task, History(task, found))
    ratio = standings.speedup(found[1]).ratio
    assert ratio == pytest.approx(2**WITHIN.power)
    rates = [standings.at_last(trial).samples_per_s or 0.0 for trial in found]
    assert rates[1] / rates[0] == pytest.approx(ratio), "what is shown of both bears out the speed-up"


def test_a_baseline_that_was_timed_once_is_as_sure_as_a_lap_is_where_the_speed_is_known(task: Task) -> None:
    once, several = factories.measurement(10.0, epoch_s=(10.0,)), factories.measurement(40.0, epoch_s=(2.5, 2.5, 2.5))
    fast = msgspec.structs.replace(task.baseline, padding="buckets")
    for has_beats in (True, False):
        found = [
            factories.trial(0, task.baseline, measurement=once, pulse_s=0.01, has_beats=has_beats),
            factories.trial(1, fast, measurement=several, pulse_s=0.01, has_beats=has_beats),
        ]
        interval = Standings(task, History(task, found)).speedup(found[1])
        assert interval.ratio == pytest.approx(4.0)
        if has_beats:
            assert math.log(interval.high / 4) == pytest.approx(1.96 * math.hypot(NOISE_LAP, NOISE_WITHIN), rel=0.01)
            assert interval.low * interval.high == pytest.approx(16.0)
        else:
            assert interval.high == math.inf


def test_what_a_race_takes_is_reckoned_at_the_speed_that_the_device_has_now(task: Task) -> None:
    pulses = (1.0, 2.0, 2.0)
    found = History(task, [factories.trial(n, task.baseline, pulse_s=pulse) for n, pulse in enumerate(pulses)])
    assert found.slowdown_since(found.all[0]) == 2.0**AROUND.power > 1.2
    assert found.slowdown_since(found.all[1]) == 1.0
    measured = [factories.trial(1, task.baseline, measurement=factories.measurement(step_ms=1000.0, warm_up_s=0.0))]
    compiled = msgspec.structs.replace(measured[0], strategy=Strategy(micro_batch=32, compile="default"))
    bucketed = msgspec.structs.replace(measured[0], strategy=Strategy(micro_batch=32, padding="buckets"))

    def needed_s(trial: Trial, backend: str = "cuda", *, baseline_s: float = 0.0, slowdown: float = 1.0) -> float:
        return shortest_s(baseline_s, [trial], backend, lambda _: slowdown)

    assert needed_s(measured[0]) == 1 + 1 + 1 + 3, "start, longest, evaluation, three rounds"
    assert needed_s(measured[0], slowdown=2.0) == 1 + 2 * (1 + 1 + 3)
    assert needed_s(compiled) == needed_s(measured[0]) + 3
    assert needed_s(bucketed) == needed_s(measured[0]) + 1, "longer than its usual ones"
    assert needed_s(measured[0], baseline_s=8.0) == 1 + (8 + 1) + (8 + 1) + 3 * (8 + 2)
    a_start_for_each_turn = 3 * (1 + 8 + 1)
    assert needed_s(measured[0], "cpu", baseline_s=8.0) == a_start_for_each_turn + (8 + 1) + 3 * (8 + 2)

    slow_start = factories.measurement(step_ms=1000.0, warm_up_s=30.0)
    compiling = msgspec.structs.replace(compiled, measurement=slow_start)
    cached = msgspec.structs.replace(
        compiled, measurement=msgspec.structs.replace(slow_start, warm_up_s=10.0, is_from_cache=True)
    )
    for backend, later in (("cuda", 0), ("cpu", 2)):
        at_once_s = needed_s(compiled, backend, baseline_s=8.0)
        assert needed_s(compiling, backend, baseline_s=8.0) == at_once_s + 30 + later * CACHED_SHARE * 30
        assert needed_s(cached, backend, baseline_s=8.0) == at_once_s + 10 + later * 10


class DriftingPulse(SilentPulse):
    """Says of the first beats that the device was slow; its trials were not, however."""

    def __init__(self, backend_name: str) -> None:
        super().__init__(backend_name)
        self.num_beats = 0

    def beat(self) -> float:
        self.num_beats += 1
        return 0.018 if self.num_beats <= 3 else 0.010


def test_a_best_that_fails_when_it_is_measured_again_is_the_best_no_more(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    tried: list[Strategy] = []

    def once(number: int, job: Job, **_: Any) -> Trial:
        tried.append(job.strategy)
        if tried.count(job.strategy) > 1:
            return factories.trial(number, job.strategy, outcome="crashed", measurement=None)
        return run_scripted(number, job)

    scripted_device.setattr(trials, "run_trial", once)
    scripted_device.setattr(study, "Pulse", DriftingPulse)
    result = searched(prepared, max_trials=20, explains=False)
    failed = [trial.strategy for trial in result.trials if trial.outcome == "crashed"]
    assert failed
    assert len(failed) == len(set(failed)), "not again and again"
    assert result.best.strategy not in failed


def test_a_pulse_that_misleads_about_the_best_does_not_decide(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    guess = msgspec.structs.replace(baseline(32), precision="bf16", padding="buckets", workers=2)

    def given_up(number: int, job: Job, *, hopeless: Callable[[Progress], str | None], **_: Any) -> Trial:
        found = scripted(job.strategy)
        reason = hopeless(Progress(stage="timing", num_laps=3, samples_per_s=found.samples_per_s))
        if reason is None:
            return factories.trial(number, job.strategy, measurement=found)
        rate = found.samples_per_s
        return factories.trial(number, job.strategy, outcome="pruned", measurement=None, samples_per_s=rate)

    scripted_device.setattr(trials, "run_trial", given_up)
    scripted_device.setattr(task, "expert_guess", lambda *_, **__: guess)
    scripted_device.setattr(study, "Pulse", DriftingPulse)
    observer = Silent()
    result = searched(prepared, observer)
    assert any("again" in origin for origin in observer.origins)
    best = max(scripted(trial.strategy).samples_per_s for trial in result.trials)
    assert scripted(result.best.strategy).samples_per_s == best
