"""Which batches are trained, recorded and replayed, on a scripted torch.cuda whose graphs run their step again: what a
card's own graphs do is tests/gpu/test_effects.py's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotune import backends
from autotune.apply import apply
from autotune.data.batching import MicroBatch
from autotune.errors import AutotuneError
from autotune.graphs import StepGraphs
from autotune.strategy import Precision, Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests.applied import reviews


class Card:
    """Notes what is trained; a step that is recorded runs when its graph is replayed."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, list[float], float]] = []
        self.recording: Card.Graph | None = None
        self.optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=1.0, capturable=True)

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
        yield
        self.recording = None

    def train(self, batch: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        loss, norm, rate = torch.zeros(()), torch.zeros(()), self.optimizer.param_groups[0]["lr"]
        assert isinstance(rate, Tensor)

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
    }
    for name, value in scripted.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return card


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


@pytest.fixture(scope="module")
def workload(tiny_reviews: Any) -> Workload:
    return reviews(tiny_reviews)


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda", "fp16")])
def test_where_no_step_can_be_recorded_it_is_refused(workload: Workload, device: str, precision: Precision) -> None:
    strategy = Strategy(micro_batch=32, precision=precision, graphs="step")
    with pytest.raises(AutotuneError, match="graphs=step needs a CUDA device, and another precision than fp16"):
        apply(strategy, workload, backends.get(device))


def test_an_optimizer_that_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = workload_of("other", lambda: (nn.Linear(2, 2), (torch.zeros(4, 2), torch.arange(4) % 2)))
    cpu = backends.get("cpu")
    monkeypatch.setattr(cpu, "graphs", ("none", "step"))
    with pytest.raises(AutotuneError, match="SGD cannot; set graphs to none"):
        apply(
            Strategy(micro_batch=4, graphs="step"),
            other,
            cpu,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
