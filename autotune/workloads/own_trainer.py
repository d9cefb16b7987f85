"""A user's own training, and what it is where a transformers.Trainer brings it, or a LightningModule with its loader.

Neither library is imported here: what they are is known by what they have.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from autotune.errors import UsageError, kind_of, words_of
from autotune.workloads.own_batch import Takes, refuse_wrapped
from autotune.workloads.own_data import Data, loaders_of, unchanged_numbers
from autotune.workloads.own_loss import MakeOptimizer, MeanLoss

ITEMS = "items_per_sample"
"""What a transformers.Trainer's loss takes besides a batch: how many tokens of a sample count, on average over all."""
_USE_CPU = "ACCELERATE_USE_CPU"
_PART = "batch_{}"
"""What a part of a Lightning module's batch is called that has no name of its own."""


@dataclass(frozen=True, kw_only=True)
class OwnTraining:
    """What a user's function gives, as a workload needs it."""

    batch: Any
    takes: Takes
    build: Callable[[], nn.Module]
    """A model as the function makes it, with its trainer's loss for output where there is a trainer."""
    adopt: Callable[[nn.Module], nn.Module] = lambda model: model
    """Makes another model of the user's such a one."""
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    """Makes such a model's optimizer; None where the recipe does."""
    loss: MeanLoss | None = None
    loss_of: Callable[[nn.Module], Callable[[Any, Any], Tensor] | None] = lambda model: None
    """The loss that such a model was made with, summed; None where that is all models' own."""
    loop: Literal["own", "transformers", "lightning"] = "own"
    """Whose it is."""
    of_whole: Callable[[Any], dict[str, Any]] = lambda raw: {}
    """What the model takes besides, of a whole batch, with each part of it."""
    data: Data
    epochs: int | None = None
    """For which it is trained, where that is known."""


def training_of_trainer(made: Any, label: str) -> OwnTraining | None:
    """The training that a trainer brings; None where what a function gives is none. Raises UsageError for a training
    that autotune does not do."""
    if is_transformers(made):
        return _of_transformers(made, label)
    parts = list(made) if isinstance(made, Sequence) else [made]
    if not (parts and is_lightning(parts[0])) or (len(parts) > 2 and parts[2] is not None):
        return None  # with a loss of its own it is a model as any other
    source, optimizer = parts[1] if len(parts) > 1 else parts[0], parts[3] if len(parts) > 3 else None
    return _of_lightning(parts[0], source, optimizer, label)


def is_transformers(made: Any) -> bool:
    """Whether it is a transformers.Trainer."""
    return all(hasattr(made, name) for name in ("compute_loss", "get_train_dataloader", "create_optimizer"))


def is_lightning(made: Any) -> bool:
    """Whether it is a LightningModule, of whichever of its two packages."""
    return isinstance(made, nn.Module) and hasattr(made, "training_step") and hasattr(made, "configure_optimizers")


def first_batch(batches: Any, data: Data) -> Any:
    """A batch of a loader's data, or else its first, on the CPU; a batch as it is. Raises UsageError for a dataset, or
    where there is nothing."""
    if isinstance(batches, Dataset):
        raise UsageError(f"{type(batches).__name__} is a dataset; give a DataLoader of it, or a batch")
    if isinstance(batches, Tensor | Mapping | list | tuple) or not hasattr(batches, "__iter__"):
        return batches
    if data.train is not None:
        batch = data.batch()
    else:
        torch.manual_seed(0)  # so that every process sees the same
        batch = next(iter(batches), None)
    if batch is None:
        raise UsageError("the loader gives no batch")
    if isinstance(batch, Mapping):
        return {name: tree_map(_on_host, part) for name, part in batch.items()}
    return tree_map(_on_host, batch)


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """What is made in here is not moved to an accelerator, of which this process is to know nothing, since trials are
    forked from it; nor does it change random numbers, or what Accelerate knows of the device."""
    known = {state: dict(state._shared_state) for state in _accelerate_states()}
    asked = os.environ.get(_USE_CPU)
    os.environ[_USE_CPU] = "true"
    try:
        with unchanged_numbers(), _arguments_of_cpu():
            yield
    finally:
        os.environ.pop(_USE_CPU)
        if asked is not None:
            os.environ[_USE_CPU] = asked
        for state in _accelerate_states():
            state._shared_state.clear()
            state._shared_state.update(known.get(state, {}))


