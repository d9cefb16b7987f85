"""How laps become figures. Nothing here asserts how fast anything is."""

from __future__ import annotations

import dataclasses
import math
import time
import types
from pathlib import Path
from typing import cast

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune import backends, workloads
from autotune.apply import Run, apply
from autotune.data.batching import MicroBatch
from autotune.laps import steady
from autotune.measurement import Lap
from autotune.models.encoder import EncoderClassifier
from autotune.pace import LAP_POWER, Beats, usual_pulse_s
from autotune.stats import relative_margin
from autotune.step import Step
from autotune.strategy import Padding, Strategy
from autotune.timing import MOST_STOPPED, Timer, _low_discrepancy, time_until
from autotune.trial.runner import ONCE, ONCE_WITH_BEATS, ORDINARY, WITH_BEATS
from autotune.trial.worker import Command
from tests.applied import reviews, run_of
from tests.factories import lap


@given(st.integers(1, 3000))
def test_the_visiting_order_holds_every_batch_once(count: int) -> None:
    assert sorted(_low_discrepancy(count)) == list(range(count))


def test_laps_in_which_something_is_compiled_are_warm_up() -> None:
    first, *others = (lap(seconds) for seconds in (5.0, 1.0, 1.1, 4.0, 0.9))
    others[2] = msgspec.structs.replace(others[2], num_compiled=2)
    warm_up, timed = steady([first, *others])
    assert [found.seconds for found in warm_up] == [5.0, 4.0]
    assert [found.seconds for found in timed] == [1.0, 1.1, 0.9]


def test_laps_that_all_compile_are_timed() -> None:
    laps = [msgspec.structs.replace(lap(seconds), num_compiled=1) for seconds in (5.0, 1.0, 1.1, 0.9)]
    warm_up, timed = steady(laps)
    assert [found.seconds for found in warm_up] == [5.0]
    assert [found.seconds for found in timed] == [1.0, 1.1, 0.9]


@pytest.mark.parametrize("count", [64, 500, 782])
def test_any_few_consecutive_batches_cover_the_lengths(count: int) -> None:
    order = list(_low_discrepancy(count))
    for start in range(0, count - 8, 8):
        mean = sum(order[start : start + 8]) / 8 / count
        assert 0.3 < mean < 0.7


def test_the_first_lap_is_warm_up_and_so_are_laps_that_still_compile() -> None:
    warm_up, timed = steady([lap(9), lap(5), lap(1), lap(1.1), lap(0.9)])
    assert [x.seconds for x in warm_up] == [9, 5]
    assert [x.seconds for x in timed] == [1, 1.1, 0.9]


def test_a_longer_batch_is_not_taken_for_warm_up() -> None:
    _, timed = steady([lap(4, 400), lap(3, 300), lap(1, 100), lap(2, 200)])
    assert [x.seconds for x in timed] == [3, 1, 2]


def test_a_single_lap_counts_as_timed() -> None:
    assert steady([lap(2)])[1] == [lap(2)]


@pytest.mark.parametrize("padding", ["max", "buckets"])
def test_figures_come_from_real_steps_and_stand_for_a_whole_epoch(tiny_reviews: Path, padding: Padding) -> None:
    module = workloads.get("imdb")
    prepared = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    workload = dataclasses.replace(prepared, max_tokens=64)
    model = EncoderClassifier(width=16, num_heads=2, ffn_width=16, num_layers=1)
    weights = model.head.weight.clone()
    strategy = Strategy(micro_batch=8, accumulation=4, padding=padding)
    run = apply(strategy, workload, backends.get("cpu"), model=model)
    run.backend.start_memory_window()
    timer = Timer(run)
    seen: list[Lap] = []
    time_until(timer, min_laps=3, min_s=0.0, enough_s=60.0, narrow=math.inf, on_lap=seen.append)
    timer.evaluate(2, 60.0)
    found = timer.measurement()
    assert len(seen) == len(timer.laps) >= 4
    assert not torch.equal(weights, model.head.weight), "the timed step must be a training step"
    rate = found.samples_per_s
    assert found.step_ms / 1000 * len(run.loader) == pytest.approx(workload.num_train / rate)
    assert found.tokens_per_s <= rate * 64
    assert len(found.losses) == sum(x.num_steps for x in timer.laps)
    assert 0 <= found.loader_wait < 1
    assert found.eval_samples_per_s > 0
    assert found.run_s(num_train=2 * workload.num_train, num_test=0, epochs=1) == pytest.approx(
        found.warm_up_s + 2 * timer.epoch_s(timer.steady()[1])
    )


