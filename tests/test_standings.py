"""Who is the best, by made-up trials and races."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec
import pytest

from autotune.measurement import Trial
from autotune.search.finals import OF_PROCESSES, Final, log_error, ranked
from autotune.search.history import History
from autotune.search.objective import FASTEST, LEANEST
from autotune.search.standings import Standings
from autotune.search.task import Task
from autotune.search.turns import Race
from autotune.strategy import Strategy
from tests import factories

BASELINE_S = 100.0
"""What an epoch of the plain baseline takes."""
PEAKS = (3000, 1000, 1000)


class Raced:
    """A race that is over."""

    def __init__(
        self, epoch_s: Mapping[Trial, Sequence[float]], lives: Sequence[int] | None, peaks: Sequence[int]
    ) -> None:
        self._epoch_s, self._lives, self._peaks = epoch_s, tuple(lives) if lives else None, peaks
        self.num_rounds = min(map(len, epoch_s.values()))

    def finals(self) -> list[Final]:
        """With the rates that the rounds' means have."""
        return [
            Final(
                trial=trial,
                measurement=factories.measurement(1000 * len(epoch_s) / sum(epoch_s), peak_memory_bytes=peak),
                epoch_s=tuple(epoch_s),
                lives=self._lives,
            )
            for (trial, epoch_s), peak in zip(self._epoch_s.items(), self._peaks, strict=False)
        ]


def race(
    epoch_s: Mapping[Trial, Sequence[float]], lives: Sequence[int] | None = None, peaks: Sequence[int] = PEAKS
) -> Race:
    return cast("Race", Raced(epoch_s, lives, peaks))


