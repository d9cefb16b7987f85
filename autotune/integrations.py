"""A strategy in a training with a loop of its own: what lies in the model is put into it, what lies in the loop is told
the trainer in its own words, and what it cannot have is said.

Of transformers, Lightning and Accelerate none is imported.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Sampler, default_collate

from autotune.apply import set_model, set_optimizer, set_process
from autotune.backends.base import Backend
from autotune.compiler import compile_model, compiled
from autotune.data.batching import plan_epoch, rounding_of
from autotune.errors import UsageError, kind_of
from autotune.models.attention import hold
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.own_batch import refuse_wrapped
from autotune.workloads.own_trainer import is_lightning
from autotune.workloads.seen import evaluating, inputs_of, micro_of, unchanged, without_dropout

Part = Literal["transformers", "lightning", "accelerate", "optimizer"]
"""Whose arguments: of ``transformers.TrainingArguments``, ``lightning.Trainer``, ``accelerate.Accelerator``, or of one
of torch's optimizers."""
Collate = Callable[[list[Any]], Any]
_MIXED = {"fp8": "bf16", "bf16": "bf16", "fp16": "fp16"}
"""Autocast's type, by precision."""
_OWN_ONLY = (("graphs", "step"), ("padding", "packed"))
"""What ``run.step`` alone does."""
_TRIED = 8
"""Samples that a Trainer's loss is tried on."""


