"""Trainings that have a loop of their own: with the real transformers, Lightning and Accelerate, on the CPU."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import accelerate
import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from autotune import backends
from autotune.api import Tuned
from autotune.apply import apply
from autotune.errors import UsageError
from autotune.strategy import Strategy
from tests import own_trainers
from tests.own_trainers import apart, tuned, workload

pytestmark = own_trainers.UNHEARD


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
    trainer = own_trainers.reviewing(gradient_checkpointing=True)
    with pytest.warns(UserWarning, match="not the Trainer's") as caught:
        ours.prepare(trainer)
    words = str(caught[-1].message)
    assert "per_device_train_batch_size is 2, and 8 with the Trainer" in words
    assert "gradient_checkpointing is turned off" in words
    assert not trainer.args.gradient_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.prepare(own_trainers.reviewing(**{**ours.arguments("transformers"), "optim": "sgd"}))


def test_transformers_batches_are_of_similar_length_in_buckets() -> None:
    data = own_trainers.Reviews()
    ours = tuned("reviews", micro_batch=4, accumulation=2, padding="buckets", workers=1)
    arguments = ours.arguments("transformers")
    trainer = ours.prepare(own_trainers.trainer_of(own_trainers.classifier(), data, num_train_epochs=2, **arguments))
    loader = trainer.get_train_dataloader()
    epochs = [[batch["input_ids"].numel() for batch in loader] for _ in range(2)]
    other = tuned("reviews", micro_batch=4, padding="longest")
    plain = other.prepare(own_trainers.trainer_of(own_trainers.classifier(), data, **other.arguments("transformers")))
    assert max(map(sum, epochs)) < sum(batch["input_ids"].numel() for batch in plain.get_train_dataloader())
    assert epochs[0] != epochs[1]
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.predict(data).predictions.shape == (64, 2)
    assert next(iter(trainer.get_eval_dataloader(data)))["input_ids"].shape[1] == own_trainers.TOKENS


@pytest.mark.parametrize("own", [{}, {"compute_loss_func": own_trainers.mean_loss}])
def test_a_loss_of_ones_own_is_divided_where_it_is_a_mean(own: Any) -> None:
    def trained(prepare: bool, **options: Any) -> nn.Module:
        kind = Trainer if own else own_trainers.WithOwnLoss
        data, model = own_trainers.Tokens(same_length=True), own_trainers.decoder()
        trainer = own_trainers.trainer_of(model, data, kind=kind, trainer_options=own, **options)
        if prepare:
            ours.prepare(trainer)
        trainer.train()
        return trainer.model  # type: ignore[no-any-return]

    ours = tuned("tokens", micro_batch=2, accumulation=4)
    plain, told = trained(False), ours.arguments("transformers")
    assert apart(plain, trained(False, **told)) > 1e-2  # four times the gradient
    assert apart(plain, trained(True, **told)) < 1e-4


def test_an_optimizer_of_the_trainer_s_choice_stays_and_updates_as_the_strategy_s() -> None:
    ours = tuned("reviews", optimizer="foreach")
    trainer = own_trainers.reviewing(**ours.arguments("transformers"))
    ours.prepare(trainer).train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert {group["foreach"] for group in trainer.optimizer.optimizer.param_groups} == {True}


def test_a_second_strategy_takes_the_place_of_the_first() -> None:
    trainer = own_trainers.reviewing()
    plain = trainer.get_train_dataloader
    first = tuned("reviews", padding="buckets", compile="default", attention="sdpa_math")
    first.prepare(trainer)
    assert trainer.get_train_dataloader != plain
    tuned("reviews").prepare(trainer)
    assert trainer.get_train_dataloader == plain
    assert trainer.data_collator is default_data_collator
    copied = copy.deepcopy(tuned("module", compile="default").prepare(own_trainers.Module()))
    assert getattr(copied.training_step, "__self__", None) is copied
    pickle.loads(pickle.dumps(copied))
    assert trainer.model._compiled_call_impl is None
    first.prepare(own_trainers.AroundBert())
    apply(Strategy(micro_batch=8), workload("reviews"), backends.get("cpu"))
    assert torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    module = tuned("module", compile="default").prepare(own_trainers.Module())
    assert "training_step" in vars(module)
    tuned("module").prepare(module)
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("padding", ["buckets", "longest"])
def test_samples_that_a_trainer_chooses_itself_stay_chosen(padding: str) -> None:
    ours = tuned("reviews", micro_batch=2, accumulation=2, padding=padding)
    options = {**ours.arguments("transformers"), "dataloader_drop_last": True}
    data = own_trainers.Reviews()
    trainer = own_trainers.trainer_of(own_trainers.classifier(), data, kind=own_trainers.Weighted, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.prepare(trainer)
    assert ("own sampler" in "".join(str(one.message) for one in caught)) == (padding == "buckets")
    seen = [row[0] for batch in trainer.get_train_dataloader() for row in batch["input_ids"].tolist()]
    assert len(seen) == 8
    assert set(seen) <= {int(ids[0]) for ids in data.ids[:4]}


def test_what_cannot_be_prepared_is_told() -> None:
    ours = tuned("reviews")
    with pytest.raises(UsageError, match="compiled already"):
        ours.prepare(torch.compile(own_trainers.classifier()))
    with pytest.raises(UsageError, match="is no model to prepare"):
        ours.prepare(lightning.Trainer(accelerator="cpu", logger=False))
    trainer = own_trainers.trainer_of(
        None, own_trainers.Reviews(), trainer_options={"model_init": own_trainers.classifier}
    )
    with pytest.raises(UsageError, match="model_init makes another model"):
        ours.prepare(trainer)
    with pytest.raises(UsageError, match="no dataset with a length"):
        ours.loader(own_trainers.Stream())
    own_way = "makes batches in a way of its own; tuned.trim"
    with pytest.raises(UsageError, match=own_way):
        ours.loader(DataLoader(own_trainers.Stream(), batch_size=8))
    with pytest.raises(UsageError, match=own_way):
        ours.loader(DataLoader(own_trainers.Reviews(), batch_sampler=[[0, 1], [2, 3]]))


def test_a_decoder_is_computed_again_in_a_loop_of_ones_own() -> None:
    model, batch = own_trainers.decoder(), default_data_collator([own_trainers.Tokens()[index] for index in range(8)])
    plain = own_trainers.decoder()
    plain(**batch).loss.backward()
    tuned("tokens", checkpoint="every_block").prepare(model)(**batch).loss.backward()
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert max(float((a.grad - b.grad).abs().max()) for a, b in pairs) < 1e-5


def test_without_us_transformers_trains_a_classifier_otherwise_when_it_accumulates() -> None:
    """Should this fail, its models divide their losses themselves, and ``mend_accumulation`` can go."""
    plain = own_trainers.reviewing()
    plain.train()
    parts = own_trainers.trainer_of(
        own_trainers.classifier(),
        own_trainers.Reviews(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    parts.train()
    assert apart(plain.model, parts.model) > 1e-2


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
    assert found.device.type == "cpu"


def test_an_optimizer_is_told_how_to_update() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    assert torch.optim.AdamW(parameters, **tuned("module", optimizer="fused").arguments("optimizer")).defaults["fused"]
    assert torch.optim.AdamW(parameters, **tuned("module").arguments("optimizer")).defaults["fused"] is None


@pytest.mark.parametrize(("knob", "value"), [("graphs", "step"), ("padding", "packed")])
def test_what_a_trainer_cannot_have_is_said(knob: str, value: str) -> None:
    with pytest.warns(UserWarning, match=f"{knob}={value} is for run.step only.*--without {knob}={value}"):
        tuned("module", **{knob: value}).prepare(own_trainers.Module())


def test_others_arguments_are_not_known() -> None:
    with pytest.raises(UsageError, match="there are those of transformers, lightning, accelerate, optimizer"):
        tuned("reviews").arguments("keras")  # type: ignore[arg-type]


def test_a_pinned_kernel_stays_pinned_until_the_next_model_is_prepared() -> None:
    tuned("module", attention="sdpa_math").prepare(own_trainers.Module())
    assert torch.backends.cuda.math_sdp_enabled()  # type: ignore[no-untyped-call]
    assert not torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    tuned("module", attention="sdpa").prepare(own_trainers.Module())
    assert torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]


def test_attention_is_switched_in_a_model_of_hugging_faces_inside_another() -> None:
    found = workload("around_bert")
    assert found.attentions[:2] == ("eager", "sdpa")
    model = tuned("around_bert", attention="eager").prepare(own_trainers.AroundBert())
    assert model.bert.config._attn_implementation == "eager"
    tuned("around_bert", attention="sdpa").prepare(model)
    assert model.bert.config._attn_implementation == "sdpa"