def test_the_longest_batch_comes_first_for_the_peak_memory(tiny_reviews: Path) -> None:
    module = workloads.get("imdb")
    workload = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    run = apply(
        Strategy(micro_batch=32, padding="buckets"),
        workload,
        backends.get("cpu"),
        model=EncoderClassifier(width=16, num_heads=2, ffn_width=16, num_layers=1),
    )
    tokens: list[int] = []
    run.model.register_forward_pre_hook(
        lambda module, args, inputs: tokens.append(inputs["ids_BT"].numel()), with_kwargs=True
    )
    timer = Timer(run, start=0.5)
    first, second = timer.lap(), timer.lap()
    assert tokens[0] == max(batch.padded_tokens for batch in run.loader.plan(0))
    assert first.padded_tokens == sum(tokens[: first.num_steps])
    assert second.padded_tokens == sum(tokens[first.num_steps :])


class HalfPaused(Beats):
    """Half of every time was a pause."""

    def during(self, start_s: float, end_s: float) -> tuple[float, float | None]:
        return (end_s - start_s) / 2, 0.01


class StoppedAtFirst(Beats):
    """All was stopped in some of the first times."""

    def __init__(self, count: float) -> None:
        super().__init__()
        self.left = count

    def stopped(self, start_s: float, end_s: float) -> bool:
        self.left -= 1
        return self.left >= 0


@pytest.mark.parametrize(("count", "num_more"), [(0, 0), (2, 2), (math.inf, MOST_STOPPED)])
def test_what_was_stopped_in_its_middle_is_timed_again_up_to_a_point(
    count: float, num_more: int, tiny_reviews: Path
) -> None:
    module = workloads.get("imdb")
    workload = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    model = EncoderClassifier(width=16, num_heads=2, ffn_width=16, num_layers=1)
    run = apply(Strategy(micro_batch=32), workload, backends.get("cpu"), model=model)
    beats = StoppedAtFirst(count)
    timer = Timer(run, beats=beats)
    asked = [timer.lap(), timer.lap()]
    assert timer.laps == asked
    timer.evaluate(1, math.inf)
    assert timer.measurement().samples_per_s > 0
    assert timer._num_stopped == num_more


def test_pauses_for_the_devices_pulse_are_no_part_of_a_lap(tiny_reviews: Path) -> None:
    module = workloads.get("imdb")
    workload = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    model = EncoderClassifier(width=16, num_heads=2, ffn_width=16, num_layers=1)
    run = apply(Strategy(micro_batch=32, padding="buckets"), workload, backends.get("cpu"), model=model)
    timer = Timer(run, beats=HalfPaused())
    start = time.perf_counter()
    found = timer.lap()
    assert 2 * found.seconds <= time.perf_counter() - start
    assert found.wait_s < found.seconds
    start = time.perf_counter()
    timer.evaluate(len(run.evaluation_plan()), math.inf)
    wall_s = time.perf_counter() - start
    measured = timer.measurement()
    assert 2 * workload.num_test / measured.eval_samples_per_s <= wall_s
    assert found.pulse_s == 0.01
    assert measured.pulse_s == pytest.approx(0.01)


class Uneven(Beats):
    """Nothing was paused; the device's speed was another each time."""

    def __init__(self, *pulses: float) -> None:
        super().__init__()
        self._pulses = iter(pulses)

    def during(self, start_s: float, end_s: float) -> tuple[float, float | None]:
        return 0.0, next(self._pulses)


