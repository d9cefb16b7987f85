"""Data as users have it: datasets and loaders, and models for them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_collate,
)

from autotune import backends
from autotune.apply import Run, apply
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests.own_trainers import AroundBert, Reviews, Tokens, decoder, reviewing, trainer_of


class Pictures(Dataset[tuple[Tensor, int]]):
    """Of one colour each, which tells its number; what else is in them is drawn from three sources at every reading."""

    def __init__(self, count: int = 22) -> None:
        self.count, self.num_read = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.num_read += 1
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
        return torch.tensor([index, *drawn]), index % 3


def numbers_of(micro: Any) -> list[int]:
    """Which pictures a micro batch has."""
    return [int(number) for number in micro.inputs["input"][:, 0]]


def pictures(**options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return nn.Linear(4, 3), DataLoader(Pictures(), **{"batch_size": 4, "shuffle": True, **options})


class Texts(Dataset[dict[str, Tensor]]):
    """Of different lengths, which the loader pads."""

    def __init__(self, count: int = 60) -> None:
        self.reviews, self.num_read = Reviews(count), 0

    def __len__(self) -> int:
        return len(self.reviews)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.num_read += 1
        sample, length = self.reviews[index], int(self.reviews.lengths[index])
        return {**sample, **{name: sample[name][:length] for name in ("input_ids", "attention_mask")}}


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """To the longest of them, as Hugging Face's collators do."""
    tokens = {
        name: nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)
        for name in ("input_ids", "attention_mask")
    }
    return {**tokens, "targets": torch.stack([sample["labels"] for sample in samples])}


def texts(shuffle: bool = True) -> tuple[nn.Module, Any]:
    return AroundBert(), DataLoader(Texts(), batch_size=4, shuffle=shuffle, collate_fn=padded)


def texts_in_order() -> tuple[nn.Module, Any]:
    return texts(shuffle=False)


def texts_of_one_width() -> tuple[nn.Module, Any]:
    data = Reviews()
    samples: Any = [{**data[index], "targets": data[index]["labels"]} for index in range(60)]
    return AroundBert(), DataLoader(samples, batch_size=4, shuffle=True, collate_fn=_without_labels)


def _without_labels(samples: list[Any]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in samples]) for name in ("input_ids", "attention_mask", "targets")}


def to_train_and_test() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), (pictures()[1], DataLoader(Pictures(10), batch_size=5))


class Broken(Pictures):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 21:
            raise OSError("picture 21 is torn")
        return super().__getitem__(index)


def broken() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), DataLoader(Broken(), batch_size=4)


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([Pictures()[index] for index in range(22)])


class Pairs(BatchSampler):
    """Puts together what belongs together."""


def with_own_sampler() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), DataLoader(Pictures(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 22, 22))


def with_own_batches() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), DataLoader(Pictures(), batch_sampler=Pairs(SequentialSampler(range(22)), 4, False))


def two_views(samples: list[Any]) -> Any:
    pictures, classes = default_collate(samples)
    return torch.cat([pictures, pictures.flip(1)]), torch.cat([classes, classes])


def with_two_views() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), DataLoader(Pictures(), batch_size=2, collate_fn=two_views)


def of_some() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), DataLoader(Pictures(), batch_size=4, sampler=RandomSampler(range(8)))


class Shifted(DataLoader[Any]):
    def __iter__(self) -> Any:
        return ((pictures + 1000, classes) for pictures, classes in super().__iter__())


def with_own_iteration() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), Shifted(Pictures(), batch_size=4)


class Drawing(Pictures):
    """From numbers that are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = np.random.default_rng(0)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = super().__getitem__(index)
        return picture + float(self.numbers.random()), label


def drawing() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), DataLoader(Drawing(), batch_size=4, shuffle=True)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 3)

    def forward(self, ids: Tensor) -> Tensor:
        summed: Tensor = self.embedding(ids).sum(1)
        return summed


def without_mask() -> tuple[nn.Module, Any]:
    def collate(samples: list[Any]) -> Any:
        batch = padded(samples)
        return batch["input_ids"], batch["targets"]

    return Sum(), DataLoader(Texts(), batch_size=4, shuffle=True, collate_fn=collate)


def to_test_on_some() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), (pictures()[1], with_own_sampler()[1])


def set_up() -> tuple[nn.Module, Any]:
    return pictures(worker_init_fn=print)


class Lines(Dataset[dict[str, Tensor]]):
    """Of one length but for a few, with a mean over the tokens of a batch for a loss."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = (torch.arange(16) < (16 if index % 50 else 3)).long()
        ids = (torch.arange(16) * (index + 1) % 49 + 1) * mask
        return {"ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, -100)}


class Liner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.embedding(ids))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def lines() -> tuple[nn.Module, Any]:
    return Liner(), DataLoader(Lines(), batch_size=4, shuffle=True)


def of_a_stream() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), DataLoader(Stream(), batch_size=4)


def of_a_trainer() -> Any:
    return reviewing(num_train_epochs=2.5, max_steps=-1, trainer_options={"eval_dataset": Reviews(24)})


def of_a_trainer_of_tokens() -> Any:
    return trainer_of(decoder(), Tokens())


def workload(name: str) -> Workload:
    return workload_of(name, globals()[name])


def run_of(workload: Workload, backend: str = "cpu", **knobs: Any) -> Run:
    """With torch's own attention where there is such: transformers' eager makes a number on the host and copies it,
    which no graph can record."""
    torch.manual_seed(1)
    micro_batch = workload.recipe.global_batch // knobs.get("accumulation", 1)
    kernel = "sdpa" if "sdpa" in workload.attentions else workload.attentions[0]
    strategy = Strategy(**{"micro_batch": micro_batch, "attention": kernel, **knobs})
    return apply(strategy, workload, backends.get(backend))


def losses(run: Run) -> list[float]:
    """Of two epochs' steps."""
    return [float(run.step(batch)) for _ in range(2) for batch in run.loader]
