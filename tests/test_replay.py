"""The replay of recorded grids, on a small grid that is made up."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from autotune.pace import AROUND
from autotune.search.objective import PlannedRun
from autotune.search.space import Space
from autotune.search.task import LONG_RUN_SHARE
from autotune.search.trials import Trials
from autotune.strategy import Strategy
from autotune.trial.runner import ORDINARY
from autotune.trial.worker import Command
from benchmarks import methods, replay
from benchmarks.grid import FOLDER, Grid, Header, Record, products_of, read_grid, settings_of
from benchmarks.methods import METHODS, Replayed
from benchmarks.record import wanted
from benchmarks.recorded import Recorded, job_of, space_of
from benchmarks.replay import cost_to_come_within, cost_to_stay_within, regret_at, replayed
from tests import factories

PLANNED = PlannedRun(num_train=1000, num_test=0, epochs=1)
SETTINGS = [
    Strategy(micro_batch=m, accumulation=32 // m, precision=p, padding=d)  # type: ignore[arg-type]
    for m, p, d in itertools.product((4, 8, 16, 32), ("fp32", "bf16"), ("max", "longest", "buckets"))
]


FAILING = [Strategy(micro_batch=32, precision="fp16", padding=d) for d in ("max", "longest")]


def record(strategy: Strategy, number: int) -> Record:
    rate = (
        5.0 * {"fp32": 1, "bf16": 2}[strategy.precision] * {"max": 1, "longest": 1.3, "buckets": 1.8}[strategy.padding]
    )
    rate *= {4: 0.8, 8: 1.1, 16: 1.05, 32: 1.0}[strategy.micro_batch]
    found = factories.measurement(rate, peak_memory_bytes=strategy.micro_batch * 2**20, warm_up_s=0.0)
    trial = factories.trial(number, strategy, measurement=found, wall_s=60 / rate, pulse_s=1.0)
    return Record(trial=trial, laps=tuple((lap * 10 / rate, rate) for lap in range(1, 6)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    header = Header(model="imdb", source="made up", hardware=factories.hardware(), planned=PLANNED, seed=0)
    grid = Grid(tmp_path / "grid.jsonl.xz", header, [])
    for number, strategy in enumerate(SETTINGS):
        grid.add(record(strategy, number))
    for number, strategy in enumerate(FAILING, len(SETTINGS)):
        trial = factories.trial(number, strategy, outcome="crashed", measurement=None, wall_s=3.0, pulse_s=1.0)
        grid.add(Record(trial=trial, laps=()))
    return grid.path


def test_a_grid_reads_back_as_it_was_recorded(path: Path) -> None:
    grid = read_grid(path)
    assert [one.trial.strategy for one in grid.records] == SETTINGS + FAILING
    assert grid.records[3] == record(SETTINGS[3], 3)
    assert grid.header.planned == PLANNED


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.xz")), ids=lambda path: path.name)
def test_what_is_laid_out_for_a_device_has_at_least_400_settings_and_was_recorded(path: Path) -> None:
    grid = read_grid(path)
    space = space_of(grid)
    unrestricted = Space(
        global_batch=space.global_batch, values=space.values, left_out=space.left_out, pairs=space.pairs
    )
    laid_out = set(settings_of(unrestricted, products_of("imdb", "cpu", unrestricted)))
    recorded = {record.trial.strategy for record in grid.records}
    assert len(recorded) >= 400
    assert laid_out <= recorded


def test_the_truth_is_what_was_recorded_at_one_speed(path: Path) -> None:
    grid = read_grid(path)
    slow = grid.records[0]
    trial = msgspec.structs.replace(slow.trial, pulse_s=2.0)  # taken when the device was half as fast
    grid.records[0] = msgspec.structs.replace(slow, trial=trial)
    recorded = Recorded(grid)
    assert recorded.loss(grid.records[1]) == pytest.approx(1000 / (slow.trial.samples_per_s or 0) / 1.3)
    assert recorded.loss(grid.records[0]) == pytest.approx(1000 / 2**AROUND.power / (slow.trial.samples_per_s or 0))


def with_luck(grid: Grid, lucky: Strategy, times: float) -> Recorded:
    """The grid, where one setting's first record was so many times faster than it is, and four others were not."""
    place = SETTINGS.index(lucky)
    found = grid.records[place].trial
    assert found.measurement is not None
    faster = msgspec.structs.replace(found.measurement, samples_per_s=times * found.measurement.samples_per_s)
    trial = msgspec.structs.replace(found, measurement=faster)
    grid.records[place] = msgspec.structs.replace(grid.records[place], trial=trial)
    return Recorded(Grid(grid.path, grid.header, [*grid.records, *(record(lucky, 100 + n) for n in range(4))]))


