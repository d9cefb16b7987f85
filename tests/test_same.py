"""What would train something else is not searched: found by doing it with a few samples of a user's own model."""

from __future__ import annotations

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
from autotune.workloads.custom import workload_of
from tests.own_models import (
    Averaging,
    Blocks,
    Counting,
    Forward,
    Frozen,
    Normalising,
    Pooled,
    Recurrent,
    Spectral,
    classes,
    contrasted,
    hardest,
    masked,
    mixed,
    net,
    noisy,
    padded,
    per_token,
    reentrant,
    tokens,
    tossed,
    two_headed,
    weighted,
    weights_dropped,
    whole,
)

CPU = backends.get("cpu")
NO_MEAN = "not the mean of its samples' losses"


SPLITS: dict[str, tuple[Any, str | None]] = {
    "plain": ((net(), classes()), None),
    "dropout": ((net(nn.Dropout(0.5)), classes()), None),
    "noise": ((Forward(noisy), classes()), None),
    "recurrent dropout": ((Recurrent(), tokens()[0], lambda output, targets: output.square().mean()), None),
    "a mask of weights": ((Forward(weights_dropped), classes()), None),
    "rrelu": ((net(nn.RReLU()), classes()), None),
    "16 bits": ((net().to(torch.bfloat16), (classes()[0].to(torch.bfloat16), classes()[1])), None),
    "evaluating": ((Blocks(Averaging).eval(), classes()), "every forward pass changes blocks.0.mean"),
    "a head behind a large loss": ((Forward(two_headed), classes()[0]), NO_MEAN),
    "counting": ((Counting(), classes()), "every forward pass changes steps, and every micro batch is one"),
    "frozen batch norm": ((Frozen(), classes()), None),
    "batch norm": ((net(nn.BatchNorm1d(8)), classes()), "batch normalisation would train on other statistics"),
    "reentrant": ((Forward(reentrant), classes()), None),
    "class weights": ((net(), classes(), weighted), NO_MEAN),
    "contrast": ((net(), classes(), contrasted), NO_MEAN),
    "sum": ((net(), classes(), lambda output, targets: F.cross_entropy(output, targets, reduction="sum")), NO_MEAN),
    "hardest five": ((net(), classes(), hardest), NO_MEAN),
    "mean over what is masked": ((Forward(masked), classes()[0]), NO_MEAN),
    "mixup": ((Forward(mixed), classes()), NO_MEAN),
    "numbers of its own": ((Forward(tossed), classes()), "not by torch's random numbers"),
    "whole batches": ((Forward(whole), classes()), "does not run by itself"),
    "running mean": ((Blocks(Averaging), classes()), "every forward pass changes blocks.0.mean"),
    "tokens": ((nn.Embedding(20, 20), tokens(), per_token(-100)), None),
    "tokens with padding": ((nn.Embedding(20, 20), tokens(7), per_token(7)), NO_MEAN),
    "padding elsewhere": ((nn.Embedding(20, 20), tokens(), per_token(0)), "where targets are padded with 0"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_batch_is_cut_up_only_where_its_parts_train_the_same(name: str) -> None:
    made, words = SPLITS[name]
    found = workload_of("own", lambda: made).split_refusal
    assert found is None if words is None else words in (found or ""), found


@pytest.mark.parametrize("name", SPLITS)
def test_which_samples_are_together_counts_where_they_are_told_from_each_other(name: str) -> None:
    """Not where they only weigh differently; and who draws numbers of its own cannot be asked."""
    made, _ = SPLITS[name]
    told_apart = {"contrast", "batch norm"}
    assert (workload_of("own", lambda: made).mixing_refusal is not None) == (name in told_apart)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)), None),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "changes blocks.0.1.running_mean"),
        (Spectral, "changes blocks.0.inner.parametrizations.weight.0"),
        (Averaging, "changes blocks.0.mean"),
    ],
    ids=["dropout", "batch norm", "spectral norm", "mean"],
)
def test_blocks_are_computed_again_only_where_that_changes_nothing(kind: Any, words: str | None) -> None:
    workload = workload_of("own", lambda: (Blocks(kind), classes()))
    assert workload.num_blocks == 3
    found = workload.recompute_refusal
    assert found is None if words is None else words in (found or "")


def test_padding_is_cut_off_only_where_the_model_does_not_see_it() -> None:
    assert workload_of("masked", lambda: (Pooled(True), padded())).trim_refusal is None
    blind = workload_of("blind", lambda: (Pooled(False), padded()))
    assert blind.trim_refusal == "samples whose padding is cut off train otherwise"
    wide = {**padded(), "features": torch.randn(8, 12)}  # as many as there are tokens

    class Wide(Pooled):
        def __init__(self) -> None:
            super().__init__(True)
            self.more = nn.Linear(12, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, attention_mask) + self.more(features)  # type: ignore[no-any-return]

    cut = workload_of("wide", lambda: (Wide(), wide))
    assert "fails on samples that are cut to their" in (cut.trim_refusal or "")
    cut.check_runs()


def test_padding_that_training_alone_sees_is_not_cut_off() -> None:
    assert "padding is cut off" in (workload_of("norm", lambda: (Normalising(), padded())).trim_refusal or "")


