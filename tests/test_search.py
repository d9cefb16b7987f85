"""The search's logic on scripted trials: what is tried, what wins, what a failure does. No process is started here
(tests/test_trial.py and tests/test_cli.py do that)."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from autotune import backends, workloads
from autotune.errors import AutotuneError
from autotune.measurement import Measurement, Trial
from autotune.search import finals, study
from autotune.search.finals import Entrant, Final, Race, ranked
from autotune.search.journal import open_journal
from autotune.search.memory import MemoryModel
from autotune.search.objective import PlannedRun, hopeless, loss_of
from autotune.search.proof import Proof
from autotune.search.result import Result, profile_of
from autotune.search.sampling import Sampler
from autotune.search.settings import Settings
from autotune.search.space import Space, build_space, expert_guess
from autotune.search.study import search
from autotune.strategy import Padding, Strategy, baseline
from autotune.trial.runner import TrialEndedError
from autotune.trial.worker import Command, Done, Job, Progress
from autotune.workloads.base import Workload, WorkloadRef
from tests import factories
from tests.observing import Silent, SilentPulse

CPU = backends.get("cpu")
GIB = 2**30


def scripted(strategy: Strategy) -> Measurement:
    """A device on which bf16, flash and buckets pay, micro batch 8 is best, and everything else costs."""
    rate = 5.0
    rate *= {"fp32": 1, "tf32": 1, "bf16": 2, "fp16": 1.8}[strategy.precision]
    rate *= {"eager": 1, "sdpa": 1.1, "sdpa_math": 0.9, "sdpa_flash": 1.2}.get(strategy.attention, 1)
    rate *= {"max": 1, "longest": 1.2, "buckets": 1.8}[strategy.padding]
    rate *= {1: 0.5, 2: 0.8, 4: 1.1, 8: 1.3, 16: 1.2, 32: 1}[strategy.micro_batch]
    rate *= {"none": 1, "every_4th": 0.95, "every_2nd": 0.9, "every_block": 0.8}[strategy.checkpoint]
    rate *= 1 - 0.05 * strategy.workers
    rate *= {"default": 1, "retain": 1.1}[strategy.allocator]
    memory = strategy.micro_batch * 60 * 2**20
    return factories.measurement(rate, peak_memory_bytes=memory)


def run_scripted(number: int, job: Job, **_: Any) -> Trial:
    return factories.trial(number, job.strategy, measurement=scripted(job.strategy))


class ScriptedRace:
    """A race that ends as the trials did."""

    def __init__(self, entrants: Sequence[Entrant], **_: Any) -> None:
        self.entrants = list(entrants)
        self.num_rounds = 0
        self.num_disturbed = 0
        self.failures: dict[int, TrialEndedError] = {}

    def run(self, **_: Any) -> None:
        self.num_rounds = 3

    def finals(self) -> list[Final]:
        found = [(entrant, scripted(entrant.job.strategy)) for entrant in self.entrants]
        return [
            Final(trial=entrant.trial, measurement=m, epoch_s=(1000 / m.samples_per_s,) * self.num_rounds)
            for entrant, m in found
            if entrant.trial.number not in self.failures and self.num_rounds
        ]


def prove_scripted(job: Job, reference: object, **_: Any) -> Proof:
    peak_bytes = scripted(job.strategy).peak_memory_bytes
    return Proof(outcome="ok", loss_deviation=0.001, soak_steps=50, peak_memory_bytes=peak_bytes)


@pytest.fixture(scope="module")
def prepared(tiny_reviews: Path) -> tuple[WorkloadRef, Workload]:
    module = workloads.get("imdb")
    ref = module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None)
    return ref, module.open_workload(ref)


@pytest.fixture
def scripted_device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(study, "run_trial", run_scripted)
    monkeypatch.setattr(study, "Race", ScriptedRace)
    monkeypatch.setattr(study, "Pulse", SilentPulse)
    monkeypatch.setattr(study, "prove", prove_scripted)
    monkeypatch.setattr(study, "reference_losses", lambda job, **_: (0.7,))
    return monkeypatch


def searched(
    prepared: tuple[WorkloadRef, Workload],
    observer: Silent | None = None,
    *,
    journal_path: Path | None = None,
    **settings: Any,
) -> Result:
    """A search on the scripted device, in a journal of its own where none is given."""
    ref, workload = prepared
    wanted = msgspec.convert({"budget_s": None, "max_trials": 40, **settings}, Settings)
    with tempfile.TemporaryDirectory() as folder:
        path = journal_path or Path(folder) / "imdb.journal"
        return search(ref, workload, factories.hardware(), CPU, wanted, observer or Silent(), journal_path=path)


Prepared = tuple[WorkloadRef, Workload]


def test_the_baseline_comes_first_the_guess_second_and_nothing_twice(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    observer = Silent()
    result = searched(prepared, observer)
    assert result.trials[0].strategy == baseline(32)
    assert observer.origins[:3] == ["plain baseline", "expert's guess", "search"]
    assert result.trials[1].strategy == Strategy(
        attention="sdpa_flash", precision="bf16", micro_batch=8, accumulation=4, padding="buckets", allocator="retain"
    )
    assert len({trial.strategy for trial in result.trials}) == len(result.trials) == 40


def test_micro_batch_times_accumulation_is_the_global_batch_always(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    assert {trial.strategy.global_batch for trial in searched(prepared).trials} == {32}


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_the_space_is_found(prepared: Prepared, scripted_device: pytest.MonkeyPatch, seed: int) -> None:
    result = searched(prepared, seed=seed)
    assert result.best.strategy == Strategy(
        attention="sdpa_flash", precision="bf16", micro_batch=8, accumulation=4, padding="buckets", allocator="retain"
    )
    assert result.num_rounds == 3
    best, base = result.best.measurement, result.baseline.measurement
    assert best is not None
    assert base is not None
    assert result.speedup.ratio == pytest.approx(best.samples_per_s / base.samples_per_s)


def test_a_misleading_guess_does_not_win(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    def no_flash(number: int, job: Job, **_: Any) -> Trial:
        found = scripted(job.strategy)
        if job.strategy.attention == "sdpa_flash":
            found = factories.measurement(found.samples_per_s / 2)
        return factories.trial(number, job.strategy, measurement=found)

    scripted_device.setattr(study, "run_trial", no_flash)
    assert searched(prepared).best.strategy.attention == "sdpa"


def test_failing_trials_are_on_record_and_the_search_goes_on(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    outcomes = {1: "oom", 2: "timeout", 3: "crashed", 4: "diverged", 5: "invalid", 6: "pruned"}

    def failing(number: int, job: Job, **_: Any) -> Trial:
        if number in outcomes:
            return factories.trial(number, job.strategy, outcome=outcomes[number], reason="scripted", measurement=None)
        return run_scripted(number, job)

    scripted_device.setattr(study, "run_trial", failing)
    result = searched(prepared)
    assert {trial.number: trial.outcome for trial in result.trials if trial.outcome != "ok"} == outcomes
    assert result.best.outcome == "ok"
    assert result.speedup.ratio > 3


def test_a_baseline_that_does_not_run_ends_the_search_with_its_reason(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    scripted_device.setattr(
        study,
        "run_trial",
        lambda number, job, **_: factories.trial(number, outcome="oom", reason="too big", measurement=None),
    )
    observer = Silent()
    with pytest.raises(AutotuneError, match=r"baseline did not run .*too big"):
        searched(prepared, observer)
    assert observer.origins == ["plain baseline"], "the budget must not be spent on what cannot be compared"


def test_the_memory_objective_finds_the_leanest(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    assert searched(prepared, objective="memory").best.strategy.micro_batch == 1


def test_a_memory_budget_keeps_bigger_settings_from_winning_the_baseline_too(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    result = searched(prepared, memory_budget_bytes=250 * 2**20)
    assert result.best.strategy.micro_batch == 4
    assert result.baseline.measurement is not None
    with pytest.raises(AutotuneError, match=r"no setting fits the memory budget.*raise --memory-budget"):
        searched(prepared, memory_budget_bytes=2**20)


def test_a_tiny_budget_still_compares_the_guess_with_the_baseline(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    result = searched(prepared, budget_s=1e-6, max_trials=None)
    assert len(result.trials) == 2
    assert result.best.number == 1
    assert not result.num_rounds, "there is no time for a race"


def test_interrupting_keeps_the_best_so_far(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    def interrupted(number: int, job: Job, **_: Any) -> Trial:
        if number == 5:
            raise KeyboardInterrupt
        return run_scripted(number, job)

    scripted_device.setattr(study, "run_trial", interrupted)
    result = searched(prepared)
    assert result.was_interrupted
    assert not result.num_rounds
    assert len(result.trials) == 5
    assert result.speedup.ratio > 3


def test_interrupting_before_the_baseline_is_done_says_that_nothing_is_saved(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    def interrupted(number: int, job: Job, **_: Any) -> Trial:
        raise KeyboardInterrupt

    scripted_device.setattr(study, "run_trial", interrupted)
    with pytest.raises(AutotuneError, match="before the baseline") as caught:
        searched(prepared)
    assert caught.value.exit_code == 130


class FirstFails(ScriptedRace):
    """The best finalist runs out of memory in the race."""

    def run(self, **_: Any) -> None:
        super().run()
        self.failures = {self.entrants[1].trial.number: TrialEndedError("oom", "scripted")}


def test_a_setting_that_fails_in_the_race_does_not_win(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    best_trial = searched(prepared).best
    scripted_device.setattr(study, "Race", FirstFails)
    result = searched(prepared)
    assert result.best.strategy != best_trial.strategy
    assert result.trials[best_trial.number].outcome == "oom"


def test_when_only_the_baseline_survives_the_race_the_next_best_trial_wins(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    raced: list[int] = []

    class AllFail(ScriptedRace):
        def run(self, **_: Any) -> None:
            super().run()
            raced.extend(entrant.trial.number for entrant in self.entrants)
            self.failures = {entrant.trial.number: TrialEndedError("oom", "") for entrant in self.entrants[1:]}

    scripted_device.setattr(study, "Race", AllFail)
    result = searched(prepared)
    assert result.best.number not in raced
    assert not result.num_rounds


def test_a_setting_that_goes_over_the_memory_budget_in_the_race_does_not_win(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    grown: list[int] = []

    class Growing(ScriptedRace):
        def finals(self) -> list[Final]:
            reference, first, *others = super().finals()
            grown.append(first.trial.number)
            bigger = msgspec.structs.replace(first.measurement, peak_memory_bytes=3 * GIB)
            return [reference, msgspec.structs.replace(first, measurement=bigger), *others]

    scripted_device.setattr(study, "Race", Growing)
    assert searched(prepared, memory_budget_bytes=2 * GIB).best.number not in grown


def test_a_winner_that_does_not_train_as_the_baseline_does_is_passed_over(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    def without_bf16(job: Job, reference: object, **_: Any) -> Proof:
        if job.strategy.precision == "bf16":
            return Proof(outcome="diverged", reason="scripted", loss_deviation=0.5)
        return prove_scripted(job, reference)

    scripted_device.setattr(study, "prove", without_bf16)
    scripted_device.setattr(study, "MAX_PROOFS", 40)
    result = searched(prepared)
    assert result.best.strategy.precision != "bf16"
    assert result.proof is not None
    assert result.proof.outcome == "ok"
    failed = [trial for trial in result.trials if trial.outcome == "diverged"]
    assert failed
    assert all(trial.reason == "in the last test: scripted" for trial in failed)


def test_what_was_given_up_against_a_setting_that_fails_is_tried_again(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    """Only bf16 trials finish at first, everything slower is given up; then bf16 fails the last test."""

    def pruning(number: int, job: Job, **_: Any) -> Trial:
        found = scripted(job.strategy)
        is_given_up = 0 < number < 40 and job.strategy.precision != "bf16"
        if is_given_up:
            return factories.trial(
                number, job.strategy, outcome="pruned", measurement=None, samples_per_s=found.samples_per_s
            )
        return factories.trial(number, job.strategy, measurement=found)

    def without_bf16(job: Job, reference: object, **_: Any) -> Proof:
        outcome = "diverged" if job.strategy.precision == "bf16" else "ok"
        return Proof(outcome=outcome)  # type: ignore[arg-type]

    scripted_device.setattr(study, "run_trial", pruning)
    scripted_device.setattr(study, "prove", without_bf16)
    scripted_device.setattr(study, "MAX_PROOFS", 60)
    result = searched(prepared)
    assert result.best.number >= 40
    assert result.best.strategy.precision == "fp16"


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


def test_a_small_space_is_exhausted_and_the_search_ends(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ref, workload = prepared
    tiny = dataclasses.replace(workload, num_blocks=0, recipe=msgspec.structs.replace(workload.recipe, global_batch=1))
    refused = {f"attention__{a}__{p}": "no" for a in ("sdpa", "sdpa_math") for p in ("fp32", "bf16", "fp16")}
    hardware = factories.hardware(
        **refused,
        matmul__fp16="no",
        matmul__tf32="no",
        allocator__retain="no",
        compile__default="no",
        **{"compile__max-autotune": "no"},
    )
    scripted_device.setattr(study, "run_trial", lambda number, job, **_: factories.trial(number, job.strategy))
    result = search(ref, tiny, hardware, CPU, Settings(budget_s=None), Silent(), journal_path=tmp_path / "imdb.journal")
    assert len(result.trials) == build_space(hardware, CPU, tiny).size


def test_the_profile_holds_the_winner_and_its_evidence(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    result = searched(prepared)
    profile = profile_of(result, factories.device(), prepared[1])
    assert profile.strategy == result.best.strategy
    assert profile.evidence.speedup == result.speedup
    assert profile.evidence.num_trials == 40
    assert profile.evidence.baseline.projected_s > profile.evidence.best.projected_s > 0


def test_only_what_the_probe_allows_is_in_the_space(prepared: Prepared) -> None:
    space = build_space(
        factories.hardware(
            matmul__fp16="too slow: 1 GFLOP/s against 200 in fp32",
            attention__sdpa_flash__bf16="refused: no kernel",
            compile__default="refused: no C++ compiler",
        ),
        CPU,
        prepared[1],
    )
    assert "fp16" not in space.values["precision"]
    assert "default" not in space.values["compile"]
    assert space.left_out["precision=fp16"] == "too slow: 1 GFLOP/s against 200 in fp32"
    assert ("sdpa_flash", "fp32") in space.pairs
    assert ("sdpa_flash", "bf16") not in space.pairs
    asked = [space.strategy(dict(zip(space.values, values, strict=True))) for values in _some(space)]
    assert [s.precision for s in asked if s.attention == "sdpa_flash" and not space.refusal(s)].count("bf16") == 0


def _some(space: Space) -> list[tuple[Any, ...]]:
    import itertools

    return list(itertools.product(*space.values.values()))


def test_the_sampler_never_proposes_what_the_space_refuses(prepared: Prepared) -> None:
    space = build_space(factories.hardware(attention__sdpa_flash__bf16="no"), CPU, prepared[1])
    import optuna

    sampler = Sampler(space, optuna.create_study(), seed=0)
    for _ in range(60):
        strategy = sampler.ask()
        assert strategy is not None
        assert space.refusal(strategy) is None
        sampler.tell(1.0)


def test_the_guess_takes_the_fastest_that_the_probe_measured(prepared: Prepared) -> None:
    hardware = factories.hardware(matmul__bf16="refused: no", attention__sdpa_flash__fp16="refused: no")
    guess = expert_guess(build_space(hardware, CPU, prepared[1]), hardware, CPU)
    assert (guess.precision, guess.attention) == ("fp16", "sdpa")


@pytest.mark.parametrize(
    ("laps", "rate", "is_compiled", "is_hopeless"),
    [
        (1, 1.0, False, False),
        (2, 4.0, False, True),
        (2, 7.0, False, False),
        (3, 7.0, False, True),
        (3, 9.0, False, False),
        (3, 1.0, True, False),
        (4, 1.0, True, True),
    ],
)
def test_a_trial_is_given_up_only_when_far_behind(laps: int, rate: float, is_compiled: bool, is_hopeless: bool) -> None:
    progress = Progress(stage="timing", num_laps=laps, samples_per_s=rate)
    assert (hopeless(progress, 10.0, is_compiled) is not None) == is_hopeless


def test_the_loss_is_the_planned_run_or_the_peak() -> None:
    planned = PlannedRun(num_train=1000, num_test=300, epochs=2)
    trial = factories.trial(measurement=factories.measurement(10.0, warm_up_s=7.0))
    assert loss_of(trial, "time", planned) == pytest.approx(7 + 2 * (100 + 10))
    assert loss_of(trial, "memory", planned) == GIB
    pruned = factories.trial(outcome="pruned", measurement=None, samples_per_s=5.0)
    assert loss_of(pruned, "time", planned, reference=trial) == pytest.approx(2 * (7 + 2 * (100 + 10)))
    assert loss_of(pruned, "memory", planned, reference=trial) is None


def test_what_is_too_slow_is_searched_when_asked_for_and_what_is_refused_is_not(prepared: Prepared) -> None:
    hardware = factories.hardware(
        matmul__fp16="too slow: 1 GFLOP/s against 200 in fp32", compile__default="refused: no C++ compiler"
    )
    space = build_space(hardware, CPU, prepared[1], includes_slow=True)
    assert "fp16" in space.values["precision"]
    assert space.values["compile"] == ("none",)


def test_under_a_memory_budget_memory_that_grows_is_left_out(prepared: Prepared) -> None:
    space = build_space(factories.hardware(), CPU, prepared[1], has_memory_budget=True)
    assert space.values["allocator"] == ("default",)
    assert "twice" in space.left_out["allocator=retain"]


def test_cuda_graphs_are_not_combined_with_accumulation(prepared: Prepared) -> None:
    space = build_space(factories.hardware(), CPU, prepared[1])
    graphs = Strategy(micro_batch=8, accumulation=4, compile="reduce-overhead")
    assert "169545" in (space.refusal(graphs) or "")
    assert space.refusal(Strategy(micro_batch=32, compile="reduce-overhead")) is None


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


# The journal


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

        scripted_device.setattr(study, "run_trial", trial)

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
    scripted_device.setattr(study, "run_trial", interrupted_at(3))
    searched(prepared, journal_path=path)
    other = Silent()
    scripted_device.setattr(study, "run_trial", run_scripted)
    searched(prepared, other, journal_path=path, seed=1, max_trials=4)
    same = Silent()
    searched(prepared, same, journal_path=path, max_trials=4)
    assert (other.resumed, same.resumed) == (0, 3)


def interrupted_at(end: int) -> Any:
    def trial(number: int, job: Job, **_: Any) -> Trial:
        if number == end:
            raise KeyboardInterrupt
        return run_scripted(number, job)

    return trial


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_journal_that_was_cut_in_mid_line_is_mended(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "imdb.journal"
    scripted_device.setattr(study, "run_trial", interrupted_at(4))
    searched(prepared, journal_path=path)
    path.write_bytes(path.read_bytes()[:-cut])
    scripted_device.setattr(study, "run_trial", run_scripted)
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

    scripted_device.setattr(study, "run_trial", dies)
    for _ in range(2):
        with pytest.raises(SystemExit):
            searched(prepared, journal_path=path)
    assert len(set(deadly)) == 1
    scripted_device.setattr(study, "run_trial", run_scripted)
    result = searched(prepared, journal_path=path, max_trials=6)
    assert (result.trials[3].strategy, result.trials[3].outcome) == (deadly[0], "crashed")
    assert "killed 2 times" in result.trials[3].reason


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


# Memory


def test_two_trials_of_a_kind_predict_the_others_peak() -> None:
    model = MemoryModel()

    def sized(micro_batch: int, peak_bytes: int) -> Trial:
        strategy = Strategy(micro_batch=micro_batch, accumulation=32 // micro_batch)
        return factories.trial(strategy=strategy, measurement=factories.measurement(peak_memory_bytes=peak_bytes))

    assert model.predict(sized(8, 0).strategy) is None
    model.learn(sized(1, 150))
    model.learn(sized(2, 200))
    assert model.predict(sized(32, 0).strategy) == pytest.approx(100 + 50 * 32, abs=1)
    assert model.is_over(sized(32, 0).strategy, 1000)
    assert not model.is_over(sized(16, 0).strategy, 1000)
    assert model.predict(Strategy(micro_batch=32, precision="bf16")) is None


def test_what_is_larger_than_a_setting_that_ran_out_of_memory_is_not_tried(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    limit = 500 * 2**20

    def full(number: int, job: Job, **_: Any) -> Trial:
        found = scripted(job.strategy)
        if number and found.peak_memory_bytes > limit:
            return factories.trial(number, job.strategy, outcome="oom", reason="scripted", measurement=None)
        return factories.trial(number, job.strategy, measurement=found)

    scripted_device.setattr(study, "run_trial", full)
    result = searched(prepared, memory_budget_bytes=limit, max_trials=60)
    kinds: dict[Strategy, list[int]] = {}
    for trial in result.trials[1:]:
        kind = msgspec.structs.replace(trial.strategy, micro_batch=1, accumulation=1)
        smallest = min(kinds.get(kind, [64]))
        assert trial.strategy.micro_batch < smallest, "a smaller one of the kind was too big already"
        if trial.outcome == "oom":
            kinds.setdefault(kind, []).append(trial.strategy.micro_batch)
