"""Trainings that have a loop of their own: with the real transformers, Lightning and Accelerate, on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from transformers import TrainingArguments, default_data_collator

from autotune import backends
from autotune.api import Tuned
from autotune.apply import apply
from autotune.errors import AutotuneError, UsageError
from autotune.search.space import build_space
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests import factories, own_trainers
from tests.commands import briefly

# what the trainers and their parts say of each other and of this machine
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def tuned(name: str, **knobs: Any) -> Tuned:
    return Tuned(
        name=f"tests.own_trainers:{name}",
        strategy=Strategy(**{"micro_batch": 8, "attention": "sdpa", **knobs}),
        profile=None,
        path=None,
        backend=backends.get("cpu"),
    )


def workload(name: str) -> Workload:
    return tuned(name).workload


def apart(first: nn.Module, second: nn.Module) -> float:
    """The largest distance of two models' parameters."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


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
    assert workload("tokens").split_refusal is None


@pytest.mark.parametrize("padding", ["max", "longest"])
@pytest.mark.parametrize(
    ("name", "model", "data"),
    [("reviews", own_trainers.classifier, own_trainers.Reviews), ("tokens", own_trainers.decoder, own_trainers.Tokens)],
)
def test_transformers_trains_the_same_with_a_strategy(name: str, model: Any, data: Any, padding: str) -> None:
    plain = own_trainers.trainer_of(model(), data())
    plain.train()
    ours = tuned(name, micro_batch=2, accumulation=4, checkpoint="every_block", padding=padding)
    arguments = {**ours.arguments("transformers"), "optim": "sgd"}
    other = ours.prepare(own_trainers.trainer_of(model(), data(), **arguments))
    other.train()
    assert other.model.config._attn_implementation == "sdpa"
    assert apart(plain.model, model()) > 1e-2  # it trained
    assert apart(plain.model, other.model) < 1e-4


def test_a_trainer_that_is_told_otherwise_is_warned_of() -> None:
    ours = tuned("reviews", micro_batch=2, accumulation=4)
    trainer = own_trainers.trainer_of(own_trainers.classifier(), own_trainers.Reviews(), gradient_checkpointing=True)
    with pytest.warns(UserWarning, match="not the Trainer's") as caught:
        ours.prepare(trainer)
    words = str(caught[-1].message)
    assert "per_device_train_batch_size is 2, and 8 with the Trainer" in words
    assert "gradient_checkpointing is turned off" in words
    assert not trainer.args.gradient_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.prepare(
            own_trainers.trainer_of(
                own_trainers.classifier(), own_trainers.Reviews(), **{**ours.arguments("transformers"), "optim": "sgd"}
            )
        )


def test_transformers_batches_are_of_similar_length_in_buckets() -> None:
    data = own_trainers.Reviews()
    ours = tuned("reviews", micro_batch=4, accumulation=2, padding="buckets", workers=1)
    arguments = ours.arguments("transformers")
    trainer = ours.prepare(own_trainers.trainer_of(own_trainers.classifier(), data, num_train_epochs=2, **arguments))
    loader = trainer.get_train_dataloader()
    widths = [[batch["input_ids"].shape[1] for batch in loader] for _ in range(2)]
    assert {8, 16} <= {*widths[0], *widths[1]} < {8, 16, 24}
    assert widths[0] != widths[1]
    trainer.train()
    assert trainer.state.global_step == 4


