"""What a recorded step trains, on recordings without a card (tests/taped.py): the same as a launched one."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch

from autotune import backends
from autotune.apply import Run, apply
from autotune.backends.base import Backend
from autotune.graphs import unrecorded_optimizer
from autotune.strategy import Graphs, Optimizer, Strategy
from tests import own_datasets
from tests.own_datasets import losses, run_of
from tests.taped import Tape

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Backend:
    Tape().set_up(monkeypatch.setattr)
    found = backends.get("cpu")
    monkeypatch.setattr(found, "graphs", ("none", "step"))
    return found


@pytest.mark.parametrize("name", ["pictures", "texts", "lines", "of_a_trainer", "of_a_trainer_of_tokens"])
def test_a_users_data_and_models_train_the_same(name: str, cpu: Backend) -> None:
    workload = own_datasets.workload(name)
    launched, recorded = (run_of(workload, graphs=graphs) for graphs in ("none", "step"))
    assert losses(recorded) == pytest.approx(losses(launched), rel=1e-4)
    assert recorded.step.graphs is not None
    assert recorded.step.graphs.num_recorded > 0


def test_an_evaluation_that_waits_unless_it_is_recorded_is(cpu: Backend) -> None:
    """transformers' models look whether a mask hides anything."""
    workload = own_datasets.workload("of_a_trainer")
    launched, recorded = (run_of(workload, graphs=graphs) for graphs in ("none", "step"))
    losses(launched), losses(recorded)
    assert recorded.evaluate() == pytest.approx(launched.evaluate(), rel=1e-4, nan_ok=True)
    assert recorded.evaluation.launched_because == ""
    assert recorded.evaluation.num_recorded == 1


def parts(run: Run) -> list[Any]:
    return [run.model, run.optimizer, run.scheduler]


@pytest.mark.parametrize("chosen", ["default", "foreach", "fused"])
def test_what_a_plain_run_saved_is_gone_on_with_as_the_setting_says(chosen: Optimizer, cpu: Backend) -> None:
    workload = own_datasets.workload("pictures")
    plain = run_of(workload)
    losses(plain)
    saved = copy.deepcopy([part.state_dict() for part in parts(plain)])

    def going_on(**knobs: Any) -> Run:
        run = run_of(workload, **knobs)
        for part, state in zip(parts(run), copy.deepcopy(saved), strict=True):
            part.load_state_dict(state)
        return run

    recorded = going_on(graphs="step", optimizer=chosen)
    assert losses(recorded) == pytest.approx(losses(going_on()), rel=1e-4)
    for group in recorded.optimizer.param_groups:
        assert group["capturable"]
        assert bool(group["fused"]) == (chosen == "fused")
        assert bool(group["foreach"]) == (chosen == "foreach")


def optimizers() -> list[Any]:
    kinds = [kind for kind in vars(torch.optim).values() if inspect.isclass(kind) and kind is not torch.optim.Optimizer]
    return [kind for kind in kinds if kind is torch.optim.SGD or "capturable" in inspect.signature(kind).parameters]


@pytest.mark.parametrize("chosen", ["default", "foreach", "fused"])
def test_sgd_is_recorded_whichever_update_is_chosen(chosen: Optimizer, cpu: Backend) -> None:
    workload = own_datasets.workload("of_a_trainer")
    launched, recorded = (run_of(workload, graphs=graphs, optimizer=chosen) for graphs in ("none", "step"))
    assert losses(recorded) == pytest.approx(losses(launched), rel=1e-4)


def test_another_kind_of_sgd_is_not_recorded() -> None:
    class Signs(torch.optim.SGD):
        """With a step of its own, as it might have."""

    found = unrecorded_optimizer(Signs(torch.nn.Linear(1, 1).parameters(), lr=0.1))
    assert found is not None
    assert "Signs" in found


@pytest.mark.parametrize("kind", optimizers())
def test_every_optimizer_that_is_recorded_has_the_rate_of_its_step(kind: Any, cpu: Backend) -> None:
    def trained(graphs: Graphs) -> list[float]:
        torch.manual_seed(0)
        run = apply(
            Strategy(micro_batch=4, graphs=graphs),
            own_datasets.workload("pictures"),
            cpu,
            optimizer=lambda parameters: kind(parameters, lr=0.1, foreach=True),  # as a card chooses
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
        found = []
        for batch in itertools.chain(run.loader, run.loader):
            found.append(float(run.step(batch)))
            schedule.step()
        return found

    assert trained("step") == pytest.approx(trained("none"), rel=1e-3)
