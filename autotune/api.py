"""The Python API: this device's profile, put into effect on a model, an optimizer and a dataset."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

from autotune import backends, store
from autotune.backends.base import Backend
from autotune.errors import AutotuneError
from autotune.profile import Profile
from autotune.strategy import Attention, Padding, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from autotune.apply import OptimizerFactory, Run
    from autotune.integrations.arguments import Part
    from autotune.workloads.base import Workload

M = TypeVar("M")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A strategy for this device, ready to apply."""

    name: str
    strategy: Strategy
    profile: Profile | None
    """The evidence; None where there is no profile and the strategy is the safe default."""
    path: Path | None
    """The profile's file."""
    backend: Backend
    data: Path | None = None
    limit: int | None = None

    @functools.cached_property
    def workload(self) -> Workload:
        """The workload that the strategy is for; reading and tokenizing its data may take seconds the first time."""
        from autotune import workloads

        module = workloads.get(self.name)
        ref = module.prepare(self.data, limit=self.limit, on_progress=lambda _: None)
        if ref.notice:
            warnings.warn(ref.notice, stacklevel=4)  # where ``apply`` is called
        return module.open_workload(ref)

    def apply(
        self,
        model: nn.Module | None = None,
        *,
        optimizer: OptimizerFactory | None = None,
        dataset: Any = None,
        lengths: Sequence[int] | None = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        clip_norm: float | None = None,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> Run:
        """Model, optimizer, loader and ``step()`` ready to train; what is not given is the workload's own.

        ``dataset`` is map-style; ``lengths`` are the tokens in each of its samples, without which every sample is read
        once where the strategy's padding is ``buckets``.
        ``optimizer`` makes one from parameters: ``lambda parameters: torch.optim.SGD(parameters, lr=0.1)``; its
        schedule is then yours. ``loss`` gives a batch's mean from your model's output and the targets, in place of the
        workload's: needed where that reads its model. ``clip_norm`` is the global L2 norm that gradients are clipped
        to, by default the recipe's; a model with an example batch has none. Raises AutotuneError where the model cannot
        take a knob.
        """
        from autotune.apply import apply
        from autotune.workloads.custom import ONE_BATCH

        run = apply(
            self.strategy,
            self.workload,
            self.backend,
            model=model,
            optimizer=optimizer,
            dataset=dataset,
            lengths=lengths,
            loss=loss,
            clip_norm=clip_norm,
            total_steps=total_steps,
            seed=seed,
        )
        if self.workload.loop == "own" and dataset is None:
            run.loader.caveat = ONE_BATCH
        return run

    def prepare(self, model: M, *, lengths: Sequence[int] | None = None) -> M:
        """The model, for a loop or a trainer of your own, as the strategy has it: attention, recomputation,
        compilation, memory format; and this process, for good: threads, allocator, TF32, pinned attention kernel.
        Precision, batches and the optimizer are the trainer's: ``arguments``, ``loader``.

        Or a transformers.Trainer that was made with ``arguments``: its model, and its batches as well, put together by
        ``lengths``, the tokens in each sample; without them every sample is asked once. Raises AutotuneError where the
        model cannot take a knob.
        """
        from autotune.integrations.model import prepare
        from autotune.integrations.trainer import prepare_trainer
        from autotune.workloads.own_trainer import is_transformers

        if is_transformers(model):
            prepare_trainer(model, self.strategy, self.workload, self.backend, lengths)
        else:
            prepare(cast("nn.Module", model), self.strategy, self.workload, self.backend)
        return model

    def arguments(self, part: Part) -> dict[str, Any]:
        """Keyword arguments for ``transformers.TrainingArguments`` (``part="transformers"``), ``lightning.Trainer``
        (``"lightning"``), ``accelerate.Accelerator`` (``"accelerate"``), or one of torch's optimizers
        (``"optimizer"``). Warns of what a trainer cannot have.

        Raises UsageError for another part.
        """
        from autotune.integrations.arguments import arguments

        return arguments(part, self.strategy, self.backend)

    def loader(
        self,
        data: Any,
        *,
        lengths: Sequence[int] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> DataLoader[Any]:
        """Your DataLoader's batches as the strategy's micro batches, with its workers and padding; sampler,
        ``collate_fn`` and ``drop_last`` stay yours. Of a map-style dataset alone these are as in the loader that was
        searched with, and the order is by ``seed``, as it is where samples of similar length are put together.

        ``lengths`` are the tokens in each sample: needed where the strategy's padding is ``buckets``.
        Raises UsageError for a built-in workload, which has a loader of its own, and for batches of your own making.
        """
        from autotune.integrations.batches import loader

        return loader(
            data, self.strategy, self.workload, self.backend, lengths=lengths, collate_fn=collate_fn, seed=seed
        )

    def trim(self, collate_fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """``collate_fn``, for a loader of your own, without the padding (by ``attention_mask``) that no sample of a
        batch needs; itself where the strategy's padding is ``max``. Raises UsageError as ``loader`` does."""
        from autotune.integrations.batches import trimmed

        return trimmed(collate_fn, self.strategy, self.workload, self.backend)


def load(
    name: str,
    *,
    pick: str | None = None,
    profiles: Path | str | None = None,
    data: Path | None = None,
    limit: int | None = None,
) -> Tuned:
    """This device's profile for a workload; safe defaults, with a warning, where there is none.

    ``pick`` chooses where a profile has several: ``"leanest"``, or ``"memory<4GiB"`` for the fastest that fits.
    ``profiles`` is a folder to look in first, ``data`` and ``limit`` are as in ``autotune train``. Raises UsageError
    for an unknown workload, AutotuneError for a broken profile, or one that has no such choice.
    """
    from autotune import workloads

    wanted, backend = workloads.wanted(name), backends.find()
    device = backend.device()
    found = store.find_profile(device, wanted, None if profiles is None else Path(profiles))
    if found is None and pick is not None:
        raise AutotuneError(f"there is no profile for {name} to pick {pick!r} from; make one: autotune search")
    if found is None:
        warnings.warn(
            f"no profile for {name} on this device, safe defaults are used; make one: autotune search --model {name}",
            stacklevel=2,
        )
        strategy, profile, path = safe_defaults(name), None, None
    else:
        profile, path = found
        if words := store.caveat(profile, device):
            warnings.warn(words, stacklevel=2)
        profile = profile if pick is None else profile.pick(pick)
        strategy = profile.strategy
    return Tuned(name=name, strategy=strategy, profile=profile, path=path, backend=backend, data=data, limit=limit)


def safe_defaults(name: str) -> Strategy:
    """What helps everywhere and risks nothing: torch's choice of attention kernel, padding to the longest where the
    model trains the same so."""
    from autotune import workloads

    module = workloads.get(name)
    attentions = getattr(module, "attentions", get_args(Attention))
    attention: Attention = "sdpa" if "sdpa" in attentions else attentions[0]
    padding: Padding = "longest" if getattr(module, "trim_refusal", None) is None else "max"
    return Strategy(attention=attention, padding=padding, micro_batch=module.RECIPE.global_batch)
