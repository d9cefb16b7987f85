"""Whether strategies train alike: real models, every split and padding, and models that are wrong on purpose."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autotune import backends, trace, workloads
from autotune.apply import Run, apply
from autotune.models.encoder import EncoderClassifier
from autotune.strategy import Strategy
from autotune.workloads.base import Workload

CPU = backends.get("cpu")


@pytest.fixture(scope="module")
def workload(tiny_reviews: Path) -> Workload:
    module = workloads.get("imdb")
    prepared = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    return dataclasses.replace(
        prepared,
        max_tokens=64,
        build_model=lambda: EncoderClassifier(width=32, num_heads=2, ffn_width=64, num_layers=2, max_tokens=64),
    )


def run(workload: Workload, strategy: Strategy) -> Run:
    return apply(strategy, workload, CPU, total_steps=trace.NUM_STEPS)


@pytest.fixture(scope="module")
def reference(workload: Workload) -> tuple[float, ...]:
    return trace.losses(run(workload, Strategy(micro_batch=32)))


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(micro_batch=32, padding="longest"),
        Strategy(micro_batch=8, accumulation=4, padding="buckets"),
        Strategy(micro_batch=1, accumulation=32, padding="buckets", attention="sdpa"),
        Strategy(micro_batch=16, accumulation=2, checkpoint="every_block", attention="sdpa_math"),
        Strategy(micro_batch=8, accumulation=4, padding="longest", precision="bf16"),
    ],
)
def test_settings_that_train_alike_are_within_tolerance(
    workload: Workload, reference: tuple[float, ...], strategy: Strategy
) -> None:
    found = trace.losses(run(workload, strategy))
    assert trace.difference(strategy, reference, found) is None
    assert len(found) == trace.NUM_STEPS


def test_a_few_samples_tell_whether_padding_is_masked(workload: Workload) -> None:
    found = [trace.losses(run(workload, Strategy(micro_batch=32, padding=p)), 1, 4) for p in ("max", "longest")]
    assert trace.deviation(*found) <= trace.TOLERANCE["fp32"]
    whole = trace.losses(run(workload, Strategy(micro_batch=32)), 1)
    assert trace.deviation(whole, found[0]) > trace.TOLERANCE["fp32"], "four samples are others than 32"


def test_the_second_pass_has_learnt_from_the_first(reference: tuple[float, ...]) -> None:
    first, second = reference[: trace.NUM_BATCHES], reference[trace.NUM_BATCHES :]
    assert sum(second) < 0.99 * sum(first)


def test_gradients_that_are_lost_are_noticed(workload: Workload, reference: tuple[float, ...]) -> None:
    broken = run(workload, Strategy(micro_batch=32))
    for parameter in broken.model.parameters():
        parameter.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
    reason = trace.difference(broken.strategy, reference, trace.losses(broken))
    assert reason is not None
    assert "fp32 baseline" in reason


def test_dropout_comes_back_afterwards(workload: Workload) -> None:
    found = run(workload, Strategy(micro_batch=32))
    before = [module.p for module in found.model.modules() if isinstance(module, nn.Dropout)]
    trace.losses(found, 1)
    assert [module.p for module in found.model.modules() if isinstance(module, nn.Dropout)] == before
    assert max(before) > 0


def test_losses_that_vanish_are_no_scale() -> None:
    # hf:distilbert-base-uncased from random weights, on a CPU
    fp32 = (0.7009, 0.4049, 0.2174, 0.0976, 0.0936, 0.0378, 0.0143, 0.0084)
    bf16 = (0.7007, 0.4057, 0.2191, 0.0961, 0.0962, 0.0399, 0.0153, 0.0090)
    assert trace.deviation(fp32, bf16) == pytest.approx(0.0026 / 0.3007, rel=0.01)
    assert trace.difference(Strategy(micro_batch=32, precision="bf16"), fp32, bf16) is None
    unlearning = (0.7009,) * 8
    assert trace.difference(Strategy(micro_batch=32, precision="bf16"), fp32, unlearning) is not None


def test_a_loss_that_is_no_number_is_infinitely_far() -> None:
    assert math.isinf(trace.deviation((0.7,), (math.nan,)))
    assert math.isinf(trace.deviation((0.7, 0.7), (0.7,)))


def test_a_training_that_makes_much_of_roundings_is_judged_by_them() -> None:
    """Losses that are a little off: by as much as the baseline's with its weights nudged, or by more."""
    fp32, bf16 = Strategy(micro_batch=32), Strategy(micro_batch=32, precision="bf16")
    reference, little, much = (1.0, 1.0), (1.0, 1.0005), (1.0, 1.1)
    assert trace.difference(fp32, reference, little, 5e-4) is None
    for rounding in (2e-4, math.inf, math.nan):
        assert trace.difference(fp32, reference, little, rounding) is not None
    assert trace.difference(fp32, reference, much, 1.0) is not None
    assert trace.difference(bf16, reference, much, 1.0) is not None
    doubtful = [trace.is_doubtful(*case) for case in ((fp32, reference, little), (fp32, reference, much))]
    assert doubtful == [True, False]
    assert not trace.is_doubtful(bf16, reference, little)
    reason = trace.difference(fp32, reference, (1.0, 1.00014))
    assert reason is not None
    assert "by 0.014% on the same batches, 0.01% is allowed in fp32" in reason


def test_nudged_weights_show_what_a_training_makes_of_roundings(workload: Workload) -> None:
    plain, nudged = (trace.losses(run(workload, Strategy(micro_batch=32)), nudge=share) for share in (0.0, trace.NUDGE))
    assert 0 < trace.deviation(plain, nudged) < trace.TOLERANCE["fp32"]

    class Chaos(EncoderClassifier):
        """Its weights' last digits decide."""

        def forward(self, *args: Any, **inputs: Any) -> torch.Tensor:
            digits = 1e6 * torch.stack([parameter.detach().double().sum() for parameter in self.parameters()]).sum()
            return super().forward(*args, **inputs) * (1 + 0.1 * torch.sin(digits).float())

    chaotic = dataclasses.replace(
        workload,
        build_model=lambda: Chaos(width=32, num_heads=2, ffn_width=64, num_layers=2, max_tokens=64),
    )
    plain, nudged = (trace.losses(run(chaotic, Strategy(micro_batch=32)), nudge=share) for share in (0.0, trace.NUDGE))
    assert trace.deviation(plain, nudged) > 10 * trace.TOLERANCE["fp32"]
