"""A user's own model, data and trainer on a card: the same is trained. Needs a CUDA device: ``pytest -m gpu``."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests import own_datasets, own_trainers
from tests.marks import on_a_card
from tests.own_datasets import losses, run_of
from tests.own_trainers import apart, tuned

pytestmark = [
    *on_a_card,
    pytest.mark.filterwarnings("default"),  # what the trainers, their parts and the compiler say of themselves
]


NAMES = ["pictures", "texts", "texts_of_one_width", "of_a_trainer"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("knobs", [{}, {"accumulation": 2, "workers": 2}, {"precision": "bf16"}], ids=str)
def test_own_data_train_as_on_the_cpu(name: str, knobs: dict[str, Any]) -> None:
    workload = own_datasets.workload(name)
    tolerance = 3e-2 if "precision" in knobs else 1e-3
    plain, ours = (losses(run) for run in (run_of(workload), run_of(workload, "cuda", **knobs)))
    assert ours == pytest.approx(plain, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("knobs", [{}, {"compile": "default", "optimizer": "fused"}, {"precision": "bf16"}], ids=str)
def test_own_data_are_trained_on_by_recorded_steps_as_by_launched_ones(name: str, knobs: dict[str, Any]) -> None:
    workload = own_datasets.workload(name)
    tolerance = 1e-2 if "precision" in knobs else 1e-3
    launched, recorded = (run_of(workload, "cuda", graphs=graphs, **knobs) for graphs in ("none", "step"))
    assert losses(recorded) == pytest.approx(losses(launched), rel=tolerance, abs=tolerance)
    assert recorded.step.graphs is not None
    assert recorded.step.graphs.num_recorded > 0


def test_an_evaluation_that_waits_unless_it_is_recorded_is() -> None:
    """transformers' models look whether a mask hides anything."""
    workload = own_datasets.workload("of_a_trainer")
    launched, recorded = (run_of(workload, "cuda", graphs=graphs) for graphs in ("none", "step"))
    for run in (launched, recorded):
        losses(run)
    assert recorded.evaluate() == pytest.approx(launched.evaluate(), rel=1e-3, nan_ok=True)
    assert recorded.evaluation.launched_because == ""
    assert recorded.evaluation.num_recorded > 0


@pytest.mark.parametrize("knobs", [{}, {"checkpoint": "every_block"}, {"compile": "default"}], ids=str)
def test_transformers_train_the_same_with_a_strategy(knobs: dict[str, Any]) -> None:
    plain = own_trainers.reviewing(use_cpu=False)
    plain.train()
    ours = tuned("reviews", backend="cuda", micro_batch=2, accumulation=4, **knobs)
    other = ours.prepare(own_trainers.reviewing(**{**ours.arguments("transformers"), "use_cpu": False, "optim": "sgd"}))
    other.train()
    assert next(other.model.parameters()).device.type == "cuda"
    assert apart(plain.model.cpu(), own_trainers.classifier()) > 1e-2
    assert apart(plain.model, other.model.cpu()) < 1e-3


@pytest.mark.parametrize("knobs", [{}, {"checkpoint": "every_block"}, {"compile": "default"}], ids=str)
def test_lightning_trains_the_same_with_a_strategy(knobs: dict[str, Any]) -> None:
    def trained(module: Any, batch_size: int, **options: Any) -> Any:
        loader = DataLoader(own_trainers.sequences(), batch_size=batch_size)
        own_trainers.fit(module, loader, **{"accelerator": "gpu", **options})
        return module.cpu()

    ours = tuned("module", backend="cuda", micro_batch=2, accumulation=4, **knobs)
    plain = trained(own_trainers.Module(), 8)
    other = trained(ours.prepare(own_trainers.Module()), 2, **ours.arguments("lightning"))
    assert apart(plain, own_trainers.Module()) > 1e-2
    assert apart(plain, other) < 1e-3