def test_the_truth_is_smoothed_from_all_records_so_that_luck_does_not_win(path: Path) -> None:
    grid = read_grid(path)
    plain = Recorded(grid)
    losses = [plain.loss(one) for one in grid.records[: len(SETTINGS)]]
    assert [plain.truth[strategy] for strategy in SETTINGS] == pytest.approx(losses, rel=0.05)
    best = min(plain.truth, key=plain.truth.__getitem__)
    noisy = with_luck(grid, SETTINGS[1], 2.0)
    assert noisy.deviation > 0.2
    assert min(noisy.truth, key=noisy.truth.__getitem__) == best


def test_the_luckiest_of_all_records_does_not_win(path: Path) -> None:
    grid = read_grid(path)
    plain = Recorded(grid)
    best, second = sorted(plain.truth, key=plain.truth.__getitem__)[:2]
    assert plain.truth[second] < 1.06 * plain.truth[best]
    lucky = msgspec.structs.replace(best, precision="fp32")  # half as fast as the best
    noisy = with_luck(grid, lucky, 2.2)
    assert noisy.deviation > 0.2
    assert min(noisy.truth, key=lambda strategy: noisy.loss(noisy.by_strategy[strategy][0])) == lucky
    assert min(noisy.truth, key=noisy.truth.__getitem__) in (best, second)
    assert noisy.truth[lucky] > 1.4 * noisy.truth[best]


def test_what_three_knobs_do_only_together_is_part_of_the_truth(path: Path) -> None:
    """Of eight settings one is twice as fast as what knobs do singly and in pairs has it."""
    grid = read_grid(path)
    knobs = {"precision": ("fp32", "bf16"), "padding": ("longest", "buckets"), "allocator": ("default", "retain")}
    grid.records.clear()
    for number, values in enumerate(2 * [*itertools.product(*knobs.values())]):
        named = dict(zip(knobs, values, strict=True))
        strategy = msgspec.convert({"micro_batch": 4, "accumulation": 8, **named}, Strategy)
        seconds = 100.0 if values == ("bf16", "buckets", "retain") else 200.0
        found = factories.measurement(PLANNED.num_train / seconds, warm_up_s=0.0)
        trial = factories.trial(number, strategy, measurement=found, pulse_s=1.0)
        grid.records.append(Record(trial=trial, laps=()))
    truth = Recorded(grid).truth
    slowest, fastest = max(truth.values()), min(truth.values())
    assert fastest < 0.55 * slowest
    assert sorted(truth.values())[1] > 0.95 * slowest


def test_records_of_one_kernel_under_two_names_are_repeats(path: Path) -> None:
    """On a CPU torch's own choice is the flash kernel."""
    grid = read_grid(path)
    for attention, times in (("sdpa", 1.0), ("sdpa_flash", 1.1)):
        for strategy in SETTINGS:
            named = msgspec.structs.replace(strategy, attention=attention)
            found = record(strategy, len(grid.records)).trial
            assert found.measurement is not None
            faster = msgspec.structs.replace(found.measurement, samples_per_s=times * found.measurement.samples_per_s)
            trial = msgspec.structs.replace(found, strategy=named, measurement=faster)
            grid.records.append(Record(trial=trial, laps=()))
    recorded = Recorded(grid)
    assert recorded.deviation == pytest.approx(math.log(1.1) / math.sqrt(2), rel=0.01)
    for strategy in SETTINGS:
        sdpa, flash = (msgspec.structs.replace(strategy, attention=name) for name in ("sdpa", "sdpa_flash"))
        assert recorded.truth[sdpa] == recorded.truth[flash]


