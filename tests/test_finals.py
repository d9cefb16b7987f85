"""The race of the finalists, on scripted sessions."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from autotune.search import finals
from autotune.search.finals import Entrant, Final, Race, ranked
from autotune.strategy import Padding, Strategy
from autotune.trial.runner import TrialEndedError
from autotune.trial.worker import Command, Done, Job
from tests import factories
from tests.scripted import Prepared


def test_a_tie_goes_to_the_simpler_setting() -> None:
    seconds = (100.0, 101.0, 99.0, 100.5)
    plain = Strategy(micro_batch=32, padding="longest")
    fancy = Strategy(micro_batch=32, padding="longest", workers=2, checkpoint="every_2nd")
    finals_ = [
        Final(trial=factories.trial(1, fancy), measurement=factories.measurement(10.1), epoch_s=seconds),
        Final(trial=factories.trial(2, plain), measurement=factories.measurement(10.0), epoch_s=seconds[::-1]),
    ]
    order = ranked(finals_, lambda final: 1000 / final.measurement.samples_per_s)
    assert [final.trial.number for final in order] == [2, 1]
    clear = [finals_[0], msgspec.structs.replace(finals_[1], epoch_s=tuple(1.015 * s for s in seconds))]
    order = ranked(clear, lambda final: 1000 / final.measurement.samples_per_s)
    assert [final.trial.number for final in order] == [1, 2], "1 % apart, but surely so"


def test_an_entrant_that_fails_in_the_race_is_ended_at_once_and_the_others_go_on(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted sessions: the second entrant fails in its first round."""
    closed: list[str] = []

    class Scripted:
        def __init__(self, job: Job, *, memory_limit_bytes: int) -> None:
            self.name = job.strategy.padding
            self.turns = 0

        def __enter__(self) -> Scripted:
            return self

        def __exit__(self, *_: object) -> None: ...

        def close(self) -> None:
            closed.append(self.name)

        def cpu_s(self) -> float:
            return 0.0

        def time(self, command: Command, *, timeout_s: float) -> Done:
            self.turns += 1
            if self.name == "longest" and self.turns == 2:
                raise TrialEndedError("oom", "scripted")
            return Done(measurement=factories.measurement(), epoch_s=100.0)

    monkeypatch.setattr(finals, "Session", Scripted)
    entrants = [
        Entrant(
            trial=factories.trial(number, strategy),
            job=Job(workload=prepared[0], strategy=strategy, backend="cpu", memory_limit_bytes=None, seed=0),
        )
        for number, strategy in enumerate(Strategy(micro_batch=32, padding=p) for p in get_args(Padding))
    ]
    race = Race(entrants, timeout_s=1, memory_limit_bytes=1)
    race.run(enough_s=60, max_rounds=3)
    assert closed == ["longest"]
    assert [(final.trial.number, len(final.epoch_s)) for final in race.finals()] == [(0, 3), (2, 3)]
    assert race.failures[1].outcome == "oom"