def test_all_that_is_timed_is_moved_to_the_speed_of_the_timed_laps(tiny_reviews: Path) -> None:
    module = workloads.get("imdb")
    workload = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    model = EncoderClassifier(width=16, num_heads=2, ffn_width=16, num_layers=1)
    run = apply(Strategy(micro_batch=32, padding="buckets"), workload, backends.get("cpu"), model=model)
    timer = Timer(run, beats=Uneven(0.09, 0.01, 0.04, 0.16, 0.16, 0.16))
    raw = [timer.lap() for _ in range(3)]
    speed_s = usual_pulse_s(raw[1:])
    assert speed_s is not None
    assert 0.01 < speed_s < 0.04
    warm_up, timed = timer.steady()
    assert [found.seconds for found in (*warm_up, *timed)] == pytest.approx(
        [found.seconds / ((found.pulse_s or 0.0) / speed_s) ** LAP_POWER for found in raw]
    )
    timer.evaluate(2, 0.0)
    measured = timer.measurement()
    assert measured.pulse_s == speed_s
    seconds = sum(found.seconds for found in timed)
    assert measured.tokens_per_s == pytest.approx(sum(found.num_tokens for found in timed) / seconds)
    timer._eval_laps = [msgspec.structs.replace(found, pulse_s=None) for found in timer._eval_laps]
    as_it_was = timer.measurement().eval_samples_per_s
    assert measured.eval_samples_per_s == pytest.approx(as_it_was * (0.16 / speed_s) ** LAP_POWER)


