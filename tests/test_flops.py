"""What training a sample takes by the model's own arithmetic, and the share of the device's rate that is used."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from autotune.data.batching import collate
from autotune.flops import flops_of, matmul_capability
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests import factories
from tests.test_terminal import result

VOCABULARY, WIDTH, LAYERS, FFN = 10_000, 256, 4, 1024


def test_the_encoder_s_operations_are_those_of_its_matrix_products(prepared: tuple[object, Workload]) -> None:
    workload = prepared[1]
    lengths = workload.train.lengths.astype(float)
    per_token = LAYERS * (3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * WIDTH * FFN)
    attention = LAYERS * 2 * WIDTH  # times the length squared: scores, and their sum of values
    forward = 2 * (per_token * lengths + attention * lengths**2 + WIDTH * 2)
    # the backward pass takes each product twice over
    found = flops_of(workload)
    assert found.per_sample == pytest.approx(3 * forward.mean(), rel=0.01)
    assert found.cost.per_square / found.cost.per_token == pytest.approx(attention / per_token, rel=0.01)


def test_a_user_s_linear_layer_is_counted_without_its_input_s_gradient() -> None:
    workload = workload_of("own", lambda: (nn.Linear(16, 3), (torch.zeros(8, 16), torch.zeros(8, dtype=torch.long))))
    assert flops_of(workload).per_sample == pytest.approx(2 * 2 * 16 * 3)


def test_a_model_that_cannot_run_without_data_has_no_figure(prepared: tuple[object, Workload]) -> None:
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.weight * float(inputs["ids_BT"].sum())

    workload = dataclasses.replace(prepared[1], build_model=Curious, collate=collate)
    found = flops_of(workload)
    assert found.per_sample is None
    assert found.reason.startswith("the model does not run without data: ")


def test_utilisation_is_the_model_s_rate_over_the_device_s() -> None:
    found = result()
    assert found.utilisation(found.baseline) == pytest.approx(10.0 * 1e9 / 100e9)
    assert found.utilisation(found.best) == pytest.approx(50.0 * 1e9 / 500e9)
    unknown = factories.trial(3, Strategy(micro_batch=32, precision="fp16"))
    assert found.utilisation(unknown) is None
    assert matmul_capability("bf16_weights") == "matmul.bf16"


def test_lengths_that_are_all_the_same_are_counted_once() -> None:
    batch = torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, dtype=torch.long)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.embedding(ids).mean(1))
            return logits

    workload = workload_of("own", lambda: (Model(), batch))
    assert set(np.asarray(workload.train.lengths)) == {16}
    assert flops_of(workload).per_sample == pytest.approx(3 * 2 * 8 * 2)