def _accelerate_states() -> list[Any]:
    """The classes whose instances share what they know."""
    module = sys.modules.get("accelerate.state")
    return [] if module is None else [module.PartialState, module.AcceleratorState, module.GradientState]


@contextlib.contextmanager
def _arguments_of_cpu() -> Iterator[None]:
    """TrainingArguments are made for the CPU, and without what is a knob: precision and compilation."""
    library: Any = sys.modules.get("transformers")
    if library is None:
        yield
        return
    plain = library.TrainingArguments.__post_init__
    changes = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None, "torch_compile": False}
    changes |= {"torch_compile_mode": None, "torch_compile_backend": None}

    def post_init(arguments: Any) -> None:
        vars(arguments).update(changes)
        plain(arguments)

    library.TrainingArguments.__post_init__ = post_init
    try:
        yield
    finally:
        library.TrainingArguments.__post_init__ = plain


class Taught(nn.Module):
    """A model with its trainer's loss for output; ``forward`` takes a batch's parts by name. Its state is the model's,
    and so is whatever else is asked of it."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def _get_name(self) -> str:
        return self.model._get_name()  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["model"], name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, under its own keys."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what ``state_dict`` gave."""
        return self.model.load_state_dict(*args, **kwargs)


class _ByTransformers(Taught):
    """The loss is ``Trainer.compute_loss``'s: a mean over the tokens of the whole global batch, where the Trainer takes
    it so. Of these a sample has ``items_per_sample`` on average, a number."""

    def __init__(self, model: nn.Module, trainer: Any) -> None:
        super().__init__(model)
        # a function, of which a copied model has no copy
        self._loss: Callable[..., Tensor] = lambda model, batch, options: trainer.compute_loss(model, batch, **options)

    def forward(self, *, items_per_sample: Tensor | None = None, **batch: Any) -> Tensor:
        """The batch's mean loss."""
        options = {}
        if items_per_sample is not None:
            options["num_items_in_batch"] = items_per_sample * _num_samples(batch)
        return self._loss(self.model, dict(batch), options)


class _ByLightning(Taught):
    """The loss is ``training_step``'s, on a batch of the kind that the loader gives; what it logs goes nowhere."""

    def __init__(self, module: Any, kind: type) -> None:
        super().__init__(module)
        self._kind: Any = kind
        self._takes_index = len(inspect.signature(module.training_step).parameters) > 1
        warnings.filterwarnings("ignore", message=r"You are trying to `self.log\(\)`")

    def forward(self, **parts: Any) -> Any:
        """What ``training_step`` gives: a number, or a mapping with ``loss``."""
        if issubclass(self._kind, Mapping):
            batch: Any = parts
        else:
            batch = [parts[_PART.format(index)] for index in range(len(parts))]
            if issubclass(self._kind, Tensor):
                batch = batch[0]
            else:
                batch = self._kind(*batch) if hasattr(self._kind, "_fields") else self._kind(batch)
        return self.model.training_step(batch, 0) if self._takes_index else self.model.training_step(batch)


def _of_transformers(trainer: Any, label: str) -> OwnTraining:
    """A global batch is what the Trainer takes a step on: its batch, times its accumulation."""
    args = trainer.args
    if args.device.type != "cpu":
        raise UsageError(f"{label} makes its Trainer on {args.device}: import transformers at the top of its file")
    if trainer.optimizer is not None:
        raise UsageError(
            f"{label} gives its Trainer an optimizer that is made; give optimizer_cls_and_kwargs=(torch.optim.SGD, "
            '{"lr": 0.1}), or have a subclass make it in create_optimizer'
        )
    loader = trainer.get_train_dataloader()
    tests = trainer.eval_dataset is not None and not isinstance(trainer.eval_dataset, Mapping)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    data = Data.of(loader, trainer.get_eval_dataloader() if tests else None)
    if data.train is not None:
        data = data._replace(train=data.train._replace(batch_size=size))
    shuffles = not isinstance(loader.dataset, IterableDataset)
    whole = DataLoader(loader.dataset, batch_size=size, shuffle=shuffles, collate_fn=loader.collate_fn)
    batch = first_batch(whole, data)
    count: Callable[..., Any] = getattr(trainer, "_get_num_items_in_batch", lambda *_: None)
    # of its own: another Trainer resets those that are shared
    trainer.accelerator.state = _detached(trainer.accelerator.state)
    args.distributed_state = _detached(args.distributed_state)
    pristine = trainer.model

    def of_whole(raw: Any) -> dict[str, Any]:
        num_items = count([raw], torch.device("cpu")) if isinstance(raw, Mapping) else None
        return {} if num_items is None else {ITEMS: torch.tensor(float(num_items) / _num_samples(raw))}

    def adopt(model: nn.Module) -> nn.Module:
        return _ByTransformers(model, trainer)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        trainer.model = model.get_submodule("model")
        try:
            trainer.create_optimizer()
            made: torch.optim.Optimizer = trainer.optimizer
        finally:
            trainer.model, trainer.optimizer = pristine, None
        return made

    return OwnTraining(
        batch=batch,
        takes=Takes(Takes.of(pristine).names, anything=True),
        build=lambda: adopt(_copy_of(pristine, label)),  # it comes with its data and weights: not made twice
        adopt=adopt,
        optimizer_of=optimizer_of,
        loop="transformers",
        of_whole=of_whole,
        data=data,
        epochs=_num_epochs(args, data),
    )


