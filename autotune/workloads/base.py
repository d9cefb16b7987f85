"""What a workload is: model, data, loss and recipe. Built in any process from a small reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autotune.data.batching import Indices, MicroBatch, Rounding, collate, num_steps
from autotune.errors import AutotuneError, UsageError
from autotune.models.blocks import find_blocks
from autotune.models.cross_entropy import summed_cross_entropy, takes_parts
from autotune.strategy import Attention, Padding, Strategy, baseline
from autotune.workloads import same, seen

_OTHER_STATISTICS = "batch normalisation would train on other statistics"
Loop = Literal["autotune", "own", "loader", "transformers", "lightning"]
Schedule = Literal["cosine", "linear", "restarts", "onecycle", "constant"]


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of training that tuning must not change."""

    learning_rate: Annotated[float, msgspec.Meta(gt=0)]
    """AdamW's, at its highest."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)]
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)]
    """Optimizer steps of linear warm-up before the schedule's own shape; ``onecycle`` has its own."""
    clip_norm: Annotated[float, msgspec.Meta(gt=0)] | None
    """Gradients are clipped to this global L2 norm; None: not at all."""
    global_batch: Annotated[int, msgspec.Meta(ge=1)]
    """Samples per optimizer step."""
    epochs: Annotated[int, msgspec.Meta(ge=1)]
    schedule: Schedule = "cosine"
    """What follows the warm-up: a half ``cosine``, a ``linear`` fall, a cosine with ``restarts``, the ``constant`` full
    rate; or ``onecycle`` from the first step."""
    least_rate: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """What the rate falls to; ``onecycle`` has an end of its own."""
    label_smoothing: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """Share of a target that is spread over all classes (Szegedy et al. 2016), in training only."""

    def __post_init__(self) -> None:
        if self.least_rate > self.learning_rate:
            raise ValueError(f"least_rate, {self.least_rate:g}, is above learning_rate, {self.learning_rate:g}")


@dataclass(frozen=True)
class CrossEntropy:
    """Summed over samples, in fp32; a sample of tokens counts as their mean."""

    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """From logits [B, C] and classes [B], or [B, T, C] and [B, T]."""
        per_sample = targets[0].numel() if len(targets) else 1
        rows, targets = logits.flatten(0, -2), targets.flatten()
        if not self.label_smoothing and takes_parts(rows, targets):
            return summed_cross_entropy(rows, targets) / per_sample
        loss = F.cross_entropy(rows.float(), targets, reduction="sum", label_smoothing=self.label_smoothing)
        return loss / per_sample


