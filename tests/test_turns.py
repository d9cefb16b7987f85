"""Entrants in turns, on scripted sessions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from autotune import stats
from autotune.contention import Load
from autotune.cost import Work
from autotune.laps import Epoch
from autotune.measurement import Measurement
from autotune.pace import LAP_POWER, WITHIN
from autotune.search import turns
from autotune.search.finals import ratio
from autotune.search.turns import Entrant, Race
from autotune.strategy import Padding, Strategy
from autotune.trial.runner import TrialEndedError
from autotune.trial.worker import Command, Done, Job
from tests import factories
from tests.observing import SilentPulse
from tests.scripted import Prepared

PADDINGS: tuple[Padding, ...] = ("max", "longest", "buckets")
QUICK, SLOW = 0.01, 1.0
"""Steps, in seconds, whose processes live on, and whose processes are alone."""


class Clock:
    """In place of the module ``time``: it goes on when somebody sleeps, and on a busy machine no faster."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Scripted:
    """A session whose laps take the seconds that ``lap_s`` says of it."""

    clock: Clock
    lap_s: Callable[[Scripted], float]
    pulse_s: Callable[[Scripted], float | None]
    step_s: float

    def __init__(self, job: Job, **limits: Any) -> None:
        self.padding, self.start = job.strategy.padding, job.start
        self.pulse = limits["pulse"]
        self.turns = 0
        self.is_closed = False

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        self.is_closed = True

    def cpu_s(self) -> float:
        return 0.0

    def time(self, command: Command, *, timeout_s: float) -> Done:
        self.turns += 1
        seconds = type(self).lap_s(self)
        self.clock.sleep(0.006)
        # ten steps are an epoch
        return Done(
            measurement=factories.measurement(pulse_s=type(self).pulse_s(self), step_ms=1000 * self.step_s),
            laps=(msgspec.structs.replace(factories.lap(seconds), pulse_s=type(self).pulse_s(self)),),
            epoch=Epoch(work=Work(steps=10, tokens=1000, squares=1000), num_samples=320, num_steps=10),
        )


def scripted_race(
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[Scripted], float],
    measurements: Sequence[Measurement | None] = (None,) * 3,
    pulse_s: Callable[[Scripted], float | None] = lambda _: None,
    steps_s: float = QUICK,
) -> tuple[Race, list[Scripted]]:
    """A race of the three paddings, and its sessions as they are made."""
    made: list[Scripted] = []

    class Session(Scripted):
        clock = Clock()
        lap_s = staticmethod(seconds)
        step_s = steps_s

        def __init__(self, job: Job, **limits: Any) -> None:
            super().__init__(job, **limits)
            made.append(self)

    monkeypatch.setattr(Session, "pulse_s", staticmethod(pulse_s), raising=False)
    monkeypatch.setattr(turns, "Session", Session)
    monkeypatch.setattr(turns, "time", Session.clock)
    entrants = [
        Entrant(
            trial=factories.trial(number, strategy, measurement=measurements[number]),
            job=Job(workload=prepared[0], strategy=strategy, backend="cpu", memory_limit_bytes=None, seed=0),
        )
        for number, strategy in enumerate(Strategy(micro_batch=32, padding=p) for p in PADDINGS)
    ]
    return Race(entrants, timeout_s=1, memory_limit_bytes=1, pulse=SilentPulse("cpu")), made