def test_without_us_transformers_trains_a_classifier_otherwise_when_it_accumulates() -> None:
    """Should this fail, its models divide their losses themselves, and ``mend_accumulation`` can go."""
    plain = own_trainers.trainer_of(own_trainers.classifier(), own_trainers.Reviews())
    plain.train()
    parts = own_trainers.trainer_of(
        own_trainers.classifier(),
        own_trainers.Reviews(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    parts.train()
    assert apart(plain.model, parts.model) > 1e-2


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
    batch = {"batch_0": ids, "batch_1": classes}
    assert torch.allclose(run.step(run.split(batch)), expected.detach(), atol=1e-5)


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


def test_lightning_trains_the_same_with_a_strategy() -> None:
    plain, ours = own_trainers.Module(), tuned("module", micro_batch=2, accumulation=4, checkpoint="every_block")
    own_trainers.fit(plain, DataLoader(own_trainers.sequences(), batch_size=8))
    other = ours.prepare(own_trainers.Module())
    own_trainers.fit(other, DataLoader(own_trainers.sequences(), batch_size=2), **ours.arguments("lightning"))
    assert apart(plain, own_trainers.Module()) > 1e-2
    assert apart(plain, other) < 1e-4


@pytest.mark.xdist_group("compiler")
def test_lightning_s_step_is_compiled_where_the_model_is() -> None:
    plain, ours = own_trainers.Module(), tuned("module", compile="default")
    loader = DataLoader(own_trainers.sequences(), batch_size=8)
    own_trainers.fit(plain, loader)
    other = ours.prepare(own_trainers.Module())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    own_trainers.fit(other, loader, **ours.arguments("lightning"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert apart(plain, other) < 1e-3


def test_accelerate_trains_the_same_with_a_strategy() -> None:
    def trained(ours: Tuned, batch_size: int) -> nn.Module:
        accelerator = accelerate.Accelerator(**ours.arguments("accelerate"))
        module = ours.prepare(own_trainers.Module())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loader = DataLoader(own_trainers.sequences(), batch_size=batch_size)
        module, optimizer, loader = accelerator.prepare(module, optimizer, loader)
        for ids, classes in loader:
            with accelerator.accumulate(module):
                accelerator.backward(nn.functional.cross_entropy(module(ids), classes))
                optimizer.step()
                optimizer.zero_grad()
        return accelerator.unwrap_model(module)  # type: ignore[no-any-return]

    plain = trained(tuned("module"), 8)
    assert apart(plain, trained(tuned("module", micro_batch=2, accumulation=4), 2)) < 1e-4


@pytest.mark.parametrize(
    ("precision", "arguments", "lightning", "mixed"),
    [
        ("fp32", (False, False), "32-true", "no"),
        ("tf32", (False, False), "32-true", "no"),
        ("bf16", (True, False), "bf16-mixed", "bf16"),
        ("fp16", (False, True), "16-mixed", "fp16"),
        ("fp8", (True, False), "bf16-mixed", "bf16"),
        ("bf16_weights", (False, False), "bf16-true", "no"),
    ],
)
def test_precision_in_the_words_of_each(precision: Any, arguments: Any, lightning: str, mixed: str) -> None:
    ours = tuned("reviews", precision=precision)
    found = ours.arguments("transformers")
    assert (found["bf16"], found["fp16"]) == arguments
    assert ours.arguments("lightning")["precision"] == lightning
    assert ours.arguments("accelerate")["mixed_precision"] == mixed


def test_transformers_takes_all_that_it_is_told() -> None:
    ours = tuned("reviews", micro_batch=2, accumulation=4, padding="buckets", workers=2, prefetch=4, optimizer="fused")
    found = TrainingArguments(output_dir="unused", **ours.arguments("transformers"))
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (2, 4)
    assert (found.dataloader_num_workers, found.dataloader_prefetch_factor) == (2, 4)
    assert found.optim == "adamw_torch_fused"
    assert found.device.type == "cpu"


def test_an_optimizer_is_told_how_to_update() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    assert torch.optim.AdamW(parameters, **tuned("module", optimizer="fused").arguments("optimizer")).defaults["fused"]
    assert torch.optim.AdamW(parameters, **tuned("module").arguments("optimizer")).defaults["fused"] is None


@pytest.mark.parametrize(("knob", "value"), [("graphs", "step"), ("padding", "packed")])
def test_what_a_trainer_cannot_have_is_said(knob: str, value: str) -> None:
    with pytest.warns(UserWarning, match=f"{knob}={value} is for run.step only.*--without {knob}={value}"):
        tuned("reviews", **{knob: value}).arguments("transformers")


def test_others_arguments_are_not_known() -> None:
    with pytest.raises(UsageError, match="there are those of transformers, lightning, accelerate, optimizer"):
        tuned("reviews").arguments("keras")  # type: ignore[arg-type]


def test_a_pinned_kernel_stays_pinned_until_the_next_model_is_prepared() -> None:
    tuned("module", attention="sdpa_math").prepare(own_trainers.Module())
    assert torch.backends.cuda.math_sdp_enabled()  # type: ignore[no-untyped-call]
    assert not torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    tuned("module", attention="sdpa").prepare(own_trainers.Module())
    assert torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_micro_batches_of_similar_length(workers: int) -> None:
    data = own_trainers.Reviews()
    ours = tuned("reviews", micro_batch=4, accumulation=2, padding="buckets", workers=workers)
    loader = ours.loader(data, lengths=data.lengths.tolist(), collate_fn=default_data_collator)
    first, second = ([batch["input_ids"] for batch in loader] for _ in range(2))
    assert len(loader) == len(first) == 16
    assert {len(ids) for ids in first} == {4}
    widths = {ids.shape[1] for ids in first}
    assert widths <= {8, 16, 24}
    assert len(widths) > 1
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.shape == b.shape)
    seen = sorted(row.tolist()[:4] for ids in first for row in ids)
    assert seen == sorted(ids[:4].tolist() for ids in data.ids)


def test_without_lengths_nothing_can_be_grouped() -> None:
    with pytest.warns(UserWarning, match="padding=buckets needs the samples' lengths"):
        loader = tuned("reviews", micro_batch=4, padding="buckets").loader(own_trainers.Reviews())
    assert {len(batch["input_ids"]) for batch in loader} == {4}


def test_padding_to_the_limit_is_left_as_it_is() -> None:
    assert tuned("reviews", padding="max").trim(default_data_collator) is default_data_collator
    with pytest.raises(UsageError, match="cifar10 makes its batches itself"):
        Tuned(
            name="cifar10", strategy=Strategy(micro_batch=8), profile=None, path=None, backend=backends.get("cpu"),
            limit=64,
        ).trim(default_collate)  # fmt: skip


def test_attention_is_switched_in_a_model_of_hugging_faces_inside_another() -> None:
    found = workload("around_bert")
    assert found.attentions[:2] == ("eager", "sdpa")
    model = tuned("around_bert", attention="eager").prepare(own_trainers.AroundBert())
    assert model.bert.config._attn_implementation == "eager"
    tuned("around_bert", attention="sdpa").prepare(model)
    assert model.bert.config._attn_implementation == "sdpa"


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