def num_correct(logits_BC: Tensor, micro: MicroBatch) -> Tensor:
    """Samples whose class, of the targets [B], has the largest logit."""
    found: Tensor = (logits_BC.argmax(-1) == micro.targets).sum()
    return found


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of a user's own data that were read before it is measured with."""

    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens in each."""
    width: int
    """Tokens that the widest batch was padded to."""
    is_padded_by_batch: bool
    """Whether batches are padded to their own longest sample, and not all to one limit."""
    busy: float
    """Share of a core that reading them takes: all of one, or where it waits most of the time, an eighth."""


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
    known: tuple[Known, ...] | None = None
    """What trials take of a user's own data, and of that to test on where it is other data: all there is if None; if
    nothing, the example batch alone."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Model, data, loss and recipe."""

    name: str
    recipe: Recipe
    source: str
    build_model: Callable[[], nn.Module]
    """A fresh model on the CPU, initialised from torch's current seed."""
    loop: Loop = "autotune"
    """Whose loop trains it: autotune's, the user's own with batches of its own or ``run.loader``'s, or a trainer's."""
    adopt: Callable[[nn.Module], nn.Module] = lambda model: model
    """Makes a model of the user's what is trained here: one that gives its trainer's loss, where there is a trainer."""
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    """Makes the optimizer of such a model, which has its own rate and no schedule; None: AdamW, by the recipe. Raises
    UsageError where there is none to be had."""
    loss: Callable[[Any, Any], Tensor]
    """Loss *summed* over samples, from the model's output and the targets, so that every split of a global batch into
    micro batches gives the same gradient."""
    loss_of: Callable[[nn.Module], Callable[[Any, Any], Tensor] | None] = lambda model: None
    """The loss that a model was made with, where each has one of its own. Raises UsageError for a model that has none
    and needs one."""
    num_correct: Callable[[Any, MicroBatch], Tensor] | None
    """How many samples of a micro batch were classified correctly, from the model's output; no number, or None for all
    batches, where the question has no meaning."""
    has_perplexity: bool = False
    """Whether a sample's loss is the mean of its tokens' cross-entropies, so that its exponential says something."""
    train: Any
    """Has ``lengths``, tokens in each sample, and where every epoch sees its samples in another way
    ``augmented(seed)``, which gives it as one does; the rest is between it and ``collate``."""
    test: Any
    max_tokens: int
    """What ``padding = max`` pads to."""
    collate: Callable[[Any, Indices, int], MicroBatch] = collate
    """A micro batch of the given samples, padded to the given width."""
    pack: Callable[[Any, Indices, int], MicroBatch] | None = None
    """The same without padding, all samples' tokens in one row; None where the model does not take that."""
    split: Callable[[Any, Strategy, Rounding], list[MicroBatch]] | None = None
    """A batch as a DataLoader gives it, cut up for ``Step``; None where batches come from ``train`` only."""
    trim: Callable[[Callable[[list[Any]], Any], Rounding], Callable[[list[Any]], Any]] | None = None
    """A collate function, whose batches lose the padding that none of their samples needs; None as above."""
    of_dataset: Callable[[Any, Sequence[int] | None], Any] = lambda dataset, lengths: dataset
    """What stands for ``train`` where the user brings a dataset, and may tell how many tokens its samples have."""
    example: Any = None
    """What the model is looked at with, as ``train`` is; None: with the first of ``train``."""
    is_padded_by_batch: bool = False
    """Whether batches come padded to their own longest sample, and not all to one limit."""
    reading_busy: float = 1.0
    """Share of a core that reading samples takes, 0 to 1."""
    is_masked: bool | None = True
    """Whether attention is told which tokens are padding; None: to be found out."""

    def with_recipe(self, recipe: Recipe) -> Workload:
        """The same with another recipe. Raises UsageError for what the user's own loss or optimizer brings."""
        loss = self.loss
        of_optimizer = ("learning_rate", "least_rate", "weight_decay", "warmup_steps", "schedule")
        changed = [name for name in of_optimizer if getattr(recipe, name) != getattr(self.recipe, name)]
        if changed and self.optimizer_of is not None:
            raise UsageError(f"{self.name} brings its own optimizer: set {' and '.join(changed)} there")
        if recipe.label_smoothing != self.recipe.label_smoothing:
            if not isinstance(loss, CrossEntropy):
                raise UsageError(f"label_smoothing is for the built-in losses; {self.name} brings its own")
            loss = CrossEntropy(recipe.label_smoothing)
        return dataclasses.replace(self, recipe=recipe, loss=loss)

    def perplexity(self, loss: float) -> float | None:
        """The exponential of a mean loss; None where that says nothing."""
        return math.exp(min(loss, 700.0)) if self.has_perplexity else None

    def loss_for(self, model: nn.Module) -> Callable[[Any, Any], Tensor]:
        """The loss that goes with this model."""
        return self.loss_of(model) or self.loss

    @functools.cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """What the model's attention can be switched to, the plain baseline's first."""
        return self.attentions_of(self.sample_model())

    def attentions_of(self, model: nn.Module) -> tuple[Attention, ...]:
        """The same for another model, which is run on a sample where it does not say."""
        return seen.attentions(self, model)

    @functools.cached_property
    def refused_kernels(self) -> dict[Attention, str]:
        """Pinned kernels that do not run this model's training on a CPU, with the reason."""
        return seen.refused_kernels(self, self.sample_model())

    def check_runs(self) -> None:
        """Raises UsageError where a model and a batch of the user's own do not get to a loss, on a CPU."""
        if self.split is not None:
            seen.check_runs(self, self.sample_model())

    @functools.cached_property
    def has_masked_attention(self) -> bool:
        """Whether attention is told which tokens are padding: kernels that take no mask are for models where not."""
        if self.is_masked is not None:
            return self.is_masked
        return seen.is_masked(self, self.sample_model())

    @functools.cached_property
    def split_refusal(self) -> str | None:
        """Why micro batches would not train the same as the whole batch; None where they do. Asked of a model and a
        batch: a Workload says itself what its loss is summed over."""
        if self.split is None:
            return _OTHER_STATISTICS if self.has_batch_norm else None
        reason = same.split_refusal(self, self.sample_model())
        return _OTHER_STATISTICS if reason is not None and self.has_batch_norm else reason

    @functools.cached_property
    def mixing_refusal(self) -> str | None:
        """Why batches of other samples than a plain shuffle's would train something else; None where they do not."""
        is_asked = self.split is not None and self.split_refusal is not None
        return same.mixing_refusal(self, self.sample_model()) if is_asked else None

    @functools.cached_property
    def recompute_refusal(self) -> str | None:
        """Why blocks that are computed again would not train the same; None where they do."""
        return None if self.split is None else same.recompute_refusal(self, self.sample_model())

    @functools.cached_property
    def trim_refusal(self) -> str | None:
        """Why samples without their padding would not train the same; None where they do."""
        return None if self.split is None else same.trim_refusal(self, self.sample_model())

    def collate_for(self, padding: Padding) -> Callable[[Any, Indices, int], MicroBatch]:
        """What makes micro batches under a padding. Raises AutotuneError where the model does not take them."""
        if padding != "packed":
            return self.collate
        if self.pack is None:
            raise AutotuneError(
                f"padding=packed needs a model that takes sequences in one row, {self.name}'s does not; search with "
                "this model, or set padding to longest in the profile"
            )
        return self.pack

    @property
    def baseline(self) -> Strategy:
        """The plain setting that everything is compared with."""
        plain = baseline(self.recipe.global_batch)
        is_trimmed = self.is_padded_by_batch and np.ptp(self.train.lengths) > 0 and self.trim_refusal is None
        padding: Padding = "longest" if is_trimmed else "max"
        return msgspec.structs.replace(plain, attention=self.attentions[0], padding=padding)

    @property
    def looked_at(self) -> Any:
        """Samples that the model is looked at with."""
        return self.train if self.example is None else self.example

    @property
    def looked_at_tokens(self) -> int:
        """What these are padded to under ``padding = max``."""
        return self.max_tokens if self.example is None else int(self.example.width)

    def sample_model(self) -> nn.Module:
        """A model to look at; the random numbers that it draws are not missed."""
        with torch.random.fork_rng(devices=[]):
            return self.build_model()

    @functools.cached_property
    def _bare_model(self) -> nn.Module:
        """The model without its weights, where it lets itself be built so."""
        try:
            with torch.device("meta"):
                return self.build_model()
        except (RuntimeError, TypeError, ValueError):  # what a constructor computes with its weights has no value yet
            return self.sample_model()

    @functools.cached_property
    def own_optimizer(self) -> torch.optim.Optimizer | None:
        """What ``optimizer_of`` makes for a model to look at; None where the recipe's AdamW trains."""
        return None if self.optimizer_of is None else self.optimizer_of(self.sample_model())

    @functools.cached_property
    def num_parameters(self) -> int:
        """Of the model, frozen ones included."""
        return sum(parameter.numel() for parameter in self._bare_model.parameters())

    @functools.cached_property
    def num_blocks(self) -> int:
        """Repeated blocks, for the checkpoint knob."""
        return len(find_blocks(self._bare_model))

    @functools.cached_property
    def has_convolutions(self) -> bool:
        """Whether the model works on images, for the memory format."""
        return any(isinstance(module, nn.Conv2d) for module in self._bare_model.modules())

    @functools.cached_property
    def has_batch_norm(self) -> bool:
        """Whether what is trained depends on which samples share a micro batch."""
        return any(isinstance(module, _BatchNorm) for module in self._bare_model.modules())

    @property
    def num_train(self) -> int:
        """Training samples."""
        return len(self.train.lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps on ``train``."""
        return num_steps(self.train, self.recipe.global_batch)

    @property
    def num_test(self) -> int:
        """Test samples."""
        return len(self.test.lengths)
