"""A transformers.Trainer that trains as a strategy says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from autotune.apply import set_optimizer
from autotune.backends.base import Backend
from autotune.errors import UsageError
from autotune.integrations.arguments import arguments, warn
from autotune.integrations.batches import Buckets, Sorted, checked, trimmed
from autotune.integrations.model import prepare
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.own_data import is_shuffled
from autotune.workloads.own_trainer import ITEMS
from autotune.workloads.seen import evaluating, inputs_of, micro_of, unchanged, without_dropout

_TRIED = 8
"""Samples that a Trainer's loss is tried on."""


def prepare_trainer(
    trainer: Any, strategy: Strategy, workload: Workload, backend: Backend, lengths: Sequence[int] | None
) -> None:
    """``prepare`` for the model of a transformers.Trainer that was made with ``arguments``; its optimizer updates
    as the strategy says, its losses are divided where it accumulates, and its batches lose the padding that none needs.

    By the samples' ``lengths`` in tokens, which by default are counted by their ``attention_mask``, what is of one
    length is put together: into batches with ``buckets``, else into the parts of the Trainer's own. Warns of what the
    Trainer does otherwise. Raises AutotuneError as ``prepare`` does, UsageError for lengths of other samples.
    """
    if getattr(trainer, "model_init", None) is not None:
        raise UsageError("a Trainer with model_init makes another model when it trains; give it the model")
    _check_told(trainer.args, strategy, backend)
    prepare(trainer.model, strategy, workload, backend)
    for changed in ("get_train_dataloader", "create_optimizer"):
        vars(trainer).pop(changed, None)  # by an earlier strategy
    create = trainer.create_optimizer

    def create_optimizer(*arguments: Any, **options: Any) -> Any:
        made = create(*arguments, **options)
        set_optimizer(trainer.optimizer, strategy)
        return made

    trainer.create_optimizer = create_optimizer
    if strategy.accumulation > 1 and workload.loop != "autotune":
        inputs = inputs_of(trainer.model, micro_of(workload, np.arange(_TRIED)))
        inputs.pop(ITEMS, None)
        _divide_losses(trainer, inputs)
    if strategy.padding in ("longest", "buckets") and workload.trim is not None:
        _set_batches(trainer, strategy, workload, backend, _lengths(trainer, strategy, lengths))


def _check_told(args: Any, strategy: Strategy, backend: Backend) -> None:
    """Warns of TrainingArguments that are not the strategy's; recomputation, which is the model's, is turned off."""
    others = [
        f"{name} is {value}, and {getattr(args, name)} with the Trainer"
        for name, value in arguments("transformers", strategy, backend).items()
        if getattr(args, name) != value
    ]
    if args.n_gpu > 1 or args.world_size > 1:
        others.append("it is of one device, and the Trainer has several")
    if args.torch_compile:
        others.append("it compiles where that pays, and so does the Trainer: leave torch_compile out")
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if getattr(args, name, None):
            setattr(args, name, False)
            others.append(f"it says what is recomputed: {name} is turned off")
    if others:
        warn(f"the strategy is not the Trainer's: {'; '.join(others)}")


def _divide_losses(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Has a Trainer divide the losses of what it accumulates, where the model does not.

    It leaves that to every model whose forward takes keyword arguments, and gives it ``num_items_in_batch``; some pass
    that by (transformers#47688), as a ``compute_loss`` of one's own may, and would train with gradients as many times
    too large as there are micro batches. ``inputs`` are a few samples with their ``labels``: without these it divides.
    """
    if "labels" not in inputs or getattr(trainer, "loss_is_scaled_for_ga", None) is not None:
        return
    model, items = trainer.model, torch.tensor(1e3, device=inputs["labels"].device)
    found = []
    with torch.no_grad(), evaluating(model), without_dropout(model), unchanged(model):
        model.train()  # some have a loss then only
        for options in ({}, {"num_items_in_batch": items}):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found.append(trainer.compute_loss(model, dict(inputs), **options))
    if not all(map(torch.isfinite, found)):
        warn("whether the Trainer's loss has to be divided cannot be told: it is no number on the example's samples")
    if torch.equal(*found):
        trainer.model_accepts_loss_kwargs = False
        if hasattr(trainer, "loss_is_scaled_for_ga"):
            trainer.loss_is_scaled_for_ga = False
        elif trainer.compute_loss_func is not None:
            warn("compute_loss_func does not divide by num_items_in_batch, and this transformers does not either")


def _lengths(trainer: Any, strategy: Strategy, lengths: Sequence[int] | None) -> Sequence[int] | None:
    """Tokens in each of a Trainer's samples; None where they are not needed, or not known, of which it warns."""
    data = trainer.train_dataset
    if strategy.padding != "buckets" and strategy.accumulation == 1:
        return None
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        warn(f"padding={strategy.padding}: samples that come one by one are not put together by length")
        return None
    if lengths is not None:
        return checked(lengths, data)
    found = [_length(data[index]) for index in range(len(data))]
    known = [length for length in found if length is not None]
    if len(known) < len(found):
        warn(f"padding={strategy.padding} needs the samples' lengths: give prepare(trainer, lengths=[...])")
        return None
    return known


def _set_batches(
    trainer: Any, strategy: Strategy, workload: Workload, backend: Backend, lengths: Sequence[int] | None
) -> None:
    """Has a Trainer's training batches trimmed, and put together by length where lengths are known. What it evaluates
    and predicts stays as it is."""
    args, plain = trainer.args, trainer.get_train_dataloader
    chooses = lengths is not None and strategy.padding == "buckets" and not is_shuffled(plain())
    if chooses:
        warn("padding=buckets: the Trainer's own sampler chooses the samples, which are not put together by length")

    def get_train_dataloader() -> Any:
        collate = trainer.data_collator
        trainer.data_collator = trimmed(collate, strategy, workload, backend)
        try:
            base = plain()
        finally:
            trainer.data_collator = collate
        if lengths is None:
            return base
        order: Sampler[list[int]]
        if strategy.padding == "buckets" and not chooses:
            order = Buckets(lengths, strategy, args.seed, args.dataloader_drop_last)
        else:
            order = Sorted(base.batch_sampler, lengths, args.gradient_accumulation_steps, args.dataloader_drop_last)
        copied = ("collate_fn", "num_workers", "prefetch_factor", "persistent_workers", "pin_memory", "worker_init_fn")
        options = {name: getattr(base, name) for name in (*copied, "multiprocessing_context")}
        return trainer.accelerator.prepare(DataLoader(base.dataset, batch_sampler=order, **options))

    trainer.get_train_dataloader = get_train_dataloader


def _length(sample: Any) -> int | None:
    """Tokens up to the last that counts; None where the sample does not say."""
    if not isinstance(sample, Mapping):
        return None
    if (mask := sample.get("attention_mask")) is not None:
        return int(np.flatnonzero(np.asarray(mask)).max(initial=0)) + 1
    return len(sample["input_ids"]) if "input_ids" in sample else None
