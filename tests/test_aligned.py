"""Large linear layers computed in multiples: the same numbers, the same parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from autotune import backends
from autotune.apply import Run, apply
from autotune.models.aligned import AlignedLinear, align_linear
from autotune.strategy import Precision, Strategy
from autotune.workloads.custom import workload_of


class Speaker(nn.Module):
    def __init__(self, vocabulary: int = 1030) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, vocabulary, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(self.words(ids).mean(1)))
        return logits


@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_gradients_are_the_layers_own(has_bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 1030, bias=has_bias)
    model = nn.Sequential(copy.deepcopy(plain))
    assert align_linear(model, 64) == 1
    x, weights = torch.randn(4, 3, 8), torch.randn(4, 3, 1030)
    for layer in (plain, model):
        (layer(x) * weights).sum().backward()
    assert model(x).shape == (4, 3, 1030)
    torch.testing.assert_close(model(x), plain(x))
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    assert list(model.state_dict()) == [f"0.{name}" for name in plain.state_dict()]


def test_only_the_last_layer_is_and_small_ones_those_that_fit_and_the_users_own_are_left() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 1030), nn.Linear(1030, 1031))
    assert align_linear(model, 64) == 1
    assert [isinstance(layer, AlignedLinear) for layer in model] == [False, True]
    for last in (nn.Linear(8, 10), nn.Linear(8, 1024), Own(8, 1030)):
        assert align_linear(nn.Sequential(nn.Linear(8, 1030), last), 64) == 0


def test_another_setting_puts_the_layer_back() -> None:
    model = nn.Sequential(nn.Linear(8, 1030))
    for multiple in (64, 8):
        align_linear(model, multiple)
        assert isinstance(model[0], AlignedLinear)
        assert model[0].multiple == multiple
    align_linear(model, 1)
    assert type(model[0]) is nn.Linear


def test_the_weights_rows_count_not_what_the_layer_was_made_with() -> None:
    model = nn.Sequential(nn.Linear(8, 1030, bias=False))
    model[0].weight = nn.Parameter(torch.randn(1100, 8))
    expected = model(torch.ones(2, 8))
    assert align_linear(model, 64) == 1
    assert model(torch.ones(2, 8)).shape == (2, 1100)
    torch.testing.assert_close(model(torch.ones(2, 8)), expected)


def test_it_is_shown_copied_and_pickled_as_torchs_own() -> None:
    model = nn.Sequential(nn.Linear(8, 1030))
    shown = repr(model)
    align_linear(model, 64)
    assert repr(model) == shown
    pickled = pickle.dumps(model)
    assert b"autotune" not in pickled
    for copied in (pickle.loads(pickled), copy.deepcopy(model)):
        torch.testing.assert_close(copied(torch.ones(2, 8)), model(torch.ones(2, 8)))


def run_of(precision: Precision) -> Run:
    ids = torch.randint(0, 1030, (8, 4), generator=torch.Generator().manual_seed(0))

    def make() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        torch.manual_seed(0)
        return Speaker(), (ids, ids[:, 0])

    return apply(Strategy(micro_batch=8, precision=precision), workload_of("speaker", make), backends.get("fake"))


def test_a_run_below_fp32_is_aligned_where_the_device_asks_for_it_and_trains_the_same() -> None:
    plain, aligned = run_of("fp32"), run_of("bf16")
    assert isinstance(plain.model, Speaker)
    assert isinstance(aligned.model, Speaker)
    assert type(plain.model.head) is nn.Linear
    assert isinstance(aligned.model.head, AlignedLinear)
    assert aligned.model.head.weight is aligned.model.words.weight, "what was shared still is"
    losses = [[float(run.step(batch)) for batch in [next(iter(run.loader))] * 5] for run in (plain, aligned)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0][-1] < losses[0][0]
