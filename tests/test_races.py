"""Who races, with whom and for how long, on scripted trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from autotune.search import races, task, turns
from autotune.search.finals import Final
from autotune.search.history import NUM_FINALISTS
from autotune.search.turns import Entrant
from tests.scripted import GUESS, Prepared, ScriptedRace, searched

GIB = 2**30


def test_a_heat_without_the_baseline_says_who_races_it(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    raced: list[list[int]] = []

    class Upside(ScriptedRace):
        """In the heat the fourth by the trials is much faster than by its trial."""

        def __init__(self, entrants: Sequence[Entrant], **_: Any) -> None:
            super().__init__(entrants)
            raced.append([entrant.trial.number for entrant in entrants])

        def finals(self) -> list[Final]:
            found = super().finals()
            if len(raced[0]) > 3 and raced[0][3] in {final.trial.number for final in found}:
                at = [final.trial.number for final in found].index(raced[0][3])
                faster = msgspec.structs.replace(found[at].measurement, samples_per_s=1e3)
                found[at] = msgspec.structs.replace(found[at], measurement=faster, epoch_s=(1.0,) * 3)
            return found

    scripted_device.setattr(races, "Race", Upside)
    best = searched(prepared, budget_s=3600.0).best
    heat, final, *_ = raced
    assert 0 not in heat
    assert 3 < len(heat) <= races.FIELD
    assert final[:2] == [0, heat[3]]
    assert len(final) == 1 + races.NUM_THROUGH
    assert best.number == heat[3]


@pytest.fixture
def raced(scripted_device: pytest.MonkeyPatch) -> list[int]:
    """How many entered each race."""
    numbers: list[int] = []

    class Counted(ScriptedRace):
        def run(self, **_: Any) -> None:
            super().run()
            numbers.append(len(self.entrants))

    scripted_device.setattr(races, "Race", Counted)
    return numbers


def test_there_is_no_heat_where_the_budget_has_no_time_for_it(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, raced: list[int]
) -> None:
    scripted_device.setattr(races, "FINALS_SHARE", 0.0)
    searched(prepared, budget_s=3600.0, max_trials=20)
    assert raced[0] == 1 + NUM_FINALISTS


@pytest.mark.parametrize(("budget_s", "enough_s"), [(1.0, 500.0), (1000.0, 300.0)])
def test_the_final_gets_all_that_is_left_where_time_is_what_ended_the_trials(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, budget_s: float, enough_s: float
) -> None:
    """A scripted trial says that it took ten seconds: one second has no room for a third, a thousand end by number."""
    asked: list[float] = []

    class Asked(ScriptedRace):
        def run(self, **given: Any) -> None:
            super().run()
            asked.append(given["enough_s"])

    scripted_device.setattr(races, "Race", Asked)
    scripted_device.setattr(races.Races, "left_s", lambda self: 500.0)
    scripted_device.setattr(races, "FIELD", 0)
    searched(prepared, budget_s=budget_s, max_trials=5, explains=False)
    assert asked == [enough_s]


@pytest.mark.parametrize(("share", "num_entrants"), [(0.1, 1 + NUM_FINALISTS), (0.02, 2)])
def test_the_best_races_alone_with_the_baseline_where_there_is_no_time_for_more(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, raced: list[int], share: float, num_entrants: int
) -> None:
    scripted_device.setattr(races, "FIELD", 0)
    scripted_device.setattr(races, "FINALS_SHARE", share)
    scripted_device.setattr(races, "LEAST_SHARE", 0.0)
    scripted_device.setattr(races.Races, "left_s", lambda self: 0.0)
    scripted_device.setattr(races.Races, "shortest_s", lambda self, field, **_: 15.0 * len(field))
    searched(prepared, budget_s=1000.0, max_trials=20, explains=False)
    assert raced[0] == num_entrants


@pytest.mark.parametrize(("alone_s", "num_entrants"), [(0.0, 1 + NUM_FINALISTS), (math.inf, 2)])
def test_entrants_have_to_fit_together_only_where_they_are_alive_together(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, raced: list[int], alone_s: float, num_entrants: int
) -> None:
    scripted_device.setattr(races, "FINALS_SHARE", 0.0)  # no heat
    scripted_device.setattr(races, "_peak_bytes", lambda trial: 8 * GIB)  # two fit into what is free
    scripted_device.setattr(turns, "ALONE_S", alone_s)
    searched(prepared, budget_s=3600.0, max_trials=20)
    assert raced[0] == num_entrants


def test_what_is_raced_again_races_together_though_it_takes_longer_than_its_share(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, raced: list[int]
) -> None:
    scripted_device.setattr(task, "expert_guess", lambda *_, **__: GUESS)
    scripted_device.setattr(races, "FINALS_SHARE", 0.02)
    scripted_device.setattr(races.Races, "shortest_s", lambda self, field, **_: 15.0 * len(field))
    result = searched(prepared, max_trials=2, budget_s=1000.0, explains=True)
    assert raced[-1] == 3, "the baseline, the best, and the best without what brings nothing"
    assert result.best.strategy == msgspec.structs.replace(GUESS, workers=0)


@pytest.mark.parametrize(("share", "num_raced"), [(0.1, NUM_FINALISTS), (0.02, 1)])
def test_the_trials_leave_time_for_the_race_that_there_will_be(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, share: float, num_raced: int
) -> None:
    left: list[float] = []
    run = races.Races.run

    def asked(self: races.Races, finalists: Any, **given: Any) -> None:
        left.append(self.reserved_s())
        run(self, finalists, **given)

    scripted_device.setattr(races.Races, "run", asked)
    scripted_device.setattr(races.Races, "_last_test_s", lambda self: 0.0)
    scripted_device.setattr(races.Races, "shortest_s", lambda self, field, **_: 15.0 * len(field))
    for name, value in (("FIELD", 0), ("LEAST_SHARE", 0.0), ("FINALS_SHARE", share)):
        scripted_device.setattr(races, name, value)
    searched(prepared, budget_s=1000.0, max_trials=20, explains=False)
    assert left[0] == 15.0 * num_raced
