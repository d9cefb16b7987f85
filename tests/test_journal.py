"""What a search leaves on disk, and how the next one goes on with it; on scripted trials, in real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotune.errors import AutotuneError
from autotune.measurement import Trial
from autotune.search import races, trials
from autotune.search.journal import open_journal
from autotune.strategy import Strategy
from autotune.trial.worker import Job
from tests import factories
from tests.observing import Silent
from tests.scripted import Prepared, ScriptedRace, interrupted_at, run_scripted, searched


def test_a_killed_search_goes_on_with_nothing_lost_and_nothing_run_twice(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "imdb.journal"
    run: list[Strategy] = []

    def killed_at(end: int) -> None:
        def trial(number: int, job: Job, **_: Any) -> Trial:
            if number == end:
                raise SystemExit("as good as killed")
            run.append(job.strategy)
            return run_scripted(number, job)

        scripted_device.setattr(trials, "run_trial", trial)

    for end in (0, 1, 5, 6):
        killed_at(end)
        with pytest.raises(SystemExit):
            searched(prepared, journal_path=path)
    killed_at(-1)
    observer = Silent()
    result = searched(prepared, observer, journal_path=path)
    assert observer.resumed == 6
    assert [trial.number for trial in result.trials] == list(range(40))
    assert len(run) == len(set(run)) == 40
    assert [trial.strategy for trial in result.trials] == run
    assert result.best.strategy == searched(prepared).best.strategy


def test_a_search_that_came_to_its_end_is_not_gone_on_with(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "imdb.journal"
    searched(prepared, journal_path=path, max_trials=4)
    size = path.stat().st_size
    observer = Silent()
    searched(prepared, observer, journal_path=path, max_trials=4)
    assert observer.resumed == 0
    assert path.stat().st_size < 2 * size, "the finished search's lines are gone"


def test_another_search_does_not_take_over_the_trials_but_leaves_them(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "imdb.journal"
    scripted_device.setattr(trials, "run_trial", interrupted_at(3))
    searched(prepared, journal_path=path)
    other = Silent()
    scripted_device.setattr(trials, "run_trial", run_scripted)
    searched(prepared, other, journal_path=path, seed=1, max_trials=4)
    same = Silent()
    searched(prepared, same, journal_path=path, max_trials=4)
    assert (other.resumed, same.resumed) == (0, 3)


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_journal_that_was_cut_in_mid_line_is_mended(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "imdb.journal"
    scripted_device.setattr(trials, "run_trial", interrupted_at(4))
    searched(prepared, journal_path=path)
    path.write_bytes(path.read_bytes()[:-cut])
    scripted_device.setattr(trials, "run_trial", run_scripted)
    observer = Silent()
    result = searched(prepared, observer, journal_path=path, max_trials=8)
    assert observer.resumed in (3, 4)
    assert len({trial.strategy for trial in result.trials}) == 8


def test_a_setting_in_which_the_search_died_twice_is_not_tried_a_third_time(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "imdb.journal"
    deadly: list[Strategy] = []

    def dies(number: int, job: Job, **_: Any) -> Trial:
        if number >= 3:
            deadly.append(job.strategy)
            raise SystemExit
        return run_scripted(number, job)

    scripted_device.setattr(trials, "run_trial", dies)
    for _ in range(2):
        with pytest.raises(SystemExit):
            searched(prepared, journal_path=path)
    assert len(set(deadly)) == 1
    scripted_device.setattr(trials, "run_trial", run_scripted)
    result = searched(prepared, journal_path=path, max_trials=6)
    assert (result.trials[3].strategy, result.trials[3].outcome) == (deadly[0], "crashed")
    assert "killed 2 times" in result.trials[3].reason


def test_a_trial_that_ended_pruned_is_not_taken_for_the_one_that_the_search_died_in(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The search dies after its last trial, in the race, every time."""
    path = tmp_path / "imdb.journal"
    run: list[Strategy] = []

    def prunes(number: int, job: Job, **_: Any) -> Trial:
        run.append(job.strategy)
        if number < 3:
            return run_scripted(number, job)
        return factories.trial(number, job.strategy, outcome="pruned", measurement=None, samples_per_s=1.0)

    def dies(*_: Any, **__: Any) -> None:
        raise SystemExit("as good as killed")

    scripted_device.setattr(trials, "run_trial", prunes)
    scripted_device.setattr(races, "Race", dies)
    for _ in range(3):
        with pytest.raises(SystemExit):
            searched(prepared, journal_path=path, max_trials=5)
    scripted_device.setattr(races, "Race", ScriptedRace)
    result = searched(prepared, journal_path=path, max_trials=5)
    assert len(run) == 5
    assert [trial.outcome for trial in result.trials] == ["ok", "ok", "ok", "pruned", "pruned"]


def test_a_file_that_is_no_journal_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "imdb.journal"
    path.write_text("this is\nno journal\n")
    with (
        pytest.raises(AutotuneError, match=r"imdb\.journal is not a journal .* --fresh"),
        open_journal(path, {"a": 1}),
    ):
        pass
    with open_journal(path, {"a": 1}, is_fresh=True) as journal:
        assert journal.trials == []


def test_a_journal_that_another_search_writes_to_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "imdb.journal"
    with (
        open_journal(path, {"a": 1}),
        pytest.raises(AutotuneError, match="another search is writing"),
        open_journal(path, {"a": 1}),
    ):
        pass
