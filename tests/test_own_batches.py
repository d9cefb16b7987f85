"""Batches, losses and datasets of the user's own: how they are read, padded and refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune import backends
from autotune.apply import apply
from autotune.data.batching import FINE, rounded
from autotune.errors import UsageError
from autotune.strategy import Strategy
from autotune.workloads.custom import workload_of


class Mean(nn.Module):
    """A model that computes its own loss, as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = (self.embedding(input_ids).squeeze(-1) * attention_mask).sum(1) / attention_mask.sum(1)
        return {"loss": F.mse_loss(scores, labels), "logits": scores}


def masked_batch() -> dict[str, Tensor]:
    mask = (torch.arange(24) < torch.tensor([[24], [5], [9], [17]])).long()
    return {"input_ids": torch.randint(1, 10, (4, 24)) * mask, "attention_mask": mask, "labels": torch.rand(4)}


def test_padding_is_found_from_the_mask_and_losses_from_the_model() -> None:
    batch = masked_batch()
    workload = workload_of("masked", lambda: (Mean(), batch))
    assert workload.max_tokens == 24
    assert workload.train.lengths[:4].tolist() == [24, 5, 9, 17]
    assert workload.attentions == ("eager",)
    micro = workload.collate(workload.train, np.array([1, 6]), 16)
    assert micro.num_tokens == 14
    assert micro.inputs["input_ids"].shape == (2, 16)
    torch.testing.assert_close(micro.inputs["labels"], batch["labels"][[1, 2]])


def test_padding_on_the_left_is_not_cut_off() -> None:
    mask = (torch.arange(24) >= torch.tensor([[0], [19], [15], [7]])).long()
    batch = {"input_ids": torch.randint(1, 10, (4, 24)) * mask, "attention_mask": mask, "labels": torch.rand(4)}
    workload = workload_of("left", lambda: (Mean(), batch))
    assert workload.train.lengths[:4].tolist() == [24] * 4
    run = apply(Strategy(micro_batch=2, accumulation=2, padding="longest"), workload, backends.get("cpu"))
    micro = run.split(batch)[0]
    assert micro.inputs["attention_mask"].sum() == mask[:2].sum() == micro.num_tokens


@pytest.mark.parametrize(
    ("output", "targets", "expected"),
    [
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), 4 * np.log(3)),
        (torch.zeros(4, 6, 3), torch.zeros(4, 6, dtype=torch.long), 4 * np.log(3)),
        (torch.zeros(4, 2), torch.full((4, 2), 0.5), 4 * 0.25),
        (torch.tensor(0.5), torch.zeros(4), 2.0),
    ],
)
def test_the_loss_follows_from_the_targets(output: Tensor, targets: Tensor, expected: float) -> None:
    workload = workload_of("targets", lambda: (nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4))))
    assert float(workload.loss(output, targets)) == pytest.approx(expected)


def test_a_loss_of_ones_own_is_a_mean_over_the_batch() -> None:
    made = (nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4)), lambda output, targets: output.mean())
    assert float(workload_of("own", lambda: made).loss(torch.full((4, 2), 0.5), torch.zeros(4))) == pytest.approx(2.0)


def test_a_dataset_is_as_wide_as_it_is_and_trimmed_as_the_profile_says() -> None:
    """The example batch has 24 tokens, the dataset's samples up to 40."""
    mask = (torch.arange(48) < torch.arange(21, 41)[:, None]).long()
    ids = torch.randint(1, 10, mask.shape) * mask

    class Reviews(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(ids)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": ids[index], "attention_mask": mask[index], "labels": torch.tensor(0.5)}

    workload = workload_of("masked", lambda: (Mean(), masked_batch()))
    for padding, is_trimmed in (("max", False), ("longest", True)):
        strategy = msgspec.convert({"micro_batch": 4, "padding": padding}, Strategy)
        run = apply(strategy, workload, backends.get("cpu"), dataset=Reviews())
        found = [micro.inputs["attention_mask"] for batch in run.loader for micro in batch]
        assert sum(int(part.sum()) for part in found) == int(mask.sum())
        for part in found:
            assert part.shape[1] == (rounded(int(part.sum(1).max()), FINE.width) if is_trimmed else 48)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input": ["a"] * 4, "y": torch.zeros(4)}, "input in a batch of odd is .*; a batch holds tensors"),
        ((torch.zeros(4, 2), ["a", "b"]), "the targets in a batch of odd is .str, str"),
        ((torch.zeros(4, 2), {"boxes": torch.zeros(4), "names": "a"}), "the targets in a batch of odd is dict"),
        ((torch.zeros(4, 2), (torch.zeros(4), torch.zeros(3))), "as many in all; it has 3, 4"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused(batch: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        workload_of("odd", lambda: (nn.Linear(2, 2), batch))


def test_the_targets_of_a_dict_are_what_is_no_argument() -> None:
    batch = {"labels": torch.arange(4) % 2, "input": torch.zeros(4, 2)}
    workload = workload_of("dict", lambda: (nn.Linear(2, 2), batch))
    micro = workload.collate(workload.train, np.arange(4), 1)
    assert list(micro.inputs) == ["input"]
    assert micro.targets.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((nn.Linear(2, 2), (torch.zeros(4, 3), torch.zeros(4))), "fails on its batch: RuntimeError: mat1 and mat2"),
        (
            (nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4)), lambda model, batch: model(batch)),
            "fails on the loss of its output and the targets: TypeError",
        ),
    ],
)
def test_a_workload_that_does_not_get_to_a_loss_is_refused_at_once(made: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        workload_of("broken", lambda: made).check_runs()


def test_what_the_model_does_not_take_is_left_out_of_a_batch() -> None:
    batch = {"input": torch.zeros(4, 2), "names": ["a"] * 4, "labels": None}
    workload = workload_of("named", lambda: (nn.Linear(2, 2), batch, lambda output, targets: output.mean()))
    assert list(workload.collate(workload.train, np.arange(4), 1).inputs) == ["input"]


def test_a_batch_whose_tensors_do_not_match_is_refused() -> None:
    with pytest.raises(UsageError, match="as many in all; it has 3, 4"):
        workload_of("uneven", lambda: (nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(3))))