def tried(task: Task, seconds: Sequence[float], peaks: Sequence[int] = PEAKS) -> tuple[History, Trial, Trial]:
    """Trials of the baseline and of two settings that differ in their micro batch, 8 and 16, with beats."""
    strategies = [
        task.baseline,
        *(
            msgspec.structs.replace(task.baseline, padding="buckets", micro_batch=m, accumulation=32 // m)
            for m in (8, 16)
        ),
    ]
    trials = [
        factories.trial(
            number,
            strategy,
            measurement=factories.measurement(1000 / epoch_s, peak_memory_bytes=peak),
            has_beats=True,
        )
        for number, (strategy, epoch_s, peak) in enumerate(zip(strategies, seconds, peaks, strict=True))
    ]
    return History(task, trials), trials[1], trials[2]


def test_three_rounds_do_not_outvote_a_trial_that_said_more(task: Task) -> None:
    history, eight, sixteen = tried(task, (BASELINE_S, 50.0, 53.0))
    standings = Standings(task, history)
    assert standings.best(FASTEST) is eight
    rounds = {history.reference: (100.0, 101.0, 99.0), eight: (51.0, 50.0, 52.0), sixteen: (50.0, 49.0, 51.0)}
    standings.race = race(rounds)
    standings.races = [standings.race]
    assert standings.best(FASTEST) is eight, "by the trials 6 % faster, by the race 2 % slower"
    assert standings.speedup(eight).ratio == pytest.approx(100 / 51, rel=0.001), (
        "what is said of it is the race's alone"
    )


def test_a_race_of_many_processes_decides(task: Task) -> None:
    history, eight, sixteen = tried(task, (BASELINE_S, 50.0, 53.0))
    standings = Standings(task, history)
    rounds = {history.reference: 24 * (100.0, 101.0), eight: 24 * (51.0, 51.5), sixteen: 24 * (49.5, 50.0)}
    standings.race = race(rounds, lives=[number // 2 for number in range(48)])
    standings.races = [standings.race]
    assert standings.best(FASTEST) is sixteen


def test_what_is_surely_slower_than_the_baseline_does_not_win(task: Task) -> None:
    history, eight, sixteen = tried(task, (BASELINE_S, 50.0, 53.0))
    standings = Standings(task, history)
    slow = {history.reference: (100.0, 101.0, 99.0), eight: (110.0, 111.0, 109.0), sixteen: (120.0, 121.0, 119.0)}
    standings.race = race(slow)
    standings.races = [standings.race]
    assert standings.best(FASTEST) is history.reference, "whatever the trials said"
    standings.race = race({history.reference: 3 * (100.0,), eight: 3 * (105.0,), sixteen: (96.0, 96.1, 95.9)})
    standings.races = [standings.race]
    assert standings.best(FASTEST) is sixteen, "of two the one that is faster, whichever trials prefer"
    unsure = {history.reference: (100.0, 140.0, 80.0), eight: (110.0, 80.0, 135.0), sixteen: (120.0, 150.0, 90.0)}
    standings.race = race(unsure)
    standings.races = [standings.race]
    assert standings.best(FASTEST) is eight, "twice as fast by its trial"


def test_what_was_slower_both_in_turns_and_alone_does_not_win_by_what_is_expected_of_it(task: Task) -> None:
    """On a busy machine nothing that is timed is sure, and what is expected decides."""
    sure, *_ = tried(task, (BASELINE_S, 1.01 * BASELINE_S, 1.02 * BASELINE_S))
    noisy = [
        msgspec.structs.replace(
            trial,
            has_beats=False,
            measurement=factories.measurement(trial.samples_per_s or 0.0, epoch_s=(30.0, 200.0, 50.0, 120.0)),
        )
        for trial in sure.all
    ]
    history, (reference, *others) = History(task, noisy), noisy
    standings = Standings(task, history)
    unsure = dict(zip(noisy, [(100.0, 190.0, 30.0), (110.0, 30.0, 195.0), (120.0, 190.0, 40.0)], strict=True))
    standings.race = race(unsure)
    standings.races = [standings.race]
    expected = standings.in_order(list(standings.finals().values()))
    assert expected[0].trial in others
    assert standings.best(FASTEST) is reference


def test_the_heat_counts_with_the_race(task: Task) -> None:
    history, eight, sixteen = tried(task, (BASELINE_S, 51.0, 50.0))
    standings = Standings(task, history)
    rounds = {history.reference: (100.0, 101.0, 99.0), eight: (50.5, 51.0, 51.5), sixteen: (49.5, 50.0, 50.5)}
    final = race(rounds)
    standings.races, standings.race = [final], final
    assert standings.best(FASTEST) is sixteen
    standings.races = [race({eight: (50.0, 51.0, 49.0), sixteen: (56.0, 55.0, 57.0)}), final]
    assert standings.best(FASTEST) is eight


def test_the_leanest_is_told_by_the_peaks_that_the_race_saw(task: Task) -> None:
    history, eight, sixteen = tried(task, (BASELINE_S, 50.0, 50.0), peaks=(3000, 1000, 1030))
    rounds = {history.reference: (100.0, 101.0), eight: (50.0, 51.0), sixteen: (50.0, 51.0)}
    standings = Standings(task, history)
    standings.race = race(rounds, peaks=(3000, 1050, 1030))
    standings.races = [standings.race]
    assert standings.best(LEANEST) is sixteen


def test_how_sure_a_race_is_goes_by_its_rounds_and_its_processes(task: Task) -> None:
    history, eight, _ = tried(task, (BASELINE_S, 50.0, 53.0))

    def error(slow: Sequence[float], fast: Sequence[float], lives: Sequence[int] | None = None) -> float:
        return log_error(race({history.reference: slow, eight: fast}, lives).finals())

    drifting = (100.0, 150.0, 120.0, 90.0)
    together = tuple(0.5 * seconds for seconds in drifting)
    assert error(drifting, together) == pytest.approx(OF_PROCESSES), "what hits both alike is no doubt"
    assert error(drifting, together, lives=(0, 1, 2, 3)) == pytest.approx(OF_PROCESSES / 2)
    # each log is off by half of 0.1, up and down: a variance of 4 x 2 x 0.05^2 over (2 - 1) x (4 - 1), over 4 rounds
    rough = tuple(seconds * math.exp(0.1 * sign) for seconds, sign in zip(together, (1, -1, 1, -1), strict=True))
    assert error(drifting, rough) == pytest.approx(math.hypot(OF_PROCESSES, math.sqrt(8 * 0.05**2 / 3 / 4)))
    assert math.isinf(error((100.0,), (50.0,)))
    assert math.isinf(log_error(race({eight: (50.0, 51.0)}).finals()))


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