def prepare(model: nn.Module, strategy: Strategy, workload: Workload, backend: Backend) -> None:
    """Puts attention, recomputation, compilation, memory format and the weights' type into the model, and threads,
    allocator, TF32 and the pinned attention kernel into this process, until the next. The model stays where it is.

    Warns of what only ``run.step`` does. Raises AutotuneError where the model cannot take a knob, UsageError for what
    is no model, or compiled already.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"{kind_of(model)} is no model to prepare, nor a LightningModule or transformers.Trainer")
    refuse_wrapped(model)
    for knob, value in _OWN_ONLY:
        if getattr(strategy, knob) == value:
            _warn(f"{knob}={value} is for run.step only, and left out; --without {knob}={value} searches without it")
    set_process(strategy, backend)
    module: Any = model
    if is_lightning(model) and hasattr(model, "configure_model"):
        module.configure_model()  # as its trainer does, again; layers may be made there
    taught = workload.adopt(model)
    hold(set_model(taught, strategy, workload, backend))
    if is_lightning(model):  # whose trainer calls training_step
        vars(module).pop("training_step", None)
        if strategy.compile != "none" and strategy.compile_scope == "model":
            _hide_logging(model)
            # of the class, so that a copy of the module has its own
            module.training_step = types.MethodType(compiled(type(module).training_step, strategy), module)
    elif taught is not model:
        compile_model(model, strategy)


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
        _divide_losses(trainer, inputs_of(trainer.model, micro_of(workload, np.arange(_TRIED))))
    if strategy.padding in ("longest", "buckets") and workload.trim is not None:
        _set_batches(trainer, strategy, workload, backend, _lengths(trainer, strategy, lengths))


def arguments(part: Part, strategy: Strategy, backend: Backend) -> dict[str, Any]:
    """What a trainer or an optimizer is to be told, as keyword arguments. Raises UsageError for a part that there is
    not."""
    makers: dict[str, Callable[[Strategy, Backend], dict[str, Any]]] = {
        "transformers": _transformers,
        "lightning": _lightning,
        "accelerate": _accelerate,
        "optimizer": _optimizer,
    }
    if part not in makers:
        raise UsageError(f"no arguments are known for {part!r}; there are those of {', '.join(makers)}")
    return makers[part](strategy, backend)


def trimmed(collate: Collate, strategy: Strategy, workload: Workload, backend: Backend) -> Collate:
    """``collate``, whose batches lose the padding that no sample of them needs, unless the strategy pads to the limit.

    Raises UsageError where the workload makes its batches itself.
    """
    if workload.trim is None:
        raise UsageError(f"{workload.name} makes its batches itself: for batch in run.loader: run.step(batch)")
    if strategy.padding == "max":
        return collate
    return workload.trim(collate, rounding_of(strategy, is_host=backend.is_host_memory))


def loader(
    dataset: Any,
    strategy: Strategy,
    workload: Workload,
    backend: Backend,
    *,
    lengths: Sequence[int] | None,
    collate_fn: Collate | None,
    seed: int,
) -> DataLoader[Any]:
    """A map-style dataset's micro batches, reshuffled each epoch, ``strategy.accumulation`` of them to a step.

    With accumulation an epoch's last samples that are no whole batch are left out: trainers would divide their loss by
    all that is accumulated. ``lengths``, tokens in each sample, are what samples are grouped by; without them
    ``buckets`` is left out, with a warning. Raises UsageError for lengths of other samples, or where the workload makes
    its batches itself.
    """
    if isinstance(dataset, DataLoader) or not hasattr(dataset, "__len__"):
        raise UsageError(f"{kind_of(dataset)} is no dataset with a length; tuned.trim(collate_fn) is for other loaders")
    drops = strategy.accumulation > 1 and len(dataset) >= strategy.global_batch
    if lengths is None and strategy.padding == "buckets":
        _warn("padding=buckets needs the samples' lengths: give lengths=[...]")
    if lengths is None:
        num_samples = len(dataset) // strategy.global_batch * strategy.global_batch if drops else len(dataset)
        shuffled = RandomSampler(dataset, num_samples=num_samples, generator=torch.Generator().manual_seed(seed))
        order: dict[str, Any] = {"batch_size": strategy.micro_batch, "sampler": shuffled}
    else:
        order = {"batch_sampler": _Buckets(_checked(lengths, dataset), strategy, seed, drops)}
    return DataLoader(
        dataset,
        **order,
        collate_fn=trimmed(collate_fn or default_collate, strategy, workload, backend),
        num_workers=strategy.workers,
        prefetch_factor=strategy.prefetch if strategy.workers else None,
        persistent_workers=strategy.workers > 0,
        pin_memory=backend.pins_memory,
    )


class _Buckets(Sampler[list[int]]):
    """Micro batches of whole batches as ``autotune train`` would put them together, one that is short last; every
    iteration is the next epoch, or the one that a trainer has set."""

    def __init__(self, lengths: Sequence[int], strategy: Strategy, seed: int, drops_last: bool) -> None:
        self._lengths, self._strategy, self._seed = np.asarray(lengths, dtype=np.int64), strategy, seed
        self._drops_last = drops_last
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self._lengths), self._strategy.global_batch)
        short = 0 if self._drops_last else -(-rest // self._strategy.micro_batch)
        return whole * self._strategy.accumulation + short

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
        by_size: dict[int, list[list[int]]] = {}
        for batch in plan:
            micro_batches = [indices.tolist() for indices in batch.micro_batches]
            by_size.setdefault(sum(map(len, micro_batches)), []).extend(micro_batches)
        yield from by_size.pop(self._strategy.global_batch, [])
        if not self._drops_last:
            yield from itertools.chain(*by_size.values())


class _Sorted(Sampler[list[int]]):
    """Another sampler's micro batches, sorted by length within each that are accumulated together."""

    def __init__(self, batches: Any, lengths: Sequence[int], accumulation: int, drops_last: bool) -> None:
        self._batches, self._lengths, self._accumulation = batches, lengths, accumulation
        self._drops_last = drops_last

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the other's next iteration gives."""
        candidates: tuple[Any, ...] = (self._batches, getattr(self._batches, "sampler", None))
        for sampler in candidates:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches) - (len(self._batches) % self._accumulation if self._drops_last else 0)

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self._batches)
        while whole := list(itertools.islice(batches, self._accumulation)):
            if self._drops_last and len(whole) < self._accumulation:
                return
            ordered = iter(sorted(itertools.chain(*whole), key=self._lengths.__getitem__))
            yield from ([*itertools.islice(ordered, len(batch))] for batch in whole)


