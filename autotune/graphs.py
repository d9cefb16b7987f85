"""A whole optimizer step as a CUDA graph: forward, backward, clipping and update are recorded once for each shape of
batch, and then replayed with a single launch. Where a step's kernels are short, launching them one by one from Python
takes longer than running them (PyTorch, "CUDA Graphs", torch.cuda.graph).

What is recorded is the step that trains: a shape's first batch is trained as ever, which also has kernels chosen and
compiled for it, and its second is recorded and replayed. Nothing is trained twice and nothing is left out.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from autotune.backends.base import Backend
from autotune.checks import first_line
from autotune.data.batching import MicroBatch
from autotune.errors import AutotuneError
from autotune.strategy import Strategy

Trained = tuple[Tensor, Tensor | None]
"""The step's loss and the norm of its gradients, detached scalars."""
Result = TypeVar("Result")


class _Recorded(NamedTuple, Generic[Result]):
    graph: torch.cuda.CUDAGraph
    batch: list[MicroBatch]
    """What the graph reads: the batch to be worked on is copied here."""
    result: Result
    """What it writes."""


class Graphs(Generic[Result]):
    """Does some work on batches: one graph for each shape that they have.

    Raises AutotuneError where a replay would go wrong without a word, or the work cannot be recorded.
    """

    def __init__(self, work: Callable[[Sequence[MicroBatch]], Result], stream: torch.cuda.Stream, pool: Any) -> None:
        """``stream`` is what is recorded. Graphs that never run at once, and read nothing that another has left, may
        have one ``pool`` of memory."""
        self._work, self._stream, self._pool = work, stream, pool
        self._seen: set[Hashable] = set()
        self.recorded: dict[Hashable, _Recorded[Result]] = {}

    def forget(self) -> None:
        """Has every shape recorded anew."""
        torch.cuda.synchronize()
        self._seen.clear()
        self.recorded.clear()

    def tried(self, batch: Sequence[MicroBatch]) -> tuple[Result, str]:
        """What comes of a batch, launched, and why that cannot be recorded; no words where it seems that it can. A
        recording that fails may leave torch's allocator and random numbers as if it went on. Models that wait unless
        they are recorded are told that they are: transformers' look whether a mask hides anything."""
        placed = [self._placed(micro) for micro in batch]
        self._seen.add(tuple(map(_shape, batch)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does not find every wait yet
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
        is_recording, torch.cuda.is_current_stream_capturing = torch.cuda.is_current_stream_capturing, lambda: True
        try:
            return self._launched(placed), ""
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AutotuneError) as exc:
            reason = first_line(exc)
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.is_current_stream_capturing = is_recording
        return self._work(placed), reason

    def __call__(self, batch: Sequence[MicroBatch]) -> Result:
        """What comes of a batch, which may still be on the host; the next call may overwrite it."""
        shape = tuple(map(_shape, batch))
        if shape not in self.recorded:
            placed = [self._placed(micro) for micro in batch]
            if shape not in self._seen:
                self._seen.add(shape)
                return self._launched(placed)
            self.recorded[shape] = self._record(placed)
        recorded = self.recorded[shape]
        for own, new in zip(recorded.batch, batch, strict=True):
            for target, value in zip(tree_leaves(own.targets), tree_leaves(new.targets), strict=True):
                target.copy_(value, non_blocking=True)
            for name, value in own.inputs.items():
                if isinstance(value, Tensor):
                    value.copy_(new.inputs[name], non_blocking=True)
        recorded.graph.replay()
        return recorded.result

    def _launched(self, batch: Sequence[MicroBatch]) -> Result:
        """On the stream that is recorded later: what autograd keeps for a parameter belongs to a stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        before = _random_state()
        with torch.cuda.stream(self._stream):
            result = self._work(batch)
        current.wait_stream(self._stream)
        if _random_state() != before:
            _refuse("the model draws random numbers on the host, and every replay would have the same ones")
        return result

    def _record(self, batch: list[MicroBatch]) -> _Recorded[Result]:
        """The loader's threads may meanwhile ask the driver for pinned memory: only this thread is held to what may be
        recorded."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with recording:
                result = self._work(batch)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is the reason
            cause = exc.__context__ or exc  # what ends the recording complains as well, and leaves its stream behind
            torch.cuda.set_stream(current)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            _refuse(f"what is done with a batch cannot be recorded ({first_line(cause)})", cause)
        return _Recorded(graph, batch, result)

    def _placed(self, micro: MicroBatch) -> MicroBatch:
        """On the device, in memory of its own."""
        return micro._replace(
            inputs={
                name: self._own(value) if isinstance(value, Tensor) else value for name, value in micro.inputs.items()
            },
            targets=tree_map(self._own, micro.targets),
        )

    def _own(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self._stream.device).copy_(tensor, non_blocking=True)


class StepGraphs:
    """Trains batches by ``train``, which does all of a step on batches that are on the device already.

    The learning rates may change from step to step; a replay leaves out what else the host does or changes after a
    shape is recorded (hooks of modules, a frozen layer, another dropout rate, a cache that is replaced and not written
    to). Raises AutotuneError where it would go wrong without a word: a model that draws random numbers on the host,
    hooks of the optimizer, other options of it than at first; and where a step waits for the device, as no graph can.
    """

    def __init__(self, train: Callable[[Sequence[MicroBatch]], Trained], optimizer: torch.optim.Optimizer) -> None:
        self._train, self._optimizer = train, optimizer
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs = Graphs(self._train_by_rates_on_device, self._stream, self._pool)
        self._rates: list[Tensor] = [
            torch.tensor(float(group["lr"]), device=self._stream.device) for group in optimizer.param_groups
        ]
        self._set: list[float] = [float(group["lr"]) for group in optimizer.param_groups]
        self._options: list[dict[str, Any]] = []
        """At the first step: schedules note more in an optimizer when they are made."""
        self._beside: list[Graphs[Any]] = []
        # a state that is loaded lies elsewhere in memory
        optimizer.register_load_state_dict_post_hook(lambda _: self.forget())

    def forget(self) -> None:
        """Has every shape recorded anew, those of what is recorded beside, too."""
        for graphs in (self._graphs, *self._beside):
            graphs.forget()
        self._options = []

    @property
    def num_recorded(self) -> int:
        """Shapes that are recorded."""
        return len(self._graphs.recorded)

    def __call__(self, batch: Sequence[MicroBatch]) -> Trained:
        """Trains a batch, which may still be on the host. The results are the caller's to keep."""
        self._check_optimizer()
        self._set_rates()
        try:
            loss, norm = self._graphs(batch)
        except Exception:
            self._optimizer.zero_grad(set_to_none=True)  # of a recording that failed they hold nothing
            raise
        return loss.clone(), None if norm is None else norm.clone()  # the next replay overwrites them

    def beside(self, work: Callable[[Sequence[MicroBatch]], Result]) -> Graphs[Result]:
        """Graphs of something else that is done with the model between steps, in the same memory."""
        graphs = Graphs(work, self._stream, self._pool)
        self._beside.append(graphs)
        return graphs

    def _train_by_rates_on_device(self, batch: Sequence[MicroBatch]) -> Trained:
        """The optimizer reads its learning rates from the device, where a replay finds those of its own step; outside,
        they are numbers, as schedules and people expect."""
        before = [group["lr"] for group in self._optimizer.param_groups]
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            return self._train(batch)
        finally:
            for group, rate in zip(self._optimizer.param_groups, before, strict=True):
                group["lr"] = rate

    def _check_optimizer(self) -> None:
        hooks = (getattr(self._optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
        if any(hooks):
            _refuse("the optimizer's hooks would not be called")
        options = _options(self._optimizer)
        if options != (self._options or options):
            _refuse("an option of the optimizer beside its rate was changed, which a recorded step does not see")
        self._options = options

    def _set_rates(self) -> None:
        wanted = [float(group["lr"]) for group in self._optimizer.param_groups]
        for rate, before, now in zip(self._rates, self._set, wanted, strict=True):
            if now != before:
                rate.fill_(now)
        self._set = wanted


def check_recorded(strategy: Strategy, backend: Backend, schedule: str) -> None:
    """Raises AutotuneError where no step of a setting can be recorded on a device, under a recipe's schedule."""
    if strategy.graphs not in backend.graphs:
        _refuse(f"a recorded step needs a CUDA device, and this one is {backend.name}")
    if reason := strategy.unrecorded or unrecorded_schedule(schedule):
        _refuse(reason)


def unrecorded_schedule(schedule: str) -> str | None:
    """Why no step under this schedule can be recorded; None where one can."""
    return (
        "the schedule changes more than the rate, which a recorded step does not see"
        if schedule == "onecycle"
        else None
    )


def unrecorded_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """Why no step with this optimizer can be recorded; None where one can."""
    # fused, SGD reads its rate where it is, and it has nothing else to keep on the device but its momentum
    if "capturable" in optimizer.defaults or type(optimizer) is torch.optim.SGD:
        return None
    return f"it needs one of torch's optimizers that can be recorded, {type(optimizer).__name__} cannot"


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Has an optimizer keep its state on the device and read its rate there. Raises AutotuneError where it cannot."""
    if (reason := unrecorded_optimizer(optimizer)) is not None:
        _refuse(reason)
    if "capturable" in optimizer.defaults:
        for group in optimizer.param_groups:
            group["capturable"] = True
    else:
        for group in optimizer.param_groups:  # its others ask the device for the rate, and wait
            group["fused"], group["foreach"] = True, False
    # a shape's first step is not recorded, on purpose: torch 2.11 would warn of that
    optimizer._warned_capturable_if_run_uncaptured = True


def _shape(micro: MicroBatch) -> Hashable:
    """All of a micro batch that is recorded with the step: what tensors look like, and whatever is no tensor."""
    inputs = (
        (name, tuple(value.shape), value.dtype, value.stride()) if isinstance(value, Tensor) else (name, value)
        for name, value in micro.inputs.items()
    )
    targets, structure = tree_flatten(micro.targets)
    return (*inputs, *((tuple(one.shape), one.dtype) for one in targets), str(structure), micro.num_samples)


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """All that an optimizer is told but the rates and, as they are tensors, the parameters."""
    return [{name: group[name] for name in group if name not in ("lr", "params")} for group in optimizer.param_groups]


def _random_state() -> tuple[Any, ...]:
    """Of everything on the host that a model may draw from."""
    kind, numbers, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), kind, np.asarray(numbers).tobytes(), *rest


def _refuse(reason: str, cause: BaseException | None = None) -> NoReturn:
    raise AutotuneError(f"graphs=step: {reason}; set graphs to none") from cause
