"""A loss of the user's own belongs to the model that it came with."""

from __future__ import annotations

import functools
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune import backends
from autotune.apply import apply
from autotune.errors import UsageError
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from autotune.workloads.own_loss import read_by
from tests.own_models import (
    classes,
    net,
)

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