def test_repeats_are_of_the_fastest_and_of_some_drawn(path: Path) -> None:
    grid = read_grid(path)
    settings = SETTINGS + FAILING
    missing = grid.records.pop(5)
    order = []
    for strategy in wanted(settings, grid, repeats=3, top=2, drawn=2):
        order.append(strategy)
        grid.add(missing if strategy == SETTINGS[5] else record(strategy, len(grid.records)))
    fastest = sorted(SETTINGS, key=lambda strategy: -(record(strategy, 0).trial.samples_per_s or 0))[:2]
    assert order == [SETTINGS[5], *2 * [*fastest, *SETTINGS[:2]]]
    assert list(wanted(settings, grid, repeats=3, top=2, drawn=2)) == []


def test_trials_of_one_setting_are_drawn_around_its_truth(path: Path) -> None:
    recorded = Recorded(read_grid(path))
    drawn = [recorded.run(0, job_of(SETTINGS[3]), memory_limit_bytes=2**60) for _ in range(200)]
    logs = [math.log(recorded.loss(Record(trial=trial, laps=()))) for trial in drawn]
    assert statistics.stdev(logs) == pytest.approx(recorded.deviation, rel=0.2)
    assert statistics.mean(logs) == pytest.approx(math.log(recorded.truth[SETTINGS[3]]), abs=0.01)


def test_giving_a_trial_up_costs_what_had_passed_by_then(path: Path) -> None:
    recorded = Recorded(read_grid(path))
    recorded.deviation = 0.0
    job = job_of(SETTINGS[0])
    found = recorded.run(0, job, memory_limit_bytes=2**60, hopeless=lambda p: "slow" if p.num_laps == 2 else None)
    assert found.outcome == "pruned"
    assert recorded.clock == pytest.approx(20 / 4, rel=0.05)
    whole = recorded.run(1, job, memory_limit_bytes=2**60)
    assert whole.outcome == "ok"
    assert recorded.clock == pytest.approx(5 + 60 / 4, rel=0.05)
    small = recorded.run(2, job, memory_limit_bytes=2**20)
    assert (small.outcome, small.measurement) == ("oom", None)


def test_a_command_that_times_fewer_laps_costs_less_and_knows_what_those_said(path: Path) -> None:
    recorded = Recorded(read_grid(path))
    recorded.deviation = 0.0
    rate = recorded.grid.records[0].trial.samples_per_s or 0.0
    laps = tuple((lap * 10 / rate, rate * (1.1 if lap < 5 else 1.0)) for lap in range(1, 6))
    recorded.by_strategy[SETTINGS[0]] = [msgspec.structs.replace(recorded.grid.records[0], laps=laps)]
    job = job_of(SETTINGS[0])
    whole = recorded.run(0, job, memory_limit_bytes=2**60)
    one_lap = Command(min_laps=5, enough_s=10 / rate - 0.01, least_laps=1)
    shorter = recorded.run(1, job, memory_limit_bytes=2**60, command=one_lap)
    assert (whole.outcome, shorter.outcome) == ("ok", "ok")
    assert shorter.wall_s == pytest.approx(whole.wall_s - 3 * 10 / rate, rel=0.05), "two of five laps"
    assert (shorter.samples_per_s or 0) == pytest.approx(1.1 * (whole.samples_per_s or 0), rel=0.01)
    assert recorded.clock == pytest.approx(whole.wall_s + shorter.wall_s)
    no_shorter = recorded.run(2, job, memory_limit_bytes=2**60, command=ORDINARY)
    assert no_shorter.wall_s == pytest.approx(whole.wall_s, rel=0.05)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("guess then batch size", "Optuna GP")])
