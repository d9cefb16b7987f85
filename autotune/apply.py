"""A Strategy put into effect: model, optimizer, loader and step, as trials measure them and trainers use them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from autotune.backends.base import Backend, torch_device
from autotune.data.batching import (
    Indices,
    MicroBatch,
    PlannedBatch,
    SequenceData,
    collate,
    plan_batch,
    plan_epoch,
    plan_evaluation,
)
from autotune.errors import AutotuneError
from autotune.models.attention import set_attention
from autotune.step import Step
from autotune.strategy import Strategy
from autotune.workloads.base import Recipe, Workload

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Loader:
    """Global batches for ``Step``: every iteration is the next epoch, reshuffled from the seed."""

    def __init__(self, data: SequenceData, strategy: Strategy, *, max_tokens: int, seed: int, is_pinned: bool) -> None:
        self._data = data
        self._strategy = strategy
        self._max_tokens = max_tokens
        self._seed = seed
        self._is_pinned = is_pinned
        self.epoch = 0
        """The epoch that the next iteration gives."""

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(len(self._data.lengths) / self._strategy.global_batch)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """The next epoch's batches."""
        plan = self.plan(self.epoch)
        self.epoch += 1
        return self.over(plan)

    def plan(self, epoch: int) -> list[PlannedBatch]:
        """What an epoch will give, without giving it."""
        return plan_epoch(
            self._data.lengths,
            global_batch=self._strategy.global_batch,
            micro_batch=self._strategy.micro_batch,
            padding=self._strategy.padding,
            max_tokens=self._max_tokens,
            seed=self._seed + 1000 * epoch,
        )

    def plan_of(self, batches: Iterable[Indices]) -> list[PlannedBatch]:
        """A step on each of the given sets of samples, cut up and padded as an epoch's batches are."""
        return [
            plan_batch(
                batch,
                self._data.lengths,
                micro_batch=self._strategy.micro_batch,
                padding=self._strategy.padding,
                max_tokens=self._max_tokens,
            )
            for batch in batches
        ]

    @property
    def lengths(self) -> Indices:
        """Tokens in each sample."""
        return self._data.lengths

    def over(self, batches: Sequence[PlannedBatch]) -> Iterator[list[MicroBatch]]:
        """The given batches, loaded as an epoch's are."""
        workers = self._strategy.workers
        loader: DataLoader[list[MicroBatch]] = DataLoader(
            _GlobalBatches(self._data, batches),
            batch_size=None,
            num_workers=workers,
            pin_memory=self._is_pinned,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        return iter(loader)


class _GlobalBatches(Dataset[list[MicroBatch]]):
    def __init__(self, data: SequenceData, batches: Sequence[PlannedBatch]) -> None:
        self._data = data
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[MicroBatch]:
        batch = self._batches[index]
        return [
            collate(self._data, indices, width)
            for indices, width in zip(batch.micro_batches, batch.widths, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a training loop needs: ``for batch in run.loader: loss = run.step(batch)``."""

    model: nn.Module
    """The model that was given, moved to the device; its state dict keys are unchanged."""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    loader: Loader
    step: Step
    strategy: Strategy
    backend: Backend
    workload: Workload

    def evaluation_plan(self) -> list[PlannedBatch]:
        """The test set in micro batches."""
        return plan_evaluation(
            self.workload.test.lengths,
            micro_batch=self.strategy.micro_batch,
            padding=self.strategy.padding,
            max_tokens=self.workload.max_tokens,
        )

    def evaluation_batches(self, plan: Sequence[PlannedBatch]) -> Iterator[list[MicroBatch]]:
        """The planned part of the test set, loaded as training batches are."""
        data = self.workload.test
        return Loader(data, self.strategy, max_tokens=0, seed=0, is_pinned=self.backend.pins_memory).over(plan)

    def evaluate(self, batches: Iterable[list[MicroBatch]] | None = None) -> tuple[float, float]:
        """Mean loss and share classified correctly, over the test set or the given part of it."""
        if batches is None:
            batches = self.evaluation_batches(self.evaluation_plan())
        loss_sum = torch.zeros((), device=torch_device(self.backend))
        num_correct = torch.zeros((), device=loss_sum.device)
        num_samples = 0
        was_training = self.model.training
        self.model.eval()
        for batch in batches:
            for micro in batch:
                output, targets = self.step.forward_only(micro)
                loss_sum += self.workload.loss(output, targets)
                num_correct += self.workload.num_correct(output, targets)
                num_samples += micro.num_samples
        self.model.train(was_training)
        return float(loss_sum) / num_samples, float(num_correct) / num_samples


def apply(
    strategy: Strategy,
    workload: Workload,
    backend: Backend,
    *,
    model: nn.Module | None = None,
    optimizer: OptimizerFactory | None = None,
    dataset: SequenceData | None = None,
    total_steps: int | None = None,
    seed: int = 0,
) -> Run:
    """A run with every knob of the strategy in effect; what is not given comes from the workload's recipe.

    ``total_steps`` is the length of the learning rate schedule, the recipe's epochs by default. With an ``optimizer``
    of your own the schedule is yours too. Raises AutotuneError where the model cannot take a knob.
    """
    recipe = workload.recipe
    torch.manual_seed(seed)
    device = torch_device(backend)
    backend.set_precision(strategy.precision)
    backend.set_allocator(strategy.allocator)
    if strategy.padding != "max":
        backend.limit_kernel_caches()
    model = workload.build_model() if model is None else model
    _set_knobs(model, strategy)
    model.to(device).train()
    loader = Loader(
        workload.train if dataset is None else dataset,
        strategy,
        max_tokens=workload.max_tokens,
        seed=seed,
        is_pinned=backend.pins_memory,
    )
    scheduler = None
    if optimizer is None:
        own: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        scheduler = warmup_cosine(own, recipe, total_steps or recipe.epochs * len(loader))
    else:
        own = optimizer(model.parameters())
    step = Step(
        model,
        own,
        workload.loss,
        strategy=strategy,
        device=device,
        clip_norm=recipe.clip_norm,
        scheduler=scheduler,
    )
    return Run(
        model=model,
        optimizer=own,
        scheduler=scheduler,
        loader=loader,
        step=step,
        strategy=strategy,
        backend=backend,
        workload=workload,
    )


def warmup_cosine(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> LambdaLR:
    """Linear warm-up over ``recipe.warmup_steps``, then a half cosine to zero at ``total_steps``.

    Where the whole run is shorter than twice the warm-up, the warm-up takes its first tenth instead.
    """
    warmup = recipe.warmup_steps if total_steps >= 2 * recipe.warmup_steps else max(1, total_steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    return LambdaLR(optimizer, factor)


def _set_knobs(model: nn.Module, strategy: Strategy) -> None:
    if set_attention(model, strategy.attention) == 0 and strategy.attention != "eager":
        raise AutotuneError(
            f"attention={strategy.attention} needs a model with autotune's SelfAttention, {type(model).__name__} has "
            "none; search with this model, or set attention to eager in the profile"
        )
    if hasattr(model, "checkpointed"):
        setattr(model, "checkpointed", strategy.checkpoint)  # noqa: B010 - not a declared attribute of nn.Module
    elif strategy.checkpoint != "none":
        raise AutotuneError(
            f"checkpoint={strategy.checkpoint} needs a model with a `checkpointed` attribute, {type(model).__name__} "
            "has none; search with this model, or set checkpoint to none in the profile"
        )
    if strategy.compile != "none":
        _skip_isa_tests()
        options: dict[str, Any] = {} if strategy.compile == "default" else {"mode": strategy.compile}
        model.compile(dynamic=strategy.padding != "max", **options)


def _skip_isa_tests() -> None:
    """Inductor compiles a test program for every CPU instruction set before its first kernel, 8 s on two cores; that
    the kernels themselves compile and run is test enough."""
    from torch._inductor import config

    if hasattr(config.cpp, "vec_isa_ok"):
        config.cpp.vec_isa_ok = True
