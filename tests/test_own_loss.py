"""A loss of the user's own belongs to the model that it came with."""

from __future__ import annotations

import copy
import functools
import gc
import io
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import default_data_collator

from autotune import backends
from autotune.apply import apply
from autotune.errors import UsageError
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from autotune.workloads.own_loss import read_by
from tests import own_trainers
from tests.own_models import classes, net

CPU = backends.get("cpu")


def penalised() -> Any:
    model = nn.Sequential(first := nn.Linear(8, 3))
    return model, classes(), lambda output, targets: F.cross_entropy(output, targets) + first.weight.abs().sum()


class Criterion:
    def __init__(self, model: nn.Module) -> None:
        self.parts = [model]

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) + torch.stack([p.abs().sum() for p in self.parts[0].parameters()]).sum()


def with_model(model: nn.Module, output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets) + model(classes()[0]).square().mean()  # type: ignore[no-any-return]


def test_a_model_in_a_loss_is_found_wherever_it_is_kept() -> None:
    ways: list[Callable[[nn.Module], Any]] = [
        Criterion,
        lambda model: functools.partial(with_model, model),
        lambda model: lambda output, targets: with_model(model, output, targets),
        lambda model: Criterion(model).__call__,
    ]
    for way in ways:

        def made(way: Callable[[nn.Module], Any] = way) -> Any:
            model = net()
            return model, classes(), way(model)

        workload = workload_of("reading", made)
        with pytest.raises(UsageError, match="reads a model that the function made"):
            workload.loss_for(net())
        workload.loss_for(workload.build_model())
    assert len(read_by(functools.partial(with_model, net()))) == 2
    teacher = net().requires_grad_(False)
    frozen = workload_of("taught", lambda: (net(), classes(), functools.partial(with_model, teacher)))
    frozen.loss_for(net())  # of which there is one for all models


def test_a_discarded_model_goes_with_its_loss() -> None:
    workload = workload_of("penalised", penalised)
    kept = [weakref.ref(workload.build_model()) for _ in range(3)]
    gc.collect()
    assert not any(reference() for reference in kept)
    torch.save(workload.build_model(), io.BytesIO())  # its loss is a lambda


def first_loss(workload: Workload, **given: Any) -> float:
    run = apply(Strategy(micro_batch=16), workload, CPU, **given)
    return float(run.step(run.split(classes())))


def test_a_loss_that_reads_its_model_reads_the_one_that_is_trained() -> None:
    """The function makes another each time, and the loss of the first says nothing of the second."""
    workload = workload_of("penalised", penalised)
    run, batch = apply(Strategy(micro_batch=16), workload, CPU), classes()
    (weight,) = (parameter for parameter in run.model.parameters() if parameter.dim() == 2)
    for _ in range(3):
        expected = F.cross_entropy(run.model(batch[0]), batch[1]) + weight.abs().sum()
        torch.testing.assert_close(run.step(run.split(batch)), expected.detach())
    own = net()
    with pytest.raises(UsageError, match=r"reads a model that the function made, not this one.*loss="):
        apply(Strategy(micro_batch=16), workload, CPU, model=own)
    given = first_loss(workload, model=own, loss=lambda output, targets: F.cross_entropy(output, targets) + 7)
    assert given == pytest.approx(float(F.cross_entropy(net()(batch[0]), batch[1]).detach()) + 7, rel=1e-5)


def test_accuracy_is_told_where_a_model_scores_classes() -> None:
    torch.manual_seed(0)
    model, inputs, classes = nn.Linear(3, 4), torch.randn(60, 3), torch.arange(60) % 4
    share = float((model(inputs).argmax(-1) == classes).float().mean())

    def accuracy(*parts: Any) -> float:
        workload = workload_of("of", lambda: (copy.deepcopy(model), *parts))
        return apply(Strategy(micro_batch=30, accumulation=2), workload, CPU).evaluate()[1]

    assert 0 < share < 1
    for loss in (None, F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)):
        assert accuracy((inputs, classes), loss) == pytest.approx(share)
    assert math.isnan(accuracy((inputs, classes), lambda output, targets: F.multi_margin_loss(output, targets)))
    assert math.isnan(accuracy((inputs, torch.randn(60, 4))))
    assert math.isnan(accuracy((inputs, classes.clone().fill_(-100).where(classes == 0, classes))))


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_accuracy_is_told_of_models_that_compute_their_loss() -> None:
    reviews = default_data_collator([own_trainers.Reviews()[index] for index in range(8)])
    workload = workload_of("of", lambda: (own_trainers.classifier(), reviews))
    run = apply(Strategy(micro_batch=4, accumulation=2, attention="sdpa"), workload, CPU)
    with torch.no_grad():
        chosen = run.model.eval()(**reviews).logits.argmax(-1)
    assert run.evaluate()[1] == pytest.approx(float((chosen == reviews["labels"]).float().mean()))
    beside = workload_of("of", lambda: (own_trainers.classifier(), {**reviews, "idx": torch.arange(8)}))
    run = apply(Strategy(micro_batch=8, attention="sdpa"), beside, CPU)
    assert run.evaluate()[1] == pytest.approx(float((chosen == reviews["labels"]).float().mean()))
    tokens = workload_of("of", own_trainers.tokens_without_trainer)  # a class for each token
    run = apply(Strategy(micro_batch=8, attention="sdpa"), tokens, CPU)
    assert math.isnan(run.evaluate()[1])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((net(), (torch.zeros(4, 8), torch.zeros(4))), r"gives \[4, 3\], and the targets are \[4\]: the mean squared"),
        ((nn.Linear(8, 1), (torch.zeros(4, 8), torch.zeros(4))), r"gives \[4, 1\], and the targets are \[4\]"),
        ((nn.Linear(8, 1), (torch.zeros(4, 8), torch.arange(4))), r"taken for classes, .* one score for each; give"),
        ((net(), (torch.zeros(4, 8), torch.arange(4))), "Target 3 is out of bounds. The model scores 3 classes"),
        (
            (net(), classes(4), lambda output, targets: F.cross_entropy(output, targets, reduction="none")),
            r"the loss gives \[4\] numbers; it should give one, a batch's mean",
        ),
    ],
)
def test_what_is_wrong_with_a_loss_is_said_in_a_line(made: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        workload_of("wrong", lambda: made).check_runs()