def _num_epochs(args: Any, data: Data) -> int | None:
    """As many as a Trainer trains at least in part."""
    if data.train is None:
        return None
    if args.max_steps > 0:
        return math.ceil(float(args.max_steps * data.train.batch_size / len(data.train.dataset)))
    return max(1, math.ceil(float(args.num_train_epochs)))


def _of_lightning(module: Any, source: Any, optimizer: MakeOptimizer | None, label: str) -> OwnTraining:
    """The batch is a loader's or a data module's first, or of the module's own loader."""
    refuse_wrapped(module)
    if not getattr(module, "automatic_optimization", True):
        raise UsageError(
            f"{label} trains by an optimization of its own (automatic_optimization is off); give a step's model and "
            "loss: (model, batch, loss)"
        )
    owners = [source, module] if source is not module else [module]
    for owner in owners:
        for hook, arguments in (("prepare_data", ()), ("setup", ("fit",)), ("configure_model", ())):
            if hasattr(owner, hook) and hasattr(owner, "train_dataloader"):
                getattr(owner, hook)(*arguments)
    train, test = loaders_of(source)
    if hasattr(source, "train_dataloader"):
        train, test = source.train_dataloader(), None
        with contextlib.suppress(Exception):  # there may be none
            test = source.val_dataloader()
    data = Data.of(train, test)
    batch = first_batch(train, data)
    if isinstance(batch, Mapping):
        takes = Takes((), anything=True, has_targets=False)
    else:
        num_parts = 1 if isinstance(batch, Tensor) else len(batch)
        takes = Takes(tuple(map(_PART.format, range(num_parts))), anything=False, has_targets=False)

    def adopt(model: nn.Module) -> nn.Module:
        return _ByLightning(model, type(batch))

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        own = model.get_submodule("model")
        return _configured(own, label) if optimizer is None else optimizer(own.parameters())

    return OwnTraining(
        batch=batch,
        takes=takes,
        build=lambda: adopt(_copy_of(module, label)),
        adopt=adopt,
        optimizer_of=optimizer_of,
        loop="lightning",
        data=data,
    )


def _detached(state: Any) -> Any:
    """What Accelerate knows, as it is now."""
    own = object.__new__(type(state))
    own.__dict__ = dict(vars(state))
    return own


def _copy_of(model: nn.Module, label: str) -> nn.Module:
    """Raises UsageError for a model that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as exc:
        raise UsageError(f"the model of {label} cannot be copied: {words_of(exc)}") from exc


def _configured(module: Any, label: str) -> torch.optim.Optimizer:
    """The optimizer of ``configure_optimizers``. Raises UsageError where that gives several, or fails."""
    try:
        found = module.configure_optimizers()
    except Exception as exc:
        raise UsageError(
            f"configure_optimizers of {label} fails without a Trainer ({exc}); have it do without one, or give "
            "(module, loader, None, optimizer) with lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"
        ) from exc
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Sequence):
        found = found[0]  # optimizers, schedules
    if isinstance(found, Sequence):
        if len(found) != 1:
            raise UsageError(f"{label} trains with {len(found)} optimizers; autotune with one")
        found = found[0]
    if isinstance(found, Mapping):
        found = found["optimizer"]
    if not isinstance(found, torch.optim.Optimizer):
        raise UsageError(f"configure_optimizers of {label} gives {kind_of(found)}, no optimizer")
    return found


def _on_host(part: Any) -> Any:
    return part.cpu() if isinstance(part, Tensor) else part


def _num_samples(batch: Mapping[str, Any]) -> int:
    return next(len(part) for part in batch.values() if isinstance(part, Tensor) and part.dim())
