"""fp8 linear layers. A CPU rounds as the hardware does and computes in 16 bits; the hardware's own is tests/gpu's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autotune import backends
from autotune.apply import Run, apply
from autotune.errors import AutotuneError
from autotune.models.encoder import EncoderClassifier
from autotune.strategy import Precision, Strategy
from autotune.workloads.custom import workload_of

pytest.importorskip("torchao", reason="fp8 needs torchao: pip install 'autotune-torch[fp8]'")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return EncoderClassifier(
        vocabulary_size=50, max_tokens=16, width=32, num_heads=2, ffn_width=64, num_layers=2, dropout=0.0
    )


def run_of(model: nn.Module, precision: Precision) -> Run:
    ids = torch.randint(1, 50, (8, 16), generator=torch.Generator().manual_seed(0))
    workload = workload_of("fp8", lambda: (encoder(), (ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 0] % 2)))
    return apply(Strategy(micro_batch=8, precision=precision), workload, backends.get("cpu"), model=model)


def test_linear_layers_are_replaced_but_for_those_that_do_not_fit_and_the_keys_stay() -> None:
    model = encoder()
    keys, own = list(model.state_dict()), model
    run = run_of(model, "fp8")
    assert run.model is own
    assert list(run.model.state_dict()) == keys
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["blocks.0.attention.qkv"] == kinds["blocks.1.ffn.2"] == "Float8Linear"
    assert kinds["head"] == "Linear", "two classes are no multiple of sixteen"


def test_it_trains_and_rounds_more_coarsely_than_bf16() -> None:
    losses = {}
    for precision in ("fp32", "bf16", "fp8"):
        run = run_of(encoder(), precision)
        batch = next(iter(run.loader))
        losses[precision] = [float(run.step(batch)) for _ in range(20)]
    assert losses["fp8"][-1] < losses["fp8"][0]
    off = {name: abs(found[0] - losses["fp32"][0]) for name, found in losses.items()}
    assert 0 < off["bf16"] < off["fp8"] < 0.1


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(AutotuneError, match="multiples of 16"):
        run_of(nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(128, 2)), "fp8")
