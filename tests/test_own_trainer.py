"""Workloads that a trainer brings, or an optimizer of the user's own: with the real transformers and Lightning."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments, default_data_collator

from autotune import backends, workloads
from autotune.apply import apply
from autotune.errors import AutotuneError, UsageError
from autotune.search.space import build_space
from autotune.strategy import Strategy
from autotune.workloads.custom import workload_of
from autotune.workloads.own_trainer import on_host
from tests import factories, own_trainers
from tests.commands import briefly
from tests.own_trainers import apart, workload

# what the trainers and their parts say of each other and of this machine
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def test_of_a_trainer_the_batch_the_loss_and_the_optimizer_are_taken() -> None:
    found = workload("reviews")
    assert found.loop == "transformers"
    assert found.recipe.global_batch == 8  # four, two times
    run = apply(Strategy(micro_batch=2, accumulation=4), found, backends.get("cpu"))
    assert isinstance(run.optimizer, torch.optim.SGD)
    assert run.scheduler is None
    plain = apply(Strategy(micro_batch=8), found, backends.get("cpu"))
    batch = default_data_collator([own_trainers.Reviews()[index] for index in range(8)])
    assert torch.allclose(run.step(run.split(batch)), plain.step(plain.split(batch)), atol=1e-5)
    assert apart(run.model, plain.model) < 1e-5
    assert set(run.model.state_dict()) == set(own_trainers.classifier().state_dict())


def test_a_trainer_counts_tokens_over_the_whole_batch_so_that_parts_train_the_same() -> None:
    assert "not the mean" in (workload("tokens_without_trainer").split_refusal or "")
    found = workload("tokens")
    assert found.split_refusal is None


def test_what_is_searched_knows_nothing_of_the_device_and_leaves_nothing() -> None:
    trainer = own_trainers.reviewing(bf16=True)
    before = torch.get_rng_state()
    found = workload_of("mine", lambda: own_trainers.reviewing(bf16=True))
    assert torch.equal(before, torch.get_rng_state())
    assert trainer.accelerator.mixed_precision == "bf16"
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # as in a process that has no other
    assert "ACCELERATE_USE_CPU" not in os.environ
    run = apply(Strategy(micro_batch=8), found, backends.get("cpu"))
    batch = default_data_collator([own_trainers.Reviews()[index] for index in range(8)])
    assert 0 < float(run.step(run.split(batch))) < 2
    with on_host():
        arguments = TrainingArguments(output_dir="unused", bf16=True, fp16=False, torch_compile=True)
    assert arguments.use_cpu
    assert not arguments.bf16
    assert not arguments.torch_compile
    assert TrainingArguments(output_dir="unused", bf16=True, use_cpu=True).bf16


def test_nothing_is_kept_of_a_run_that_is_gone() -> None:
    found = workload("reviews")
    run = apply(Strategy(micro_batch=8), found, backends.get("cpu"))
    model = weakref.ref(run.model)
    del run
    gc.collect()
    assert model() is None


def test_of_a_lightning_module_training_step_is_the_loss() -> None:
    found = workload("module")
    assert found.loop == "lightning"
    assert found.recipe.global_batch == 8
    assert found.split_refusal is None
    run = apply(Strategy(micro_batch=4, accumulation=2, attention="sdpa"), found, backends.get("cpu"))
    assert isinstance(run.optimizer, torch.optim.SGD)
    assert run.optimizer.defaults["momentum"] == 0.9
    ids, classes = next(iter(DataLoader(own_trainers.sequences(), batch_size=8)))
    expected = nn.functional.cross_entropy(own_trainers.Module()(ids), classes)
    assert torch.allclose(run.step(run.split((ids, classes))), expected.detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("made", "size"),
    [
        (lambda: (own_trainers.WithOwnLoader(), own_trainers.Data()), 8),
        (own_trainers.WithOwnLoader, 4),
    ],
)
def test_a_lightning_module_s_batches_come_from_a_data_module_or_from_itself(made: Any, size: int) -> None:
    found = workload_of("mine", made)
    assert found.recipe.global_batch == size
    assert found.split_refusal is None
    run = apply(Strategy(micro_batch=size, attention="sdpa"), found, backends.get("cpu"))
    batch = default_data_collator([own_trainers.Reviews()[index] for index in range(size)])
    assert 0 < float(run.step(run.split(batch))) < 2


@pytest.mark.parametrize(
    ("example", "loop"),
    [
        ("transformers_trainer", "transformers"),
        ("lightning_module", "lightning"),
        ("my_train", "own"),
        ("my_images", "loader"),
    ],
)
def test_the_examples_are_workloads(example: str, loop: str) -> None:
    file = Path(__file__).parents[1] / "examples" / f"{example}.py"
    module = workloads.get(f"{file}:workload")
    found = module.open_workload(module.prepare(None, limit=64, on_progress=lambda _: None))
    assert found.loop == loop
    assert found.recipe.global_batch == 32


def test_what_a_metric_counts_is_no_part_of_the_training() -> None:
    assert workload_of("mine", lambda: (own_trainers.Counting(), own_trainers.module()[1])).split_refusal is None


def test_a_lightning_module_may_be_given_another_optimizer_or_loss() -> None:
    cpu, loader = backends.get("cpu"), own_trainers.module()[1]
    rates = lambda parameters: torch.optim.Adagrad(parameters, lr=0.01)  # noqa: E731
    found = workload_of("mine", lambda: (own_trainers.AsksItsTrainer(), loader, None, rates))
    assert found.loop == "lightning"
    assert isinstance(apply(Strategy(micro_batch=8, attention="sdpa"), found, cpu).optimizer, torch.optim.Adagrad)
    found = workload_of("mine", lambda: (own_trainers.ByHand(), loader, nn.functional.cross_entropy))
    assert found.loop == "loader"
    assert isinstance(apply(Strategy(micro_batch=8, attention="sdpa"), found, cpu).optimizer, torch.optim.AdamW)


def test_an_optimizer_of_ones_own_is_searched_with() -> None:
    found, cpu = workload("with_sgd"), backends.get("cpu")
    run = apply(Strategy(micro_batch=4, accumulation=2, optimizer="foreach"), found, cpu)
    assert isinstance(run.optimizer, torch.optim.SGD)
    assert run.optimizer.param_groups[0]["foreach"]
    with pytest.raises(UsageError, match="brings its own optimizer: set learning_rate there"):
        found.with_recipe(type(found.recipe)(**{**_fields(found.recipe), "learning_rate": 1.0}))
    hardware = factories.hardware()
    space = build_space(hardware, cpu, workload("with_rprop"))
    assert "fused" not in space.values["optimizer"]
    assert space.left_out["optimizer=fused"] == "Rprop has no such choice"


def test_an_optimizer_that_knows_its_model_is_made_for_each() -> None:
    found, cpu = workload("with_groups"), backends.get("cpu")
    run = apply(Strategy(micro_batch=8), found, cpu)
    before = run.model[2].weight.detach().clone()  # type: ignore[index]
    batch = own_trainers.with_sgd()[1]
    run.step(run.split(batch))
    assert not torch.equal(before, run.model[2].weight)  # type: ignore[index]
    with pytest.raises(AutotuneError, match="SGD holds parameters that are not this model's"):
        apply(Strategy(micro_batch=8), found, cpu, model=own_trainers.with_sgd()[0])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            lambda: (own_trainers.TwoOptimizers(), own_trainers.module()[1]),
            "2 optimizers; autotune with one",
        ),
        (lambda: (own_trainers.ByHand(), own_trainers.module()[1]), "an optimization of its own"),
        (lambda: (own_trainers.AsksItsTrainer(), own_trainers.module()[1]), "fails without a Trainer"),
        (
            lambda: (own_trainers.Module(), own_trainers.sequences()),
            "is a dataset; give a DataLoader of it",
        ),
        (lambda: torch.compile(own_trainers.Module()), "compiled already"),
        (lambda: (*own_trainers.with_sgd()[:2], torch.optim.SGD([torch.ones(1)])), "for a loss; it should be called"),
        (lambda: own_trainers.trainer_of_sgd(), "an optimizer that is made; give optimizer_cls_and_kwargs"),
        (lambda: (*own_trainers.with_sgd()[:3], torch.optim.SGD([torch.ones(1)])), "it should make one: lambda"),
    ],
)
def test_a_training_that_autotune_does_not_do_is_refused(made: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _ = workload_of("mine", made).own_optimizer


@pytest.mark.usefixtures("probed")
def test_a_search_for_a_lightning_module(tmp_path: Path) -> None:
    found = briefly("search", "--model", "tests.own_trainers:module", "--trials", "2", "--profiles", tmp_path)
    assert found.returncode == 0, found.stderr
    assert 'trainer = lightning.Trainer(..., **tuned.arguments("lightning"))' in found.stdout


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}
