"""Which batches are trained, recorded and replayed, on a scripted torch.cuda whose graphs run their step again: what a
card's own graphs do is tests/gpu/test_effects.py's.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autotune import backends
from autotune.apply import apply
from autotune.backends.base import Backend
from autotune.data.batching import MicroBatch
from autotune.errors import AutotuneError
from autotune.graphs import Graphs, StepGraphs, _Recorded
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests.applied import reviews, small_model


class Card:
    """Notes what is trained; a step that is recorded runs when its graph is replayed."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, list[float], float]] = []
        self.recording: Card.Graph | None = None
        self.streams: list[object] = []
        """Made current by hand."""
        self.sync_debug_mode: str | int = 0
        self.also: Callable[[], object] = lambda: None
        """What a step does besides."""
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=1.0, capturable=True)

    class Graph:
        """A step to come."""

        run: Callable[[], None]

        def replay(self) -> None:
            self.run()

    class Stream:
        """The only one."""

        device = torch.device("cpu")

        def wait_stream(self, other: object) -> None:
            """Nothing is ever under way."""

    @contextlib.contextmanager
    def record(self, graph: Graph, **_: object) -> Iterator[None]:
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None

    def train(self, batch: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        loss, norm, rate = torch.zeros(()), torch.zeros(()), self.optimizer.param_groups[0]["lr"]
        assert isinstance(rate, Tensor)
        self.also()

        def run(how: str) -> None:
            values = batch[0].inputs["x"].tolist()
            self.trained.append((how, values, float(rate)))
            loss.copy_(batch[0].targets.sum())
            norm.fill_(len(values))

        if self.recording is None:
            run("launched")
        else:
            self.recording.run = lambda: run("replayed")
        return loss, norm


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    scripted: dict[str, Any] = {
        "Stream": Card.Stream,
        "CUDAGraph": Card.Graph,
        "graph": card.record,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": Card.Stream,
        "graph_pool_handle": object,
        "set_stream": lambda stream: card.streams.append(stream),
        "synchronize": lambda: None,
        "get_sync_debug_mode": lambda: card.sync_debug_mode,
        "set_sync_debug_mode": lambda mode: setattr(card, "sync_debug_mode", mode),
    }
    for name, value in scripted.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return card


@pytest.fixture
def cpu(card: Card, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """On which steps may be recorded, by the scripted card."""
    found = backends.get("cpu")
    monkeypatch.setattr(found, "graphs", ("none", "step"))
    return found


def batch(*values: float) -> list[MicroBatch]:
    tensor = torch.tensor(values)
    return [MicroBatch({"x": tensor}, tensor, len(values), len(values))]


def test_every_batch_is_trained_once_whatever_its_shape(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    losses = [float(step(one)[0]) for one in (batch(1, 2), batch(3, 4), batch(5), batch(6, 7), batch(8))]
    assert [(how, values) for how, values, _ in card.trained] == [
        ("launched", [1, 2]),
        ("replayed", [3, 4]),
        ("launched", [5]),
        ("replayed", [6, 7]),
        ("replayed", [8]),
    ]
    assert losses == [3, 7, 5, 13, 8]
    assert step.num_recorded == 2


def test_results_are_the_callers_to_keep_and_batches_are_left_alone(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    batches = [batch(1, 2), batch(3, 4), batch(5, 6)]
    kept = [step(one) for one in batches]
    assert [float(loss) for loss, _ in kept] == [3, 7, 11]
    assert [float(norm) for _, norm in kept if norm is not None] == [2, 2, 2]
    assert [one[0].inputs["x"].tolist() for one in batches] == [[1, 2], [3, 4], [5, 6]]


def test_a_replay_has_the_learning_rate_of_its_own_step_and_people_see_numbers(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    for rate in (0.5, 0.25, 0.125, 0.125):
        card.optimizer.param_groups[0]["lr"] = rate
        step(batch(1, 2))
        assert card.optimizer.param_groups[0]["lr"] == rate
    assert [rate for _, _, rate in card.trained] == [0.5, 0.25, 0.125, 0.125]


def test_what_is_no_tensor_belongs_to_the_shape(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    for causal in (True, True, False):
        (micro,) = batch(1, 2)
        step([micro._replace(inputs={**micro.inputs, "causal": causal})])
    assert [how for how, *_ in card.trained] == ["launched", "replayed", "launched"]


def test_a_loaded_state_has_every_shape_recorded_anew(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    for _ in range(2):
        step(batch(1, 2))
    card.optimizer.load_state_dict(card.optimizer.state_dict())
    assert step.num_recorded == 0
    step(batch(1, 2))
    assert [how for how, *_ in card.trained] == ["launched", "replayed", "launched"]


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), random.random, lambda: np.random.rand()])
def test_a_model_that_draws_numbers_on_the_host_is_refused(card: Card, draw: Callable[[], object]) -> None:
    card.also = draw
    with pytest.raises(AutotuneError, match=r"random numbers on the host.*set graphs to none"):
        StepGraphs(card.train, card.optimizer)(batch(1, 2))


def test_an_option_that_a_schedule_changes_is_refused(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    step(batch(1, 2))
    card.optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    with pytest.raises(AutotuneError, match="an option of the optimizer beside its rate"):
        step(batch(1, 2))


def test_a_schedule_of_ones_own_may_be_made_before_the_first_step(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(card.optimizer, lambda step: 0.5**step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scripted card's steps are not the optimizer's
        for _ in range(3):
            step(batch(1, 2))
            schedule.step()
    assert [rate for _, _, rate in card.trained] == [1.0, 0.5, 0.25]


def test_hooks_of_the_optimizer_are_not_left_out_silently(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    step(batch(1, 2))
    card.optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(AutotuneError, match="hooks would not be called"):
        step(batch(1, 2))


def test_what_cannot_be_recorded_says_why_and_leaves_nothing_half_done(card: Card) -> None:
    """The error that ends the recording hides the first one, and leaves the recording's stream behind."""
    step = StepGraphs(card.train, card.optimizer)
    step(batch(1, 2))
    (weight, *_) = card.optimizer.param_groups[0]["params"]
    weight.grad = torch.ones_like(weight)

    def fail() -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("capture_end")

    card.also = fail
    with pytest.raises(AutotuneError, match=r"cannot be recorded \(operation not permitted when stream is capturing\)"):
        step(batch(1, 2))
    assert weight.grad is None
    assert len(card.streams) == 1
    assert isinstance(card.optimizer.param_groups[0]["lr"], float)


def beside(card: Card) -> tuple[Graphs[Tensor], list[str]]:
    """Something else that is done with batches, and how it was done."""
    done: list[str] = []

    def work(batch: Sequence[MicroBatch]) -> Tensor:
        card.also()
        result = torch.zeros(())

        def run(how: str) -> None:
            done.append(how)
            result.copy_(batch[0].inputs["x"].sum())

        if card.recording is None:
            run("launched")
        else:
            card.recording.run = lambda: run("replayed")
        return result

    return StepGraphs(card.train, card.optimizer).beside(work), done


def test_what_is_done_beside_steps_is_recorded_and_forgotten_with_them(card: Card) -> None:
    graphs, done = beside(card)
    found = [float(graphs(one)) for one in (batch(1, 2), batch(3, 4), batch(5), batch(6, 7), batch(8))]
    assert found == [3, 7, 5, 13, 8]
    assert done == ["launched", "replayed", "launched", "replayed", "replayed"]
    card.optimizer.load_state_dict(card.optimizer.state_dict())
    assert len(graphs.recorded) == 0


def test_whether_something_can_be_recorded_is_asked_before_a_recording_fails(card: Card) -> None:
    def wait() -> None:
        if card.sync_debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")

    for also, words in ((wait, "called a synchronizing CUDA operation"), (lambda: torch.rand(1), "random numbers")):
        graphs, done = beside(card)
        card.also = also
        result, reason = graphs.tried(batch(1, 2))
        assert float(result) == 3
        assert words in reason
        assert "\n" not in reason
        assert card.sync_debug_mode == 0, "as before"
        assert set(done) == {"launched"}
    card.also = lambda: None
    graphs, done = beside(card)
    assert graphs.tried(batch(1, 2))[1] == ""
    assert float(graphs(batch(3, 4))) == 7
    assert done == ["launched", "replayed"], "which counts as the shape's first"


def test_memory_that_runs_out_in_a_recording_is_out_of_memory(card: Card) -> None:
    step = StepGraphs(card.train, card.optimizer)
    step(batch(1, 2))

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    card.also = fail
    with pytest.raises(torch.OutOfMemoryError):
        step(batch(1, 2))


@pytest.fixture(scope="module")
def workload(tiny_reviews: Path) -> Workload:
    return reviews(tiny_reviews)


@pytest.mark.parametrize(
    ("device", "changes", "reason"),
    [
        ("cpu", {}, "needs a CUDA device, and this one is cpu"),
        ("cuda", {"precision": "fp16"}, "fp16's loss scaler"),
        ("cuda", {"compile": "reduce-overhead"}, "graphs of its own"),
        ("cuda", {"checkpoint": "selective"}, "sets back the random numbers"),
        ("cuda", {"micro_batch": 8, "accumulation": 4, "padding": "longest"}, "every mix of widths"),
    ],
)
def test_where_no_step_can_be_recorded_it_is_refused(
    workload: Workload, device: str, changes: dict[str, Any], reason: str
) -> None:
    strategy = msgspec.structs.replace(Strategy(micro_batch=32, graphs="step"), **changes)
    with pytest.raises(AutotuneError, match=f"graphs=step: .*{reason}.*; set graphs to none"):
        apply(strategy, workload, backends.get(device))


def test_a_schedule_that_changes_more_than_the_rate_is_refused(workload: Workload) -> None:
    other = workload.with_recipe(msgspec.structs.replace(workload.recipe, schedule="onecycle"))
    with pytest.raises(AutotuneError, match="changes more than the rate"):
        apply(Strategy(micro_batch=32, graphs="step"), other, backends.get("cuda"))


def test_steps_go_to_the_graphs_unless_phases_are_asked_for(
    card: Card, cpu: Backend, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = apply(Strategy(micro_batch=32, graphs="step"), workload, cpu, model=small_model())
    assert run.optimizer.param_groups[0]["capturable"]
    assert run.step.graphs is not None
    monkeypatch.setattr(run.step.graphs, "_train", card.train)
    card.optimizer, run.step.scheduler = run.optimizer, None
    (one,) = batch(1, 2)
    run.step([one])
    assert [how for how, *_ in card.trained] == ["launched"]
    run.optimizer.param_groups[0]["capturable"] = False  # on a CPU it could not be
    run.step.on_phase = lambda phase: None
    run.step(next(iter(run.loader)))
    assert len(card.trained) == 1


def test_evaluation_is_recorded_where_steps_are_and_anew_where_weights_are_elsewhere(
    card: Card, cpu: Backend, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = apply(Strategy(micro_batch=4, accumulation=8, graphs="step"), workload, cpu, model=small_model())
    launched = apply(Strategy(micro_batch=4, accumulation=8), workload, cpu, model=small_model())
    graphs: list[list[MicroBatch]] = []

    def record(batch: list[MicroBatch]) -> Any:
        """A graph, of which a replay is launched after all."""
        graph = Card.Graph()
        results = [torch.zeros(()), torch.zeros(())]

        def replay() -> None:
            for result, found in zip(results, run.evaluation._launched(batch), strict=True):
                result.copy_(found)

        graph.run = replay
        graphs.append(batch)
        return _Recorded(graph, batch, (results[0], results[1]))  # type: ignore[arg-type]

    assert run.evaluation._graphs is not None
    monkeypatch.setattr(run.evaluation._graphs, "_record", record)
    for _ in range(2):
        assert run.evaluate() == pytest.approx(launched.evaluate())
    assert run.evaluation.num_recorded > 0
    num_graphs = len(graphs)
    launched.model.load_state_dict({name: 2 * value for name, value in launched.model.state_dict().items()})
    run.model.load_state_dict({name: 2 * value for name, value in run.model.state_dict().items()}, assign=True)
    assert run.evaluate() == pytest.approx(launched.evaluate())
    assert run.evaluate() == pytest.approx(launched.evaluate())
    assert len(graphs) > num_graphs
    assert run.evaluation.launched_because == ""


def test_an_evaluation_that_waits_is_launched_and_says_why(
    card: Card, cpu: Backend, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = apply(Strategy(micro_batch=4, accumulation=8, graphs="step"), workload, cpu, model=small_model())
    forward = run.step.forward_only

    def wait(micro: MicroBatch) -> tuple[Tensor, MicroBatch]:
        if card.sync_debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return forward(micro)

    monkeypatch.setattr(run.step, "forward_only", wait)
    expected = apply(Strategy(micro_batch=4, accumulation=8), workload, cpu, model=small_model()).evaluate()
    assert [run.evaluate() for _ in range(2)] == [pytest.approx(expected)] * 2
    assert run.evaluation.num_recorded == 0
    assert run.evaluation.launched_because == "called a synchronizing CUDA operation"


def test_an_optimizer_that_cannot_be_recorded_is_refused(cpu: Backend) -> None:
    other = workload_of("other", lambda: (nn.Linear(2, 2), (torch.zeros(4, 2), torch.arange(4) % 2)))
    strategy = Strategy(micro_batch=4, graphs="step")
    with pytest.raises(AutotuneError, match="Adagrad cannot; set graphs to none"):
        apply(strategy, other, cpu, optimizer=lambda parameters: torch.optim.Adagrad(parameters, lr=0.1))
    apply(strategy, other, cpu, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
