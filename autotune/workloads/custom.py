"""A user's own workload: a function in ``my_train.py:workload`` or ``package.module:workload``.

It gives a Workload, or only a model and its loader or an example batch (and a loss, where the model has none of its
own, and what makes the optimizer), or a trainer that has them (own_trainer.py). All that tuning needs is found from the
model and a batch, which is the recipe's global batch; trained is on the loader's data (own_data.py), or else on that
batch again and again. Every process calls the function anew, so that it must give the same each time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils.data import default_collate

from autotune.data.batching import Part, num_steps
from autotune.errors import UsageError, kind_of, words_of
from autotune.strategy import Attention
from autotune.workloads.base import Recipe, Workload, WorkloadRef
from autotune.workloads.own_batch import Batch, Repeated, Takes, Trimmed
from autotune.workloads.own_data import Data, Samples, Source, loaders_of
from autotune.workloads.own_loss import MeanLoss, OwnLoss, gives_loss, num_classified, scores_classes, summed
from autotune.workloads.own_trainer import OwnTraining, first_batch, on_host, training_of_trainer
from autotune.workloads.seen import evaluating, unchanged

EPOCH_BATCHES, TEST_BATCHES = 1000, 50
"""An example batch stands for an epoch of so many, and for a test set of so many; so many are planned at least."""
_OWN_NUMBERS = "its data draw from random numbers of their own, which trials could not draw again"
ONE_BATCH = (
    "Its loader gives one example batch again and again: there is nothing else to be had of what the function gives. "
    "Train in a loop of your own: run.step(run.split(batch))."
)
_TAKE_TARGETS = (("targets",), ("target",), ("labels",), ("label",))
"""A forward's last argument, by which it is given what it takes the loss to."""
RECIPE = Recipe(learning_rate=1e-4, weight_decay=0.01, warmup_steps=100, clip_norm=None, global_batch=1, epochs=1)
"""What the recipe is but for the global batch, where there is only a model and a batch."""