def test_turns_in_a_slow_moment_are_moved_to_the_speed_of_all(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is half as fast in every other turn of each."""

    def pulse_s(session: Scripted) -> float:
        return 0.01 if session.turns % 2 else 0.02

    def seconds(session: Scripted) -> float:
        return float((pulse_s(session) / 0.01) ** LAP_POWER) * (1 if session.padding == "max" else 2)

    with_cores(monkeypatch, lambda _: False)  # each has as many turns as the others
    race, _ = scripted_race(prepared, monkeypatch, seconds, pulse_s=pulse_s)
    race.run(enough_s=60.0, max_rounds=4)
    first, second, _ = race.finals()
    assert first.epoch_s == pytest.approx([first.epoch_s[0]] * 4)
    found = ratio(second, first)
    assert found.low == pytest.approx(2) == found.high


def test_an_entrant_whose_turns_were_all_in_slow_moments_is_moved_as_a_trial_would_be(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pulse_s(session: Scripted) -> float:
        return 0.01 if session.padding == "max" else 0.02

    def seconds(session: Scripted) -> float:
        return float((pulse_s(session) / 0.01) ** WITHIN.power) * (1 if session.padding == "max" else 2)

    race, sessions = scripted_race(prepared, monkeypatch, seconds, pulse_s=pulse_s)
    race.run(enough_s=60.0, max_rounds=4)
    first, second, _ = race.finals()
    assert ratio(second, first).ratio == pytest.approx(2)
    evaluation = second.measurement.eval_samples_per_s / first.measurement.eval_samples_per_s
    assert evaluation == pytest.approx(2**WITHIN.power)
    assert second.measurement.pulse_s == first.measurement.pulse_s
    assert all(isinstance(session.pulse, SilentPulse) for session in sessions)


def test_the_larger_peak_of_trial_and_race_counts(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = factories.measurement(step_ms=1000 * QUICK)
    large = msgspec.structs.replace(usual, peak_memory_bytes=2**31)
    race, _ = scripted_race(prepared, monkeypatch, lambda _: 1.0, (large, usual, None))
    race.run(enough_s=60, max_rounds=3)
    assert [final.measurement.peak_memory_bytes for final in race.finals()] == [2**31, 2**30, 2**30]


class Cores(Load):
    """In place of the cores' accounting: others keep them busy in the given looks, counted from the first."""

    busy: Callable[[int], bool]
    num_looks = 0

    def busy_cores(self, num_cores: int, children_s: float = 0.0) -> float:
        Cores.num_looks += 1
        return float(num_cores) if Cores.busy(Cores.num_looks - 1) else 0.0


def with_cores(monkeypatch: pytest.MonkeyPatch, busy: Callable[[int], bool]) -> None:
    monkeypatch.setattr(Cores, "busy", staticmethod(busy), raising=False)
    monkeypatch.setattr(Cores, "num_looks", 0)
    monkeypatch.setattr(turns, "Load", Cores)


def test_disturbed_rounds_decide_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine rounds of three turns, a look after each; in the third and the sixth others work, and ``buckets`` takes ten
    times as long."""

    def seconds(session: Scripted) -> float:
        if session.padding != "buckets":
            return 1.0
        return 5.0 if session.turns - 2 in (2, 5) else 0.5

    with_cores(monkeypatch, lambda look: look // 3 in (2, 5))
    monkeypatch.setattr(turns, "WAIT_S", 0.0)
    race, _ = scripted_race(prepared, monkeypatch, seconds)
    race.run(enough_s=60, max_rounds=9)
    first, _, third = race.finals()
    assert (race.num_rounds, race.num_disturbed, len(third.epoch_s)) == (9, 2, 7)
    assert (first.epoch_s[0], third.epoch_s[0]) == pytest.approx((10.0, 5.0))
    assert ratio(first, third).ratio == pytest.approx(2.0)
    assert third.measurement.samples_per_s == pytest.approx(320 / 5.0)
    assert third.measurement.step_ms == pytest.approx(500)


def test_a_round_that_others_disturb_is_begun_again_when_they_leave(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cores(monkeypatch, lambda look: look == 3)  # in the first turn of the second round
    race, sessions = scripted_race(prepared, monkeypatch, lambda _: 1.0)
    race.run(enough_s=60, max_rounds=3)
    assert (race.num_rounds, race.num_disturbed) == (3, 0)
    turns = {session.padding: session.turns for session in sessions}
    assert turns == {"max": 4, "longest": 4, "buckets": 5}, "the second round is begun by the last"


def test_processes_are_replaced_where_rounds_are_short_and_each_starts_elsewhere(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "NARROW", 0.0)
    with_cores(monkeypatch, lambda _: False)
    lives: dict[float, float] = {}

    def seconds(session: Scripted) -> float:
        # two processes of one setting differ for as long as they live
        by_life = lives.setdefault(session.start, 1 + 0.02 * len(lives))
        return by_life if session.padding == "buckets" else 1.0

    race, sessions = scripted_race(prepared, monkeypatch, seconds)
    race.run(enough_s=1.0, max_rounds=400)
    first, _, third = race.finals()
    assert third.lives == first.lives
    assert third.lives is not None
    assert len(set(third.lives)) >= stats.MIN_RANKED
    starts = [session.start for session in sessions if session.padding == "max"]
    assert len(set(starts)) == len(starts) == len(set(third.lives))
    assert all(session.is_closed for session in sessions[:-3])
    clustered = ratio(third, first)
    alone = ratio(*(msgspec.structs.replace(final, lives=None) for final in (third, first)))
    assert clustered.high - clustered.low > 1.3 * (alone.high - alone.low), "rounds of a life are no independent ones"


@pytest.mark.parametrize("is_known", [True, False])
def test_where_steps_are_long_every_turn_has_a_process_that_is_alone(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Two that are alive beside one another would make each other slower."""
    alive: list[Scripted] = []

    def seconds(session: Scripted) -> float:
        alive[:] = [one for one in (*alive, session) if not one.is_closed and one is not session] + [session]
        neighbours.append(len(alive) - 1)
        return len(alive) * (2.0 if session.padding == "max" else 1.0)

    neighbours: list[int] = []
    measured = factories.measurement(step_ms=1000 * SLOW)
    known = (measured if is_known else None,) * 3
    with_cores(monkeypatch, lambda _: False)
    race, sessions = scripted_race(prepared, monkeypatch, seconds, known, steps_s=SLOW)
    race.run(enough_s=60.0, max_rounds=4)
    first, _, third = race.finals()
    assert ratio(first, third).ratio == pytest.approx(2.0)
    assert first.lives == third.lives == (0, 1, 2, 3)
    told_by_opening = 0 if is_known else 3
    assert len(sessions) == told_by_opening + 3 * 4
    assert not any(neighbours[told_by_opening:])
    assert [session.turns for session in sessions[told_by_opening:]] == [2] * 12, "the longest batch, then its turn"
    assert len({session.start for session in sessions[told_by_opening:]}) == 4
    assert all(session.is_closed for session in sessions)


def test_an_entrant_that_fails_in_the_race_is_ended_at_once_and_the_others_go_on(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted sessions: the second entrant fails in its first round."""

    def fails(session: Scripted) -> float:
        if session.padding == "longest" and session.turns == 2:
            raise TrialEndedError("oom", "scripted")
        return 1.0

    race, sessions = scripted_race(prepared, monkeypatch, fails)
    race.run(enough_s=60, max_rounds=3)
    assert all(session.is_closed for session in sessions)
    assert [session.padding for session in sessions if session.turns < 4] == ["longest"]
    assert [(final.trial.number, len(final.epoch_s)) for final in race.finals()] == [(0, 3), (2, 3)]
    assert race.failures[1].outcome == "oom"
