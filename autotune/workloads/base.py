"""What a workload is: model, data, loss and recipe. Built in any process from a small reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from torch import Tensor, nn

from autotune.data.batching import SequenceData


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of training that tuning must not change."""

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    """Optimizer steps of linear warm-up; a cosine to zero follows."""
    clip_norm: float
    """Gradients are clipped to this global L2 norm."""
    global_batch: int
    """Samples per optimizer step."""
    epochs: int


class WorkloadRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prepared workload lies, so that a trial process can open it in milliseconds."""

    name: str
    folder: str
    """The tokenized data."""
    source: str
    """Where the data came from, for people."""
    notice: str | None = None
    """What a person should know about the data."""
    limit: int | None = None
    """At most so many samples of each split."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Model, data, loss and recipe."""

    name: str
    recipe: Recipe
    source: str
    build_model: Callable[[], nn.Module]
    """A fresh model on the CPU, initialised from torch's current seed."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Loss *summed* over samples, from the model's output and the targets, so that every split of a global batch into
    micro batches gives the same gradient."""
    num_correct: Callable[[Tensor, Tensor], Tensor]
    """How many samples of a batch were classified correctly."""
    train: SequenceData
    test: SequenceData
    max_tokens: int
    num_blocks: int
    """Transformer blocks, for the checkpoint knob."""

    @property
    def num_train(self) -> int:
        """Training samples."""
        return len(self.train.lengths)

    @property
    def num_test(self) -> int:
        """Test samples."""
        return len(self.test.lengths)
