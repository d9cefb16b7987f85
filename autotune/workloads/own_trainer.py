"""A user's own training as the trainers have it: a transformers.Trainer, or a LightningModule with its loader.

Neither library is imported here: what they are is known by what they have.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from autotune.errors import UsageError, kind_of
from autotune.workloads.own_batch import Takes
from autotune.workloads.own_loss import MakeOptimizer, MeanLoss
from autotune.workloads.seen import evaluating, unchanged

_PART = "batch_{}"
"""What a part of a Lightning module's batch is called that has no name of its own."""


class OwnTrainer(NamedTuple):
    """What brings a training: a transformers.Trainer, or a LightningModule, which is the model as well."""

    library: Literal["transformers", "lightning"]
    model: nn.Module
    """As it came."""
    adopt: Callable[[nn.Module], nn.Module]
    """Gives a model of that kind its trainer's loss for output."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    """Makes the optimizer of such a model, as it came."""


class Made(NamedTuple):
    """What a user's function gives."""

    model: nn.Module
    batch: Any
    loss: MeanLoss | None = None
    optimizer: MakeOptimizer | None = None
    trainer: OwnTrainer | None = None


def made_of(made: Any, label: str) -> Made:
    """The model and the batch in whatever a user's function gives. Raises UsageError where there are none."""
    if is_transformers(made):
        return _of_transformers(made)
    parts = list(made) if isinstance(made, Sequence) else [made]
    if parts and is_lightning(parts[0]):
        return _of_lightning(parts[0], parts[1:], label)
    if not (2 <= len(parts) <= 4 and isinstance(parts[0], nn.Module)):
        raise UsageError(
            f"{label} gives {kind_of(made)}; it should give a Workload, or (model, batch), (model, batch, loss), "
            "(model, batch, loss, optimizer), a transformers.Trainer, or (LightningModule, loader)"
        )
    model, batch, loss, optimizer = (*parts, None, None)[:4]
    if isinstance(optimizer, torch.optim.Optimizer) or not (optimizer is None or callable(optimizer)):
        raise UsageError(
            f"{label} gives {kind_of(optimizer)} for an optimizer; it should make one: "
            "lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    return Made(model, _first(batch), loss, optimizer)


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """What is made in here is not moved to an accelerator, of which this process is to know nothing: Accelerate reads
    this variable, and transformers' Trainer with it."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["ACCELERATE_USE_CPU"]
        else:
            os.environ["ACCELERATE_USE_CPU"] = before


def is_transformers(made: Any) -> bool:
    """Whether it is a transformers.Trainer."""
    return all(hasattr(made, name) for name in ("compute_loss", "get_train_dataloader", "create_optimizer"))


def is_lightning(made: Any) -> bool:
    """Whether it is a LightningModule, of whichever of its two packages."""
    return isinstance(made, nn.Module) and hasattr(made, "training_step") and hasattr(made, "configure_optimizers")


class Taught(nn.Module):
    """A model with its trainer's loss for output; ``forward`` takes a batch's parts by name. Its state is the model's,
    and so is whatever else is asked of it."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def takes(self) -> Takes:
        """What a batch may hold."""
        return Takes((), True)

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
    it so, which here is their number in a sample of the example batch times the samples."""

    def __init__(self, model: nn.Module, trainer: Any, batch: Mapping[str, Any]) -> None:
        super().__init__(model)
        count = getattr(trainer, "_get_num_items_in_batch", lambda *_: None)
        num_items = count([batch], torch.device("cpu"))
        self._per_sample = None if num_items is None else float(num_items) / _num_samples(batch)
        # a function, of which a copied model has no copy
        self._loss: Callable[..., Tensor] = lambda model, batch, options: trainer.compute_loss(model, batch, **options)

    @property
    def takes(self) -> Takes:
        """What the model takes, and all else that it is given."""
        return Takes(Takes.of(self.model).names, True)

    def forward(self, **batch: Any) -> Tensor:
        """The batch's mean loss."""
        options = {} if self._per_sample is None else {"num_items_in_batch": self._per_sample * _num_samples(batch)}
        return self._loss(self.model, dict(batch), options)


class _ByLightning(Taught):
    """The loss is ``training_step``'s; what that logs goes nowhere."""

    def __init__(self, module: Any, kind: type) -> None:
        super().__init__(module)
        self._kind: Any = kind
        self._takes_index = len(inspect.signature(module.training_step).parameters) > 1
        for name in ("log", "log_dict"):  # the compiler fails in them (lightning 2.6, torch 2.13)
            plain = types.MethodType(getattr(type(module), name), module)
            setattr(module, name, torch.compiler.disable(plain))  # type: ignore[no-untyped-call]
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


def mend_accumulation(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Has transformers' Trainer divide the losses of accumulated batches where the model does not.

    The Trainer leaves that to each model that takes keyword arguments, and gives it ``num_items_in_batch``; some pass
    that by (classifiers of BERT and DistilBERT, transformers 5.23), and would train with gradients as many times too
    large as there are micro batches. ``inputs`` are a few samples with their ``labels``; without these nothing is done.
    """
    if "labels" not in inputs or hasattr(type(model), "accepts_loss_kwargs"):
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model), unchanged(model):
        try:
            mean, counted = (model(**inputs, **extra)["loss"] for extra in ({}, {"num_items_in_batch": 1e3}))
        except Exception:  # noqa: BLE001 - what the model does not take; the Trainer then sees that for itself
            return
    if torch.equal(mean, counted):
        model.accepts_loss_kwargs = False  # type: ignore[assignment]


def _of_transformers(trainer: Any) -> Made:
    """A global batch is what the Trainer takes a step on: its batch, times its accumulation."""
    loader = trainer.get_train_dataloader()
    batch = _first(
        DataLoader(
            loader.dataset,
            batch_size=trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
            shuffle=not isinstance(loader.dataset, IterableDataset),
            collate_fn=loader.collate_fn,
        )
    )
    model = trainer.model.cpu()

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        trainer.model, trainer.optimizer = model, None
        made: torch.optim.Optimizer = trainer.create_optimizer()
        return made

    def adopt(model: nn.Module) -> nn.Module:
        return _ByTransformers(model, trainer, batch)

    return Made(adopt(model), batch, trainer=OwnTrainer("transformers", model, adopt, optimizer))


def _of_lightning(module: Any, rest: Sequence[Any], label: str) -> Made:
    """The batch is what follows the module, a loader's or a data module's first, or of the module's own loader."""
    if not getattr(module, "automatic_optimization", True):
        raise UsageError(
            f"{label} trains by an optimization of its own (automatic_optimization is off); give a step's model and "
            "loss: (model, batch, loss)"
        )
    source = rest[0] if rest else module
    if hasattr(source, "train_dataloader"):
        for hook in ("prepare_data", "setup"):
            if hasattr(source, hook) and source is not module:
                getattr(source, hook)(*(["fit"] if hook == "setup" else []))
        source = source.train_dataloader()
    batch = _first(source)
    kind = type(batch)
    if isinstance(batch, Tensor):
        batch = [batch]
    named = batch if isinstance(batch, Mapping) else {_PART.format(i): part for i, part in enumerate(batch)}

    def adopt(model: nn.Module) -> nn.Module:
        return _ByLightning(model, kind)

    own = OwnTrainer("lightning", module, adopt, lambda model: _configured(model, label))
    return Made(adopt(module), named, trainer=own)


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


def _first(batches: Any) -> Any:
    """A loader's first batch, on the CPU, whatever random numbers there were; a batch as it is."""
    if isinstance(batches, Tensor | Mapping | list | tuple) or not hasattr(batches, "__iter__"):
        return batches
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = next(iter(batches))
    if isinstance(batch, Mapping):
        return {name: _on_host(part) for name, part in batch.items()}
    return tree_map(_on_host, batch)


def _on_host(part: Any) -> Any:
    return part.cpu() if isinstance(part, Tensor) else part


def _num_samples(batch: Mapping[str, Any]) -> int:
    return next(len(part) for part in batch.values() if isinstance(part, Tensor) and part.dim())
