"""One optimizer step: the same code in a trial, in ``autotune train`` and in the user's own loop."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autotune.data.batching import MicroBatch
from autotune.graphs import StepGraphs
from autotune.strategy import Strategy
from autotune.workloads.base import CrossEntropy
from autotune.workloads.own_loss import summed

_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
_WEIGHTS_DTYPE = {"bf16_weights": torch.bfloat16}


Phase = Literal["forward", "backward", "update"]
Loss = Callable[[Any, Any], Tensor]
"""Takes the model's output and the targets."""


class Step:
    """A callable that trains on one global batch: forward and backward of every micro batch, then the update."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        strategy: Strategy,
        device: torch.device,
        forward_context: contextlib.AbstractContextManager[Any] | None = None,
        clip_norm: float | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        compiled: Callable[[Loss], Loss] | None = None,
    ) -> None:
        """``compiled`` compiles the loss, where that is wanted."""
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.grad_norm: Tensor | None = None
        """L2 norm of the last step's gradients before clipping."""
        self.on_phase: Callable[[Phase], None] | None = None
        """Called when a micro batch's forward or backward pass is queued, and when the step is."""
        self.plain_loss = loss
        """Summed over samples, as it was given."""
        self._gives_fp32 = type(loss) is not CrossEntropy
        self._is_models_own = isinstance(loss, functools.partial) and loss.func is summed and loss.args[:1] == (None,)
        in_fp32_first = functools.partial(_loss_in_fp32, loss, self._is_models_own)
        self.loss = (compiled or _as_it_is)(in_fp32_first if self._gives_fp32 else loss)
        """In fp32, and compiled where that is wanted; the built-in one sees to fp32 itself."""
        self._forward_context = forward_context or contextlib.nullcontext()
        self._clip_norm = clip_norm
        self.device = device
        """What it trains on."""
        self._dtype = _AUTOCAST_DTYPE.get(strategy.precision)
        self._weights_dtype = _WEIGHTS_DTYPE.get(strategy.precision)
        self._is_channels_last = strategy.memory_format == "channels_last"
        self._scaler = torch.amp.GradScaler(device.type, enabled=strategy.precision == "fp16")
        self._compiles_graphs = strategy.compiles_graphs
        self._is_skipped = False
        self.graphs = StepGraphs(self._train, optimizer) if strategy.graphs == "step" else None
        # a cast that is kept for a weight's next use is missing when that use is recomputed alone: shared weights
        self._caches_casts = strategy.checkpoint != "selective"

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by before the backward pass in fp16; None in other precisions."""
        return float(self._scaler.get_scale()) if self._scaler.is_enabled() else None

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's state; empty in other precisions."""
        state: dict[str, Any] = self._scaler.state_dict()
        return state

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Takes what ``scaler_state`` gave."""
        if state:
            self._scaler.load_state_dict(state)

    def __call__(self, batch: Sequence[MicroBatch]) -> Tensor:
        """Mean loss over the global batch before the update: a detached scalar on the device, not waited for.

        Raises TypeError for a batch that is not cut into micro batches.
        """
        if not isinstance(batch, Sequence) or not all(isinstance(micro, MicroBatch) for micro in batch):
            raise TypeError("step takes a batch of run.loader; one of your own goes through split: step(split(batch))")
        # in a graph phases cannot be told apart
        train = self._train if self.graphs is None or self.on_phase is not None else self.graphs
        total, self.grad_norm = train(batch)
        if self.scheduler is not None and not self._is_skipped:
            self.scheduler.step()
        self._reach("update")
        return total

    def _train(self, batch: Sequence[MicroBatch]) -> tuple[Tensor, Tensor | None]:
        """All of a step that happens on the device; the loss, and the gradients' norm where they are clipped."""
        num_samples = sum(micro.num_samples for micro in batch)
        total = torch.zeros((), device=self.device)
        for micro in batch:
            micro = self._on_device(micro)
            if self._compiles_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with self.context():
                output = self.model(**micro.inputs)
            loss = self.loss(output, micro.targets) / num_samples
            del output  # what the backward pass needs of it, the loss has
            self._reach("forward")
            with self._forward_context:  # what is recomputed runs as it ran at first
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self._reach("backward")
            total = total + loss.detach()  # in fp64 where the model is
        return total, self._update()

    def forward_only(self, micro: MicroBatch) -> tuple[Any, MicroBatch]:
        """Output, as the loss takes it, without gradients, and the micro batch on the device; never compiled as a
        whole, because a second graph for the few evaluation batches costs more than it gives. The caller sets eval
        mode."""
        micro = self._on_device(micro)
        with torch.no_grad(), self.context(), _own_attention():
            output = self.model.forward(**micro.inputs)
        return in_fp32(output, self._is_models_own) if self._gives_fp32 else output, micro

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The precision and the pinned attention kernel of a forward pass."""
        with self._autocast(), self._forward_context:
            yield

    def _reach(self, phase: Phase) -> None:
        if self.on_phase is not None:
            self.on_phase(phase)

    def _update(self) -> Tensor | None:
        self._scaler.unscale_(self.optimizer)
        grad_norm = None
        if self._clip_norm is not None:
            grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else 0.0
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._is_skipped = self._scaler.is_enabled() and self._scaler.get_scale() < scale
        return grad_norm

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype, cache_enabled=self._caches_casts)

    def _on_device(self, micro: MicroBatch) -> MicroBatch:
        return micro._replace(
            inputs={
                name: self._placed(value) if isinstance(value, Tensor) else value
                for name, value in micro.inputs.items()
            },
            targets=tree_map(lambda tensor: tensor.to(self.device, non_blocking=True), micro.targets),
        )

    def _placed(self, tensor: Tensor) -> Tensor:
        is_images = self._is_channels_last and tensor.dim() == 4
        return tensor.to(
            self.device,
            dtype=self._weights_dtype if tensor.is_floating_point() else None,
            non_blocking=True,
            memory_format=torch.channels_last if is_images else torch.preserve_format,
        )


@contextlib.contextmanager
def _own_attention() -> Iterator[None]:
    """nn.TransformerEncoder without its way around its layers, which fails under autocast on a CPU (torch 2.13: it asks
    for CUDA's alone) and is another kernel than training's."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def compute_dtype(strategy: Strategy) -> torch.dtype:
    """What attention and matrix products are computed in; linear layers under fp8 have their own."""
    return _AUTOCAST_DTYPE.get(strategy.precision) or weights_dtype(strategy)


def weights_dtype(strategy: Strategy) -> torch.dtype:
    """What the model's parameters are kept in."""
    return _WEIGHTS_DTYPE.get(strategy.precision, torch.float32)


def _as_it_is(loss: Loss) -> Loss:
    return loss


def _loss_in_fp32(loss: Loss, is_models_own: bool, output: Any, targets: Any) -> Tensor:
    return loss(in_fp32(output, is_models_own), targets)


def in_fp32(output: Any, is_models_own: bool = False) -> Any:
    """The loss is computed in fp32, whatever the model computes in; from several outputs too, unless it is the model's
    own, which is among them."""
    if type(output) in (tuple, list, dict):
        return output if is_models_own else tree_map(_in_fp32, output)
    return _in_fp32(output)


def _in_fp32(value: Any) -> Any:
    is_short = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_short else value
