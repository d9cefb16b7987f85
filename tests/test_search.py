"""The search's logic on scripted trials: what is tried, what wins, what a failure does. No process is started here
(tests/test_trial.py and tests/test_cli.py do that)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from autotune import backends, workloads
from autotune.errors import AutotuneError
from autotune.measurement import Measurement, Trial
from autotune.search import finals, study
from autotune.search.finals import Entrant, Final
from autotune.search.objective import PlannedRun, hopeless, loss_of
from autotune.search.sampling import Sampler
from autotune.search.space import Space, build_space, expert_guess
from autotune.search.study import Result, Settings, profile_of, search
from autotune.strategy import Padding, Strategy, baseline
from autotune.trial.runner import TrialEndedError
from autotune.trial.worker import Command, Done, Job, Progress
from autotune.workloads.base import Workload, WorkloadRef
from tests import factories

CPU = backends.get("cpu")
GIB = 2**30


class Silent:
    """An observer that keeps what it heard."""

    def __init__(self) -> None:
        self.origins: list[str] = []

    def on_space(self, space: Space) -> None: ...
    def on_trial_start(self, number: int, strategy: Strategy, origin: str) -> None:
        self.origins.append(origin)

    def on_progress(self, progress: Progress) -> None: ...
    def on_trial_end(self, trial: Trial, best: Trial | None) -> None: ...
    def on_race(self, done: int, of: int, num_entrants: int) -> None: ...


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


def race_scripted(entrants: Sequence[Entrant], *, rounds: int, **_: Any) -> list[Final]:
    found = [(entrant, scripted(entrant.job.strategy)) for entrant in entrants]
    return [
        Final(trial=entrant.trial, measurement=m, epoch_s=(1000 / m.samples_per_s,) * rounds) for entrant, m in found
    ]


@pytest.fixture(scope="module")
def prepared(tiny_reviews: Path) -> tuple[WorkloadRef, Workload]:
    module = workloads.get("imdb")
    ref = module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None)
    return ref, module.open_workload(ref)


@pytest.fixture
def scripted_device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(study, "run_trial", run_scripted)
    monkeypatch.setattr(study, "race", race_scripted)
    return monkeypatch


def searched(prepared: tuple[WorkloadRef, Workload], observer: Silent | None = None, **settings: Any) -> Result:
    ref, workload = prepared
    wanted = msgspec.convert({"budget_s": None, "max_trials": 40, **settings}, Settings)
    return search(ref, workload, factories.hardware(), CPU, wanted, observer or Silent())


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
    assert result.was_raced
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
    assert not result.was_raced, "there is no time for a race"


def test_interrupting_keeps_the_best_so_far(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    def interrupted(number: int, job: Job, **_: Any) -> Trial:
        if number == 5:
            raise KeyboardInterrupt
        return run_scripted(number, job)

    scripted_device.setattr(study, "run_trial", interrupted)
    result = searched(prepared)
    assert result.was_interrupted
    assert not result.was_raced
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


def test_a_setting_that_fails_in_the_race_does_not_win(prepared: Prepared, scripted_device: pytest.MonkeyPatch) -> None:
    def without_the_first(entrants: Sequence[Entrant], *, rounds: int, **_: Any) -> list[Final]:
        return race_scripted([entrants[0], *entrants[2:]], rounds=rounds)

    best_trial = searched(prepared).best.strategy
    scripted_device.setattr(study, "race", without_the_first)
    assert searched(prepared).best.strategy != best_trial


def test_when_only_the_baseline_survives_the_race_the_next_best_trial_wins(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    raced: list[int] = []

    def only_the_first(entrants: Sequence[Entrant], *, rounds: int, **_: Any) -> list[Final]:
        raced.extend(entrant.trial.number for entrant in entrants)
        return race_scripted(entrants[:1], rounds=rounds)

    scripted_device.setattr(study, "race", only_the_first)
    result = searched(prepared)
    assert result.best.number not in raced
    assert not result.was_raced


def test_a_setting_that_goes_over_the_memory_budget_in_the_race_does_not_win(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
) -> None:
    grown: list[int] = []

    def growing(entrants: Sequence[Entrant], *, rounds: int, **_: Any) -> list[Final]:
        finals = race_scripted(entrants, rounds=rounds)
        grown.append(finals[1].trial.number)
        bigger = msgspec.structs.replace(finals[1].measurement, peak_memory_bytes=3 * GIB)
        return [finals[0], msgspec.structs.replace(finals[1], measurement=bigger), *finals[2:]]

    scripted_device.setattr(study, "race", growing)
    assert searched(prepared, memory_budget_bytes=2 * GIB).best.number not in grown


def test_a_small_space_is_exhausted_and_the_search_ends(
    prepared: Prepared, scripted_device: pytest.MonkeyPatch
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
    result = search(ref, tiny, hardware, CPU, Settings(budget_s=None), Silent())
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
    sampler = Sampler(space, seed=0)
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
    assert loss_of(pruned, "time", planned, trial) == pytest.approx(2 * (7 + 2 * (100 + 10)))
    assert loss_of(pruned, "memory", planned, trial) is None


def test_what_is_too_slow_is_searched_when_asked_for_and_what_is_refused_is_not(prepared: Prepared) -> None:
    hardware = factories.hardware(
        matmul__fp16="too slow: 1 GFLOP/s against 200 in fp32", compile__default="refused: no C++ compiler"
    )
    space = build_space(hardware, CPU, prepared[1], includes_slow=True)
    assert "fp16" in space.values["precision"]
    assert space.values["compile"] == ("none",)


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
    found = finals.race(entrants, rounds=3, timeout_s=1, memory_limit_bytes=1)
    assert closed == ["longest"]
    assert [(final.trial.number, len(final.epoch_s)) for final in found] == [(0, 3), (2, 3)]