class Custom:
    """What a workload module provides, from a user's function (or from what it would give)."""

    def __init__(self, spec: str, label: str, made: Any) -> None:
        self._spec, self._label = spec, label
        self._make: Callable[[], Any] = made if callable(made) else lambda: copy.deepcopy(made)

    @functools.cached_property
    def _workload(self) -> Workload:
        return workload_of(self._label, self._make)

    @property
    def RECIPE(self) -> Recipe:  # noqa: N802 - as modules name it
        """The workload's recipe."""
        return self._workload.recipe

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """What the model's attention can be switched to."""
        return self._workload.attentions

    @property
    def trim_refusal(self) -> str | None:
        """Why the model's samples keep their padding."""
        return self._workload.trim_refusal

    @property
    def num_parameters(self) -> int:
        """The model's."""
        return self._workload.num_parameters

    def prepare(self, data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
        """Calls the function once. Raises UsageError where what it gives is no workload, or for ``data``."""
        on_progress(f"calling {self._label}")
        if data is not None:
            raise UsageError(f"--data is for the built-in workloads; {self._label} brings its own")
        return WorkloadRef(name=self._spec, folder="", source=self._workload.source, limit=limit)

    def open_workload(self, ref: WorkloadRef) -> Workload:
        """The workload; with a limit, at most so many samples of each split."""
        workload = self._workload
        if ref.known == ():
            example = workload.example
            part = example.some(TEST_BATCHES * workload.recipe.global_batch)
            workload = dataclasses.replace(workload, train=example, test=part, source=ref.source)
        elif ref.known:
            train = workload.train.as_known(ref.known[0])
            is_part = workload.test.source is workload.train.source
            test = train.some(workload.num_test) if is_part else workload.test.as_known(ref.known[1])
            workload = dataclasses.replace(
                workload,
                train=train,
                test=test,
                max_tokens=max(known.width for known in ref.known),
                example=_typical(train, workload),
                is_padded_by_batch=ref.known[0].is_padded_by_batch,
                reading_busy=ref.known[0].busy,
            )
        if (limit := ref.limit) is not None:
            parts = (_limited(workload.train, limit), _limited(workload.test, limit))
            workload = dataclasses.replace(workload, train=parts[0], test=parts[1])
        return workload

    def look(self, ref: WorkloadRef, on_progress: Callable[[str], None]) -> WorkloadRef:
        """The same for trials: with samples of its data that were read already, where it brings data. Raises UsageError
        for batches that are none."""
        workload = self._workload
        if not isinstance(workload.train, Samples):
            return ref
        sets = [workload.train, *([] if workload.test.source is workload.train.source else [workload.test])]
        try:
            if not all(samples.is_repeatable(workload.recipe.global_batch) for samples in sets):
                return msgspec.structs.replace(
                    ref, known=(), source=_example_source(workload.recipe.global_batch, _OWN_NUMBERS)
                )
            known = tuple(samples.known(workload.recipe.global_batch, on_progress) for samples in sets)
        except UsageError:
            raise
        except Exception as exc:
            raise UsageError(f"the data of {self._label} cannot be read: {words_of(exc)}") from exc
        return msgspec.structs.replace(ref, known=known)


def workload_of(label: str, make: Callable[[], Any]) -> Workload:
    """The workload that a function gives, or that follows from its model and its example batch.

    Raises UsageError with what is wrong.
    """
    try:
        with on_host():
            given = make()
            if isinstance(given, Workload):
                return given
            own = training_of_trainer(given, label) or _training_of_model(given, label, make)
    except UsageError:
        raise
    except Exception as exc:
        raise UsageError(f"{label} failed: {words_of(exc)}") from exc
    takes, data = own.takes, own.data

    def batch_of(raw: Any) -> Batch:
        return Batch(raw, takes, label, own.of_whole(raw))

    example = batch_of(own.batch)
    if data.train is not None and example.size != min(data.train.batch_size, len(data.train.dataset)):
        data = Data(why_not="its loader's batches have other rows than samples")
    repeated = Repeated(example, EPOCH_BATCHES * example.size)
    train: Samples | Repeated = repeated
    test: Samples | Repeated = Repeated(example, TEST_BATCHES * example.size)
    source = _example_source(example.size, data.why_not)
    if data.train is not None:
        train = Samples.all_of(data.train, batch_of, example.width)
        if data.test is not None:
            test = Samples.all_of(data.test, batch_of, example.width)
        else:
            test = train.some(max(example.size, round(TEST_BATCHES / EPOCH_BATCHES * len(train.lengths))))
        source = f"{len(train.lengths):,} samples, {type(data.train.dataset).__name__}"
        source += "" if data.test is not None else f", {len(test.lengths):,} of them also to test on"
    recipe = Recipe(
        **{
            field: getattr(RECIPE, field)
            for field in RECIPE.__struct_fields__
            if field not in ("global_batch", "epochs")
        },
        global_batch=example.size,
        epochs=own.epochs or max(1, math.ceil(EPOCH_BATCHES / num_steps(train, example.size))),
    )
    return Workload(
        name=label,
        recipe=recipe,
        source=source,
        build_model=own.build,
        loop="loader" if own.loop == "own" and data.train is not None else own.loop,
        adopt=own.adopt,
        optimizer_of=own.optimizer_of,
        loss=functools.partial(summed, own.loss),
        loss_of=own.loss_of,
        num_correct=num_classified if scores_classes(own.loss) else None,
        train=train,
        test=test,
        example=repeated,
        max_tokens=example.width,
        collate=lambda data, indices, width: data.collate(indices, width),
        split=lambda raw, strategy, rounding: batch_of(raw).split(strategy, rounding),
        trim=lambda collate, rounding: Trimmed(collate, takes, label, rounding),
        is_masked=None,
        of_dataset=lambda dataset, lengths: Samples.all_of(
            Source(dataset, default_collate) if data.train is None else data.train._replace(dataset=dataset),
            batch_of,
            example.width,
            lengths,
        ),
    )


def _training_of_model(given: Any, label: str, make: Callable[[], Any]) -> OwnTraining:
    """The training of a model and a batch, and a loss and what makes an optimizer where there are such."""
    model, batches, loss, optimizer = _parts(given, label)
    batches, tests = loaders_of(batches)
    data = Data.of(batches, tests, is_asked=True)
    if isinstance(optimizer, torch.optim.Optimizer) or not (optimizer is None or callable(optimizer)):
        raise UsageError(
            f"{label} gives {kind_of(optimizer)} for an optimizer; it should make one: "
            "lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    if not (loss is None or callable(loss)):
        raise UsageError(f"{label} gives {kind_of(loss)} for a loss; it should be called as loss(output, targets)")
    own_loss = OwnLoss(label, loss, model)

    def build() -> nn.Module:
        built, _, *others = _parts(make(), label)
        own_loss.keep(built, *others)
        return built

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = (own_loss.optimizer(model) or optimizer)(model.parameters())
        return made

    batch, takes = first_batch(batches, data), Takes.of(model)
    is_taken = loss is None and isinstance(batch, list | tuple) and takes.names[len(batch) - 1 :] in _TAKE_TARGETS
    if is_taken and _gives_loss(model, batch):  # as forward(ids, targets) may
        takes = takes._replace(has_targets=False)
    return OwnTraining(
        batch=batch,
        data=data,
        takes=takes,
        build=build,
        optimizer_of=None if optimizer is None else optimizer_of,
        loss=loss,
        loss_of=own_loss.of,
    )


def _gives_loss(model: nn.Module, batch: Sequence[Any]) -> bool:
    """Whether a model that is given all of a batch gives its loss, by two samples."""
    with contextlib.suppress(Exception), torch.no_grad(), evaluating(model), unchanged(model):
        return gives_loss(model(*(part[:2] for part in batch)))
    return False


def _parts(given: Any, label: str) -> tuple[nn.Module, Any, MeanLoss | None, Any]:
    """Model, batch or loader, loss, optimizer; None for what there is not of the last two."""
    parts = list(given) if isinstance(given, Sequence) else [given]
    if not (2 <= len(parts) <= 4 and isinstance(parts[0], nn.Module)):
        raise UsageError(
            f"{label} gives {kind_of(given)}; it should give (model, DataLoader), or (to_train, to_test) or a batch in "
            "its place, and behind them a loss and an optimizer of its own if it has such; a transformers.Trainer, or "
            "(LightningModule, loader); or an autotune.workloads Workload"
        )
    model, batches, loss, optimizer = (*parts, None, None)[:4]
    return model, batches, loss, optimizer


def _example_source(batch_size: int, why: str) -> str:
    return f"an example batch of {batch_size}, {EPOCH_BATCHES:,} times an epoch" + (f" ({why})" if why else "")


def _typical(train: Samples, workload: Workload) -> Repeated:
    """A batch of all lengths: what couples samples, or does without padding, shows in it."""
    size = workload.recipe.global_batch
    if len(train.lengths) < size or len(set(train.lengths.tolist())) == 1:
        found: Repeated = workload.example
        return found
    return Repeated(train.batch(train.typical(size)), EPOCH_BATCHES * size)


def _limited(data: Any, limit: int) -> Any:
    return data.some(limit) if isinstance(data, Repeated | Samples) else Part(data, limit)
