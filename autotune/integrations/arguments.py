"""What a trainer is to be told, in its own words, and what its user is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

from autotune.backends.base import Backend
from autotune.errors import UsageError
from autotune.strategy import Strategy

Part = Literal["transformers", "lightning", "accelerate", "optimizer"]
"""Whose arguments: of ``transformers.TrainingArguments``, ``lightning.Trainer``, ``accelerate.Accelerator``, or of one
of torch's optimizers."""
_MIXED = {"fp8": "bf16", "bf16": "bf16", "fp16": "fp16"}
"""Autocast's type, by precision."""


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
    if part == "lightning" and strategy.accumulation > 1:
        warn(
            f"Lightning counts micro batches, {strategy.accumulation} of which are one of your batches: for "
            "on_train_batch_end, and for limit_train_batches and val_check_interval where they are whole numbers"
        )
    return makers[part](strategy, backend)


def warn(words: str) -> None:
    """Warns whoever has called a method of ``Tuned``."""
    warnings.warn(words, stacklevel=4)


def _transformers(strategy: Strategy, backend: Backend) -> dict[str, Any]:
    found = {
        "per_device_train_batch_size": strategy.micro_batch,
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