class Ticking:
    """A timer whose laps take the given seconds, the first of them the warm-up."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.laps: list[Lap] = []

    def lap(self) -> Lap:
        found = lap(self.seconds[len(self.laps)])
        self.laps.append(found)
        return found

    def steady(self) -> tuple[list[Lap], list[Lap]]:
        return steady(self.laps)

    def margin(self, laps: list[Lap]) -> float:
        return relative_margin([found.seconds for found in laps])


@pytest.mark.parametrize(
    ("command", "seconds", "num_laps"),
    [
        (ORDINARY, 12.0, 4),
        (WITH_BEATS, 12.0, 3),
        (WITH_BEATS, 2.5, 4),
        (ONCE, 12.0, 2),
        (ORDINARY, 40.0, 2),
        (ORDINARY, 4.0, 4),
        (ONCE, 4.0, 4),
        (ONCE, 1.0, 6),
        (ONCE_WITH_BEATS, 8.0, 2),
        (ONCE_WITH_BEATS, 4.0, 3),
        (ONCE_WITH_BEATS, 1.0, 6),
    ],
    ids=str,
)
def test_a_lap_that_takes_as_long_as_all_should_is_timed_once_where_that_is_enough(
    command: Command, seconds: float, num_laps: int
) -> None:
    timer = Ticking([seconds * (1 + 0.001 * (number % 2)) for number in range(20)])
    time_until(
        cast("Timer", timer),
        min_laps=command.min_laps,
        min_s=command.min_s,
        enough_s=command.enough_s,
        narrow=command.narrow,
        least_laps=command.least_laps,
        on_lap=lambda _: None,
    )
    assert len(timer.laps) == num_laps


def test_an_evaluation_is_not_timed_again_once_there_is_enough(
    tiny_reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = workloads.get("imdb")
    workload = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    model = EncoderClassifier(width=16, num_heads=2, ffn_width=16, num_layers=1)
    run = apply(Strategy(micro_batch=4, accumulation=8), workload, backends.get("cpu"), model=model)
    calls: list[int] = []
    # a clock that evaluations alone move: on a busy machine the first may take so much longer that it is no timing
    monkeypatch.setattr("autotune.timing.time", types.SimpleNamespace(perf_counter=lambda: 0.02 * len(calls)))
    monkeypatch.setattr(Run, "evaluate", lambda *_: calls.append(1))
    timer = Timer(run)
    timer.evaluate(8, 0.0)
    assert len(calls) == 2, "two are timed however long they take"
    timer.evaluate(8, 0.0)
    assert len(calls) == 2
    timer.evaluate(4, 60.0)
    assert len(calls) == 2 + 4


@pytest.mark.parametrize("compiled", [0, 1])
def test_a_first_evaluation_that_takes_longer_by_its_nature_is_warm_up(
    tiny_reviews: Path, monkeypatch: pytest.MonkeyPatch, compiled: int
) -> None:
    module = workloads.get("imdb")
    workload = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    model = EncoderClassifier(width=16, num_heads=2, ffn_width=16, num_layers=1)
    run = apply(Strategy(micro_batch=32, padding="max"), workload, backends.get("cpu"), model=model)
    seconds = iter([0.3, 0.1, 0.1, 0.1] if not compiled else [0.1, 0.3, 0.1, 0.1])
    counts = iter([0, 0] * 4 if not compiled else [0, 0, 0, 1, 1, 1, 1, 1])
    monkeypatch.setattr(Run, "evaluate", lambda *_: time.sleep(next(seconds)))
    timer = Timer(run)
    timer.lap()
    monkeypatch.setattr("autotune.timing.num_compiled", lambda: next(counts))
    timer.evaluate(3, 0.0)
    assert len(timer._eval_laps) == 3, "one of them counts as warm-up"
    batch = len(timer._eval_plan) / workload.num_test
    assert timer.measurement().eval_samples_per_s * batch == pytest.approx(1 / 0.1, rel=0.15)


class Queue:
    """A device that takes 50 ms for a step and is asked for one in a millisecond; its clock is its own."""

    grad_norm = None
    loss_scale = None

    def __init__(self) -> None:
        self.now_s, self.num_queued = 0.0, 0
        self.widths: list[int] = []

    def __call__(self, batch: list[MicroBatch]) -> torch.Tensor:
        self.widths += [micro.inputs["ids_BT"].shape[1] for micro in batch]
        self.now_s += 0.001
        self.num_queued += 1
        return torch.tensor(1.0)

    def synchronize(self) -> None:
        self.now_s += 0.05 * self.num_queued
        self.num_queued = 0


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """In the place of an accelerator, which is not here."""
    queue, cpu = Queue(), backends.get("cpu")
    monkeypatch.setattr(cpu, "is_host_memory", False)
    monkeypatch.setattr(cpu, "synchronize", queue.synchronize)
    monkeypatch.setattr("autotune.timing.time", types.SimpleNamespace(perf_counter=lambda: queue.now_s))
    return queue


def queued(run: Run, queue: Queue) -> Run:
    return dataclasses.replace(run, step=cast(Step, queue))


def test_on_an_accelerator_a_lap_has_the_steps_that_it_trains_in_its_time(tiny_reviews: Path, queue: Queue) -> None:
    timer = Timer(queued(run_of(reviews(tiny_reviews)), queue))
    assert [timer.lap().num_steps for _ in range(4)][1:] == [2, 2, 2], "0.1 s at 50 ms, however soon they are asked for"


@pytest.mark.parametrize(
    ("knobs", "times"), [({}, 2), ({"compile": "reduce-overhead"}, 3)], ids=["planned", "recorded"]
)
def test_on_an_accelerator_every_shape_comes_up_in_the_first_lap(
    tiny_reviews: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, str], times: int
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    steps: list[int] = []
    run = queued(run_of(reviews(tiny_reviews), padding="buckets", **knobs), queue)
    Timer(run, on_opening=lambda: steps.append(len(queue.widths))).lap()
    full = {batch.widths[0] for batch in run.loader.plan(0) if batch.num_samples == 32}
    assert len(full) == 2
    assert steps == list(range(1, 1 + 1 + times * len(full)))
    assert all(queue.widths.count(width) >= times for width in full)
    assert all(width % 32 == 0 for width in full)