def _check_told(args: Any, strategy: Strategy, backend: Backend) -> None:
    """Warns of TrainingArguments that are not the strategy's; recomputation, which is the model's, is turned off."""
    others = [
        f"{name} is {value}, and {getattr(args, name)} with the Trainer"
        for name, value in _transformers(strategy, backend).items()
        if name != "per_device_eval_batch_size" and getattr(args, name) != value
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
        _warn(f"the strategy is not the Trainer's: {'; '.join(others)}")


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
        _warn("whether the Trainer's loss has to be divided cannot be told: it is no number on the example's samples")
    if torch.equal(*found):
        trainer.model_accepts_loss_kwargs = False
        if hasattr(trainer, "loss_is_scaled_for_ga"):
            trainer.loss_is_scaled_for_ga = False
        elif trainer.compute_loss_func is not None:
            _warn("compute_loss_func does not divide by num_items_in_batch, and this transformers does not either")


def _lengths(trainer: Any, strategy: Strategy, lengths: Sequence[int] | None) -> Sequence[int] | None:
    """Tokens in each of a Trainer's samples; None where they are not needed, or not known, of which it warns."""
    data = trainer.train_dataset
    if strategy.padding != "buckets" and strategy.accumulation == 1:
        return None
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        _warn(f"padding={strategy.padding}: samples that come one by one are not put together by length")
        return None
    if lengths is not None:
        return _checked(lengths, data)
    found = [_length(data[index]) for index in range(len(data))]
    known = [length for length in found if length is not None]
    if len(known) < len(found):
        _warn(f"padding={strategy.padding} needs the samples' lengths: give prepare(trainer, lengths=[...])")
        return None
    return known


def _set_batches(
    trainer: Any, strategy: Strategy, workload: Workload, backend: Backend, lengths: Sequence[int] | None
) -> None:
    """Has a Trainer's training batches trimmed, and put together by length where lengths are known. What it evaluates
    and predicts stays as it is."""
    args, plain = trainer.args, trainer.get_train_dataloader
    chooses = lengths is not None and strategy.padding == "buckets" and not _is_shuffled(plain())
    if chooses:
        _warn("padding=buckets: the Trainer's own sampler chooses the samples, which are not put together by length")

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
            order = _Buckets(lengths, strategy, args.seed, args.dataloader_drop_last)
        else:
            order = _Sorted(base.batch_sampler, lengths, strategy.accumulation, args.dataloader_drop_last)
        copied = ("collate_fn", "num_workers", "prefetch_factor", "persistent_workers", "pin_memory", "worker_init_fn")
        options = {name: getattr(base, name) for name in (*copied, "multiprocessing_context")}
        return trainer.accelerator.prepare(DataLoader(base.dataset, batch_sampler=order, **options))

    trainer.get_train_dataloader = get_train_dataloader


def _is_shuffled(loader: DataLoader[Any]) -> bool:
    """Whether a Trainer takes every sample once, in any order, and not as a sampler of the user's says."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return isinstance(sampler, RandomSampler) or type(sampler).__name__ == "LengthGroupedSampler"


def _length(sample: Any) -> int | None:
    """Tokens up to the last that counts; None where the sample does not say."""
    if not isinstance(sample, Mapping):
        return None
    if (mask := sample.get("attention_mask")) is not None:
        return int(np.flatnonzero(np.asarray(mask)).max(initial=0)) + 1
    return len(sample["input_ids"]) if "input_ids" in sample else None


def _checked(lengths: Sequence[int], dataset: Any) -> Sequence[int]:
    if len(lengths) != len(dataset):
        raise UsageError(f"there are {len(lengths):,} lengths for {len(dataset):,} samples")
    return lengths


def _hide_logging(module: nn.Module) -> None:
    """The compiler leaves a module's ``log`` alone, in which it fails (torch 2.12 and 2.13): as Lightning itself has it
    since pytorch-lightning#21837."""
    for kind in type(module).__mro__:
        own = vars(kind).get("log")
        if own is None or hasattr(own, "_torchdynamo_disable"):
            continue
        if kind.__module__.startswith(("lightning.", "pytorch_lightning.")):
            kind.log = torch.compiler.disable(own)  # type: ignore[attr-defined, no-untyped-call]


def _warn(words: str) -> None:
    warnings.warn(words, stacklevel=4)


def _transformers(strategy: Strategy, backend: Backend) -> dict[str, Any]:
    found = {
        "per_device_train_batch_size": strategy.micro_batch,
        "per_device_eval_batch_size": strategy.micro_batch,
        "gradient_accumulation_steps": strategy.accumulation,
        "bf16": _MIXED.get(strategy.precision) == "bf16",
        "fp16": _MIXED.get(strategy.precision) == "fp16",
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
