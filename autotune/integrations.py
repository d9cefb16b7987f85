"""A strategy in a training with a loop of its own: what lies in the model is put into it, what lies in the loop is told
the trainer in its own words, and what it cannot have is said.

Of transformers, Lightning and Accelerate none is needed but the one that is asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, default_collate

from autotune.apply import set_model, set_process
from autotune.backends.base import Backend
from autotune.compiler import compile_model, compiled
from autotune.data.batching import plan_epoch, rounding_of
from autotune.errors import UsageError
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.own_trainer import is_lightning, mend_accumulation
from autotune.workloads.seen import inputs_of, micro_of

Part = Literal["transformers", "lightning", "accelerate", "optimizer"]
"""Whose arguments: of ``transformers.TrainingArguments``, ``lightning.Trainer``, ``accelerate.Accelerator``, or of one
of torch's optimizers."""
_MIXED = {"fp8": "bf16", "bf16": "bf16", "fp16": "fp16"}
"""Autocast's type, by precision."""
_pinned = contextlib.ExitStack()
"""Holds the attention kernel that is pinned in this process."""


def prepare(model: nn.Module, strategy: Strategy, workload: Workload, backend: Backend) -> None:
    """Puts attention, recomputation, compilation and memory format into the model, and threads, allocator, TF32 and the
    pinned attention kernel into this process, for good. The model stays where it is.

    Raises AutotuneError where the model cannot take a knob.
    """
    set_process(strategy, backend)
    if strategy.accumulation > 1 and workload.split is not None and not is_lightning(model):
        mend_accumulation(model, inputs_of(model, micro_of(workload, np.arange(2))))
    taught = workload.adopt(model)
    _pinned.close()
    _pinned.enter_context(set_model(taught, strategy, workload, backend))
    if taught is not model and strategy.compile != "none" and strategy.compile_scope == "model":
        if is_lightning(model):
            model.training_step = compiled(model.training_step, strategy)  # type: ignore[assignment, arg-type]
        else:
            compile_model(model, strategy)


def prepare_trainer(
    trainer: Any, strategy: Strategy, workload: Workload, backend: Backend, lengths: Sequence[int] | None
) -> None:
    """``prepare`` for the model of a transformers.Trainer, made with ``arguments``; its batches lose the padding that
    no sample needs. By the samples' ``lengths`` in tokens, which by default are counted by their ``attention_mask``,
    what is of one length is put together: into batches with ``buckets``, else into the parts of the Trainer's own.

    Raises AutotuneError as ``prepare`` does.
    """
    args = trainer.args
    others = [
        f"{name} is {value}, and {getattr(args, name)} with the Trainer"
        for name, value in _transformers(strategy, backend).items()
        if name not in ("optim", "per_device_eval_batch_size") and getattr(args, name) != value
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
        warnings.warn(f"the strategy is not the Trainer's: {'; '.join(others)}", stacklevel=3)
    prepare(trainer.model, strategy, workload, backend)
    trainer.model_accepts_loss_kwargs &= getattr(trainer.model, "accepts_loss_kwargs", True)
    if strategy.padding == "max" or workload.trim is None:
        return
    trainer.data_collator = trimmed(trainer.data_collator, strategy, workload, backend)
    data, is_bucketed = trainer.train_dataset, strategy.padding == "buckets"
    if not is_bucketed and strategy.accumulation == 1:
        return
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        warnings.warn(f"padding={strategy.padding}: samples that come one by one are not grouped", stacklevel=3)
        return
    lengths = [_length(data[index]) for index in range(len(data))] if lengths is None else lengths
    buckets = _Buckets(lengths, strategy, args.seed)
    plain = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        base = plain()
        order = buckets if is_bucketed else _Sorted(base.batch_sampler, lengths, strategy.accumulation)
        copied = ("collate_fn", "num_workers", "prefetch_factor", "persistent_workers", "pin_memory", "worker_init_fn")
        options = {name: getattr(base, name) for name in copied}
        return trainer.accelerator.prepare(DataLoader(base.dataset, batch_sampler=order, **options))

    trainer.get_train_dataloader = get_train_dataloader


def _length(sample: Mapping[str, Any]) -> int:
    """Tokens up to the last that counts."""
    mask = sample.get("attention_mask")
    if mask is None:
        return len(sample["input_ids"])
    return int(np.flatnonzero(np.asarray(mask)).max(initial=0)) + 1


def arguments(part: Part, strategy: Strategy, backend: Backend) -> dict[str, Any]:
    """What a trainer or an optimizer is to be told, as keyword arguments; warns of what it cannot have.

    Raises UsageError for a part that there is not.
    """
    makers: dict[str, Callable[[Strategy, Backend], dict[str, Any]]] = {
        "transformers": _transformers,
        "lightning": _lightning,
        "accelerate": _accelerate,
        "optimizer": _optimizer,
    }
    if part not in makers:
        raise UsageError(f"no arguments are known for {part!r}; there are those of {', '.join(makers)}")
    if part != "optimizer":
        for knob, value in (("graphs", "step"), ("padding", "packed")):
            if getattr(strategy, knob) == value:
                warnings.warn(
                    f"{knob}={value} is for run.step only, and is left out here; search --without {knob}={value} for "
                    "the best without",
                    stacklevel=3,
                )
    return makers[part](strategy, backend)


def trimmed(
    collate: Callable[[list[Any]], Any], strategy: Strategy, workload: Workload, backend: Backend
) -> Callable[[list[Any]], Any]:
    """``collate``, whose batches lose the padding that no sample of them needs, unless the strategy pads to the limit.

    Raises UsageError where the workload makes its batches itself.
    """
    if workload.trim is None:
        raise UsageError(f"{workload.name} makes its batches itself: for batch in run.loader: run.step(batch)")
    if strategy.padding == "max":
        return collate
    return _Trimmed(collate, workload, rounding_of(strategy, is_host=backend.is_host_memory))


def loader(
    dataset: Any,
    strategy: Strategy,
    workload: Workload,
    backend: Backend,
    *,
    lengths: Sequence[int] | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    seed: int,
) -> DataLoader[Any]:
    """A map-style dataset's micro batches, reshuffled each epoch, ``strategy.accumulation`` of them to a step.

    ``lengths``, tokens in each sample, are what samples are grouped by; without them ``buckets`` is left out, with a
    warning. Raises UsageError where the workload makes its batches itself.
    """
    if lengths is None and strategy.padding == "buckets":
        warnings.warn("padding=buckets needs the samples' lengths: give lengths=[...]", stacklevel=3)
    order: dict[str, Any] = {"batch_sampler": _Buckets(lengths, strategy, seed)} if lengths is not None else {}
    return DataLoader(
        dataset,
        **order or {"batch_size": strategy.micro_batch, "shuffle": True},
        generator=torch.Generator().manual_seed(seed),
        collate_fn=trimmed(collate_fn or default_collate, strategy, workload, backend),
        num_workers=strategy.workers,
        prefetch_factor=strategy.prefetch if strategy.workers else None,
        persistent_workers=strategy.workers > 0,
        pin_memory=backend.pins_memory,
    )


class _Trimmed:
    """A collate function that loader processes can be given."""

    def __init__(self, collate: Callable[[list[Any]], Any], workload: Workload, rounding: Any) -> None:
        self._collate, self._workload, self._rounding = collate, workload, rounding

    def __call__(self, samples: list[Any]) -> Any:
        assert self._workload.trim is not None
        return self._workload.trim(self._collate(samples), self._rounding)


class _Buckets(Sampler[list[int]]):
    """Micro batches in the order in which ``autotune train`` would take them; every iteration is the next epoch, or the
    one that a trainer has set."""

    def __init__(self, lengths: Sequence[int], strategy: Strategy, seed: int) -> None:
        self._lengths, self._strategy, self._seed = np.asarray(lengths, dtype=np.int64), strategy, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self._lengths), self._strategy.global_batch)
        return whole * self._strategy.accumulation + -(-rest // self._strategy.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        plan = plan_epoch(
            self._lengths,
            global_batch=self._strategy.global_batch,
            micro_batch=self._strategy.micro_batch,
            padding=self._strategy.padding,
            max_tokens=int(self._lengths.max(initial=1)),
            seed=self._seed + 1000 * self._epoch,
        )
        self._epoch += 1
        for batch in plan:
            yield from (indices.tolist() for indices in batch.micro_batches)