def test_a_buffer_that_shares_its_memory_is_looked_at() -> None:
    model = net()
    model.register_buffer("wide", torch.ones(1, 8).expand(4, 8))
    workload_of("wide", lambda: (model, classes())).check_runs()


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (nn.DataParallel, "give its module"),
        (torch.compile, "compiled already"),
    ],
    ids=["parallel", "compiled"],
)
def test_a_model_in_a_wrapping_is_refused(wrap: Callable[[nn.Module], nn.Module], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        workload_of("wrapped", lambda: (wrap(net()), classes()))


def test_a_model_is_trained_as_its_own_train_says() -> None:
    run = apply(Strategy(micro_batch=16), workload_of("frozen", lambda: (Frozen(), classes())), CPU)
    run.step(run.split(classes()))
    assert isinstance(run.model, Frozen)
    assert run.model.norm.num_batches_tracked == 0


def test_targets_that_are_longer_than_their_source_are_not_cut_off() -> None:
    """Both padded to one width; a loss that views them otherwise takes what is cut."""
    labels = torch.where(torch.arange(12) < torch.tensor([9, 3, 3, 12, 3, 3, 3, 5])[:, None], 7, -100)
    batch = {**{name: padded()[name] for name in ("input_ids", "attention_mask")}, "labels": labels}

    class Translating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
            keep = attention_mask.unsqueeze(-1)
            pooled = (self.embedding(input_ids) * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True)
            logits = self.head(pooled).expand(-1, labels.shape[1], -1)
            per_token = F.cross_entropy(logits.flatten(0, 1), labels.view(-1), reduction="none").view(labels.shape)
            return (per_token.sum(1) / labels.ne(-100).sum(1)).mean()

    workload = workload_of("translating", lambda: (Translating(), batch))
    assert workload.train.lengths[:8].tolist() == [9, 4, 5, 12, 7, 8, 9, 10]
    assert workload.trim_refusal is None
    plain, trimmed = (
        apply(Strategy(micro_batch=2, accumulation=4, padding=padding), workload, CPU, seed=1)
        for padding in ("max", "longest")
    )
    torch.testing.assert_close(trimmed.step(trimmed.split(batch)), plain.step(plain.split(batch)))


def test_a_decoder_of_hugging_faces_is_computed_again() -> None:
    """Without its cache for decoding, which recomputation does not go with."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    mask = (torch.arange(12) < torch.arange(3, 11)[:, None]).long()
    ids = mask * torch.arange(1, 13)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    workload = workload_of("decoder", lambda: (transformers.GPT2LMHeadModel(config), batch))
    assert workload.num_blocks == 3
    assert workload.recompute_refusal is None
    assert workload.trim_refusal is None
    assert NO_MEAN in (workload.split_refusal or ""), "it means over tokens, in numbers that differ"


def test_looking_at_a_model_leaves_it_as_it_was() -> None:
    model = Blocks(Averaging)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    workload = workload_of("own", lambda: (model, classes()))
    workload.check_runs()
    assert workload.split_refusal
    assert workload.recompute_refusal
    assert workload.attentions == ("eager",)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(output, targets)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((net(), classes(), Learned()), "parameters that no optimizer here would train"),
        ((net(), classes()[0]), "the batch has no targets"),
        ((net(), (*classes()[:1], torch.tensor(0.5))), "is a single number"),
        ((net(), (torch.eye(16, 8).to_sparse(), classes()[1])), "is sparse"),
        ((net().requires_grad_(False), classes()), "none has requires_grad"),
        (
            (nn.Embedding(20, 3, sparse=True), (torch.arange(16), classes()[1])),
            "sparse gradients, which the recipe's AdamW does not take",
        ),
    ],
    ids=["loss's parameters", "no targets", "number", "sparse", "frozen", "sparse gradients"],
)
def test_what_would_be_trained_otherwise_than_meant_is_refused(made: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        workload_of("own", lambda: made).check_runs()


def test_a_model_that_differentiates_in_its_forward_pass_or_takes_no_two_samples_runs() -> None:
    def slope(linear: nn.Linear, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)[0].square().mean()

    workload_of("slope", lambda: (Forward(slope), torch.randn(16, 8))).check_runs()
    workload_of("hardest", lambda: (net(), classes(), hardest)).check_runs()


def test_torchs_encoder_is_evaluated_in_bf16_as_it_is_trained() -> None:
    """Its fast path, taken without gradients, asks for CUDA's autocast alone."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embedding, self.layers = nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layers(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0).mean(1)  # type: ignore[no-any-return]

    workload = workload_of("encoder", lambda: (Encoder(), padded()))
    run = apply(Strategy(micro_batch=8, precision="bf16", attention="sdpa"), workload, CPU)
    loss, _ = run.evaluate(list(run.evaluation_batches(run.evaluation_plan(8))))
    assert 0 < loss < 10
    assert torch.backends.mha.get_fastpath_enabled()


def test_fp64_stays_fp64() -> None:
    doubles = classes()[0].double(), classes()[1]
    workload = workload_of("doubles", lambda: (net().double(), doubles))
    run = apply(Strategy(micro_batch=8, accumulation=2), workload, CPU)
    expected = F.cross_entropy(run.model(doubles[0]), doubles[1])
    found = run.step(run.split(doubles))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
