"""A Strategy put into effect: model, optimizer, loader and step, as trials measure them and trainers use them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotune.backends.base import Backend, torch_device
from autotune.compiler import compile_model, loss_compiler, prepare_compiler
from autotune.data.batching import MicroBatch, PlannedBatch, Rounding, plan_evaluation, rounding_of
from autotune.data.loader import Loader, with_lengths
from autotune.errors import AutotuneError, UsageError
from autotune.evaluation import Evaluation
from autotune.graphs import check_recorded, make_capturable
from autotune.models.aligned import align_linear
from autotune.models.attention import hold, set_attention
from autotune.models.blocks import set_checkpoint
from autotune.models.fp8 import use_fp8
from autotune.schedule import schedule
from autotune.step import Step, compute_dtype, weights_dtype
from autotune.strategy import SPARSE, Optimizer, Strategy
from autotune.workloads.base import Workload
from autotune.workloads.own_loss import summed
from autotune.workloads.seen import set_training

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a training loop needs: ``for batch in run.loader: loss = run.step(batch)``."""

    model: nn.Module
    """The model that was given, moved to the device; its state dict keys are unchanged."""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    loader: Loader
    step: Step
    evaluation: Evaluation
    strategy: Strategy
    backend: Backend
    workload: Workload

    def forward_context(self) -> contextlib.AbstractContextManager[None]:
        """What the model's forward passes are to run in where ``step`` is not used: the precision and the pinned
        attention kernel. In fp16 the loss is to be scaled besides (torch.amp.GradScaler)."""
        return self.step.context()

    def split(self, batch: Any) -> list[MicroBatch]:
        """A batch of a loader of one's own, as ``step`` takes it: ``run.step(run.split(batch))``.

        Raises AutotuneError where the workload's batches come from its own loader only.
        """
        if self.workload.split is None:
            raise AutotuneError(
                f"{self.workload.name} has a loader of its own: for batch in run.loader: run.step(batch)"
            )
        return self.workload.split(batch, self.strategy, self.rounding)

    @property
    def rounding(self) -> Rounding:
        """What the sizes of batches are rounded up to."""
        return rounding_of(self.strategy, is_host=self.backend.is_host_memory)

    def evaluation_plan(self, num_samples: int | None = None) -> list[PlannedBatch]:
        """The test set in micro batches; with a number, its first so many samples, however they are batched."""
        return plan_evaluation(
            self.workload.test.lengths[:num_samples],
            micro_batch=self.strategy.micro_batch,
            padding=self.strategy.padding,
            max_tokens=self.workload.max_tokens,
            rounding=self.rounding,
        )

    def evaluation_batches(self, plan: Sequence[PlannedBatch]) -> Iterator[list[MicroBatch]]:
        """The planned part of the test set, loaded as training batches are."""
        return Loader(
            self.workload.test,
            self.strategy,
            max_tokens=0,
            seed=0,
            is_pinned=self.backend.pins_memory,
            rounding=self.rounding,
            collate=self.workload.collate_for(self.strategy.padding),
            is_training=False,
        ).over(plan)

    def evaluate(self, batches: Iterable[list[MicroBatch]] | None = None) -> tuple[float, float]:
        """Mean loss and share classified correctly, over the test set or the given part of it; where samples have no
        class, the share is no number; nor is the loss where there are none."""
        return self.evaluation(self.evaluation_batches(self.evaluation_plan()) if batches is None else batches)


