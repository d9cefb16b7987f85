"""What of a strategy lies in the model and in this process, put there for a loop that is not ours."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from autotune.apply import set_model, set_process
from autotune.backends.base import Backend
from autotune.compiler import compile_model, compiled
from autotune.errors import UsageError, kind_of
from autotune.integrations.arguments import warn
from autotune.models.attention import hold
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.own_batch import refuse_wrapped
from autotune.workloads.own_trainer import is_lightning

_OWN_ONLY = (("graphs", "step"), ("padding", "packed"))
"""What ``run.step`` alone does."""


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
            warn(f"{knob}={value} is for run.step only, and left out; --without {knob}={value} searches without it")
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


def _hide_logging(module: nn.Module) -> None:
    """The compiler leaves a module's ``log`` alone, in which it fails (torch 2.12 and 2.13): as Lightning itself has it
    since pytorch-lightning#21837."""
    for kind in type(module).__mro__:
        own = vars(kind).get("log")
        if own is None or hasattr(own, "_torchdynamo_disable"):
            continue
        if kind.__module__.startswith(("lightning.", "pytorch_lightning.")):
            kind.log = torch.compiler.disable(own)  # type: ignore[attr-defined, no-untyped-call]