class _Sorted(Sampler[list[int]]):
    """Another sampler's micro batches, sorted by length within each that are accumulated together."""

    def __init__(self, batches: Any, lengths: Sequence[int], accumulation: int) -> None:
        self._batches, self._lengths, self._accumulation = batches, lengths, accumulation

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the other's next iteration gives."""
        candidates: tuple[Any, ...] = (self._batches, getattr(self._batches, "sampler", None))
        for sampler in candidates:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self._batches)
        while whole := list(itertools.islice(batches, self._accumulation)):
            ordered = iter(sorted(itertools.chain(*whole), key=self._lengths.__getitem__))
            yield from ([*itertools.islice(ordered, len(batch))] for batch in whole)


def _transformers(strategy: Strategy, backend: Backend) -> dict[str, Any]:
    found = {
        "per_device_train_batch_size": strategy.micro_batch,
        "per_device_eval_batch_size": strategy.micro_batch,
        "gradient_accumulation_steps": strategy.accumulation,
        "bf16": _MIXED.get(strategy.precision) == "bf16",
        "fp16": _MIXED.get(strategy.precision) == "fp16",
        "optim": "adamw_torch_fused" if strategy.optimizer == "fused" else "adamw_torch",
        "dataloader_num_workers": strategy.workers,
        "dataloader_pin_memory": backend.pins_memory,
    }
    if strategy.workers:
        found |= {"dataloader_prefetch_factor": strategy.prefetch, "dataloader_persistent_workers": True}
    if backend.device_type == "cpu":
        found["use_cpu"] = True
    return found


def _lightning(strategy: Strategy, backend: Backend) -> dict[str, Any]:
    mixed = _MIXED.get(strategy.precision)
    whole = "bf16-true" if strategy.precision == "bf16_weights" else "32-true"
    found = {
        "accelerator": backend.device_type,
        "devices": 1,
        "precision": whole if mixed is None else f"{mixed.removeprefix('fp')}-mixed",
        "accumulate_grad_batches": strategy.accumulation,
    }
    return found | ({"deterministic": True} if strategy.deterministic else {})


def _accelerate(strategy: Strategy, backend: Backend) -> dict[str, Any]:
    return {
        "mixed_precision": _MIXED.get(strategy.precision, "no"),
        "gradient_accumulation_steps": strategy.accumulation,
        "cpu": backend.device_type == "cpu",
    }


def _optimizer(strategy: Strategy, _: Backend) -> dict[str, Any]:
    return {} if strategy.optimizer == "default" else {strategy.optimizer: True}