def apply(
    strategy: Strategy,
    workload: Workload,
    backend: Backend,
    *,
    model: nn.Module | None = None,
    optimizer: OptimizerFactory | None = None,
    dataset: Any = None,
    lengths: Sequence[int] | None = None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    clip_norm: float | None = None,
    total_steps: int | None = None,
    seed: int = 0,
) -> Run:
    """A run with every knob of the strategy in effect; what is not given comes from the workload's recipe.

    ``loss`` gives a batch's mean from output and targets, in place of the workload's. ``lengths`` are the tokens in
    each of the dataset's samples: without them ``buckets`` reads all once.
    ``total_steps`` is the length of the learning rate schedule, the recipe's epochs by default. With an ``optimizer``
    of your own the schedule is yours too. Raises AutotuneError where the model cannot take a knob, TypeError where the
    optimizer is made already, UsageError for a ``clip_norm`` that is none.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        name = type(optimizer).__name__
        raise TypeError(f"optimizer should make one: lambda parameters: torch.optim.{name}(parameters, ...)")
    if clip_norm is not None and not clip_norm > 0:
        raise UsageError(f"clip_norm is {clip_norm}; it should be a number above 0, or None for the recipe's")
    recipe = workload.recipe
    torch.manual_seed(seed)
    set_process(strategy, backend)
    model = workload.build_model() if model is None else workload.adopt(model)
    summed_loss = workload.loss_for(model) if loss is None else functools.partial(summed, loss)
    if strategy.graphs != "none":
        check_recorded(strategy, backend, recipe.schedule)
    forward_context = set_model(model, strategy, workload, backend)
    device = torch_device(backend)
    model.to(device)
    set_training(model)
    rounding = rounding_of(strategy, is_host=backend.is_host_memory)
    data = workload.train if dataset is None else workload.of_dataset(dataset, lengths)
    loader = Loader(
        with_lengths(data, strategy),
        strategy,
        max_tokens=workload.max_tokens,
        seed=seed,
        is_pinned=backend.pins_memory,
        rounding=rounding,
        collate=workload.collate_for(strategy.padding),
    )
    scheduler = None
    if optimizer is not None:
        own = optimizer(model.parameters())
    elif workload.optimizer_of is not None:
        own = workload.optimizer_of(model)
        _check_optimizer(own, model)
    else:
        own = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        scheduler = schedule(own, recipe, total_steps or recipe.epochs * len(loader))
    set_optimizer(own, strategy)
    step = Step(
        model,
        own,
        summed_loss,
        strategy=strategy,
        device=device,
        forward_context=forward_context,
        clip_norm=recipe.clip_norm if clip_norm is None else clip_norm,
        scheduler=scheduler,
        compiled=loss_compiler(strategy, summed_loss),
    )
    return Run(
        model=model,
        optimizer=own,
        scheduler=scheduler,
        loader=loader,
        step=step,
        evaluation=Evaluation(step, workload),
        strategy=strategy,
        backend=backend,
        workload=workload,
    )


def set_process(strategy: Strategy, backend: Backend) -> None:
    """Puts in effect, for good, what of a strategy lies in this process; a kernel that was held is let go."""
    hold(contextlib.nullcontext())
    backend.set_precision(strategy.precision)
    backend.set_allocator(strategy.allocator)
    if strategy.threads:
        torch.set_num_threads(strategy.threads)
    if strategy.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch.use_deterministic_algorithms asks for it
        torch.use_deterministic_algorithms(True)
    if strategy.padding != "max":
        backend.limit_kernel_caches()


def set_model(
    model: nn.Module, strategy: Strategy, workload: Workload, backend: Backend
) -> contextlib.AbstractContextManager[None]:
    """Puts in effect what of a strategy lies in the model, which stays where it is; gives what its forward passes run
    in besides autocast: the pinned attention kernel. Raises AutotuneError where the model cannot take a knob."""
    device_type, name = torch_device(backend).type, str(model._get_name())  # type: ignore[no-untyped-call]
    if strategy.attention not in (attentions := workload.attentions_of(model)):
        raise AutotuneError(
            f"attention={strategy.attention} needs a model whose attention can be switched so, {name} "
            f"has none; search with this model, or set attention to {attentions[0]} in the profile"
        )
    forward_context = set_attention(
        model, strategy.attention, device_type=device_type, dtype=compute_dtype(strategy), window=strategy.window
    )
    num_recomputed = set_checkpoint(model, strategy.checkpoint)
    if strategy.checkpoint == "memory_budget" and strategy.compile == "none":
        raise AutotuneError(
            "checkpoint=memory_budget is the compiler's: set compile, or checkpoint to none, in the profile"
        )
    if num_recomputed == 0 and strategy.checkpoint not in ("none", "memory_budget"):
        raise AutotuneError(
            f"checkpoint={strategy.checkpoint} needs a model that repeats a block, {name} has none; "
            "search with this model, or set checkpoint to none in the profile"
        )
    if strategy.compile != "none" or strategy.attention in SPARSE:  # which on CUDA is compiled by itself
        prepare_compiler(strategy)
    compile_model(model, strategy)
    if weights_dtype(strategy) is not torch.float32:
        model.to(weights_dtype(strategy))
    if strategy.precision == "fp8":
        use_fp8(model, is_emulated=device_type == "cpu")
    align_linear(model, 1 if strategy.precision == "fp32" else backend.matmul_multiple)
    if strategy.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return forward_context


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    known = set(map(id, model.parameters()))
    if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
        raise AutotuneError(
            f"{type(optimizer).__name__} holds parameters that are not this model's: make it from those given, or "
            "give apply this model's: apply(model, optimizer=...)"
        )


def set_optimizer(optimizer: torch.optim.Optimizer, strategy: Strategy) -> None:
    """Chooses the update's implementation, as the constructor's arguments ``foreach`` and ``fused`` would. Raises
    AutotuneError where the optimizer has no such choice."""
    _choose_update(optimizer, strategy.optimizer)
    if strategy.graphs == "step":
        make_capturable(optimizer)
    optimizer.register_load_state_dict_pre_hook(_computed_as_here)


def _computed_as_here(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state that another setting saved, without its choice of how updates are computed."""
    if len(state["param_groups"]) != len(optimizer.param_groups):
        return state  # torch says so
    groups = [
        {**group, **{name: own[name] for name in ("foreach", "fused", "capturable") if name in own}}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def _choose_update(optimizer: torch.optim.Optimizer, chosen: Optimizer) -> None:
    if chosen == "default":
        return
    if chosen not in optimizer.defaults:
        raise AutotuneError(
            f"optimizer={chosen} needs one of torch's optimizers that has it, {type(optimizer).__name__} has not; set "
            "optimizer to default in the profile"
        )
    for group in optimizer.param_groups:
        group["foreach"], group["fused"] = chosen == "foreach", chosen == "fused"
    # what the constructor sets with fused=True, so that a GradScaler hands it the scale (torch 2.13, optim/adam.py)
    optimizer._step_supports_amp_scaling = chosen == "fused"  # type: ignore[attr-defined]