def test_every_method_finds_the_best_where_it_may_try_everything(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(replay, "BUDGET", 2.0)
    monkeypatch.setattr(Recorded, "deviation", property(lambda self: 0.0, lambda self, value: None), raising=False)
    held = replayed(path, name, 0)
    assert held[-1][1] == pytest.approx(0.0, abs=1e-9)
    assert all(earlier[0] <= later[0] for earlier, later in itertools.pairwise(held))


def test_optuna_s_gaussian_process_is_run_as_the_others_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a few trials: its own computation takes seconds."""
    pytest.importorskip("scipy", reason="Optuna's GPSampler needs scipy: pip install 'autotune-torch[bench]'")
    monkeypatch.setattr(replay, "BUDGET", 0.3)
    held = replayed(path, "Optuna GP", 0)
    assert [regret for _, regret in held] == sorted((regret for _, regret in held), reverse=True)


def test_a_search_under_a_memory_budget_says_how_often_it_ran_out(path: Path) -> None:
    limit_bytes = int(8.5 * 2**20 / LONG_RUN_SHARE)  # micro batches of 4 and 8 fit
    found = replay.budgeted(path, limit_bytes, 0)
    assert found.num_trials > 1
    assert found.num_oom >= found.num_avoidable == 0
    assert found.regret >= 0
    assert math.isfinite(found.regret)


def test_a_search_on_a_grid_knows_the_tokens_that_were_recorded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = read_grid(path)
    tokens = {padding: {m: 100.0 * m for m in (4, 8, 16, 32)} for padding in ("max", "longest", "buckets")}
    grid.header = msgspec.structs.replace(grid.header, tokens=tokens)
    seen: list[Replayed] = []

    class Noting(Trials):
        def __init__(self, task: Replayed, *rest: Any, **named: Any) -> None:
            seen.append(task)
            super().__init__(task, *rest, **named)

    monkeypatch.setattr(methods, "Trials", Noting)
    recorded = Recorded(grid)
    METHODS["autotune"](recorded, 0, 0.2 * recorded.total_s)
    assert seen[0].tokens("buckets", 8) == 800.0


@pytest.mark.parametrize("kept", [0, 3])
def test_a_grid_that_is_too_small_says_so(path: Path, kept: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Though nothing ran at all."""
    grid = read_grid(path)
    records = [*grid.records[:kept], *grid.records[len(SETTINGS) :]]
    few = Grid(path.with_name(f"{kept}.jsonl.xz"), grid.header, records[:-1])
    few.add(records[-1])
    replay.show(few.path, 1, ["autotune"], 1)
    assert f"{kept} settings ran, 20 are wanted" in capsys.readouterr().out


def test_regret_and_cost_are_read_off_what_was_held() -> None:
    held = [(0.01, 0.5), (0.02, 0.04), (0.05, 0.06), (0.08, 0.009)]
    assert regret_at(held, 0.005) == math.inf
    assert regret_at(held, 0.02) == 0.04
    assert regret_at(held, 0.5) == 0.009
    assert cost_to_stay_within(held, 0.05) == 0.08, "what is lost again was not yet found"
    assert cost_to_stay_within(held, 0.10) == 0.02
    assert cost_to_stay_within(held, 0.001) == math.inf
    assert cost_to_come_within(held, 0.05) == 0.02, "whatever is held later"
    assert cost_to_come_within(held, 0.001) == math.inf


def test_every_method_can_be_named_and_what_is_none_is_refused(path: Path) -> None:
    assert all("," not in name for name in METHODS), "names are given with commas between them"
    refused = CliRunner().invoke(replay.main, [str(path), "--methods", "autotune,simulated annealing"])
    assert refused.exit_code == 2
    assert "no method is named simulated annealing" in refused.output
