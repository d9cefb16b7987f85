"""Micro batches for loops that are not ours: loaders, and a Trainer's batches. With the real libraries."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import accelerate
import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from transformers import default_data_collator

from autotune import backends
from autotune.api import Tuned
from autotune.errors import UsageError
from autotune.strategy import Strategy
from tests import own_trainers
from tests.own_trainers import tuned

pytestmark = own_trainers.UNHEARD


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_micro_batches_of_similar_length(workers: int) -> None:
    data = own_trainers.Reviews()
    ours = tuned("reviews", micro_batch=4, accumulation=2, padding="buckets", workers=workers)
    loader = ours.loader(data, lengths=data.lengths.tolist(), collate_fn=default_data_collator)
    first, second = ([batch["input_ids"] for batch in loader] for _ in range(2))
    assert len(loader) == len(first) == 16
    assert {len(ids) for ids in first} == {4}
    mixed = tuned("reviews", micro_batch=4, padding="longest").loader(data, collate_fn=default_data_collator)
    assert sum(ids.numel() for ids in first) < sum(batch["input_ids"].numel() for batch in mixed)
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.shape == b.shape)
    seen = sorted(row.tolist()[:4] for ids in first for row in ids)
    assert seen == sorted(ids[:4].tolist() for ids in data.ids)


def test_a_loader_of_ones_own_keeps_its_order_sampler_and_collate() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(43))

    def samples(loader: DataLoader[Any]) -> list[list[int]]:
        return [batch.tolist() for batch in loader]

    def flat(batches: list[list[int]]) -> list[int]:
        return list(itertools.chain(*batches))

    def doubled(rows: list[Any]) -> torch.Tensor:
        return 2 * torch.stack([row for (row,) in rows])

    def plain(**options: Any) -> DataLoader[Any]:
        return DataLoader(data, batch_size=8, collate_fn=doubled, **options)

    whole, parts = tuned("module"), tuned("module", micro_batch=2, accumulation=4)
    in_order = samples(whole.loader(plain()))
    assert in_order == samples(plain()), "as it is"
    assert flat(samples(parts.loader(plain()))) == flat(in_order[:5]), "but for what is no whole batch"
    assert samples(whole.loader(plain(drop_last=True))) == in_order[:5]
    backwards = torch.utils.data.BatchSampler(range(42, -1, -1), 8, drop_last=True)
    own = DataLoader(data, batch_sampler=backwards, collate_fn=doubled)
    assert samples(whole.loader(own)) == samples(own)
    assert flat(samples(parts.loader(own))) == flat(samples(own))
    shuffled = accelerate.Accelerator(cpu=True).prepare(parts.loader(plain(shuffle=True)))
    assert [len(batch) for batch in shuffled] == [2] * 20
    chosen = torch.utils.data.WeightedRandomSampler([1.0] * 5 + [0.0] * 38, num_samples=40)
    drawn = flat(samples(parts.loader(plain(sampler=chosen))))
    assert len(drawn) == 40
    assert set(drawn) <= {0, 2, 4, 6, 8}
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append(samples(parts.loader(plain(shuffle=True))))
    assert orders[0] == orders[1] != orders[2], "by torch's own random numbers"
    by_length = tuned("module", micro_batch=2, accumulation=4, padding="buckets").loader(
        plain(), lengths=range(43, 0, -1)
    )
    assert flat(samples(by_length))[:8] == [14, 12, 10, 8, 6, 4, 2, 0], "within each batch of its own order"
    with pytest.warns(UserWarning, match="batches of 4, and the strategy of 8"):
        assert len(whole.loader(DataLoader(data, batch_size=4))) == 6


def test_a_dataset_alone_is_read_as_the_loader_that_was_searched_with() -> None:
    data = own_trainers.Reviews(40)
    rows = [batch["input_ids"].shape for batch in tuned("reviews", micro_batch=8).loader(data)]
    assert rows == [(8, own_trainers.TOKENS)] * 5, "by the Trainer's collator"


def test_an_epoch_s_rest_is_left_out_where_it_would_weigh_less() -> None:
    data = torch.utils.data.TensorDataset(*(part[:43] for part in own_trainers.sequences().tensors))
    parts = tuned("module", micro_batch=2, accumulation=4)
    assert [len(ids) for ids, _ in parts.loader(data)] == [2] * 20
    assert [len(ids) for ids, _ in parts.loader(data, lengths=[24] * 43)] == [2] * 20
    assert sorted(len(ids) for ids, _ in tuned("module").loader(data)) == [3, 8, 8, 8, 8, 8]
    few = torch.utils.data.Subset(data, range(3))
    assert [len(ids) for ids, _ in parts.loader(few, lengths=[24] * 3)] == [2, 1]


def test_a_short_batch_is_an_epoch_s_last() -> None:
    data = own_trainers.Reviews(43)
    ours = tuned("reviews", micro_batch=2, accumulation=4, padding="buckets")
    arguments = ours.arguments("transformers")
    trainer = own_trainers.trainer_of(own_trainers.classifier(), data, **arguments)
    loader = ours.prepare(trainer, lengths=data.lengths.tolist()).get_train_dataloader()
    for _ in range(3):
        assert [len(batch["labels"]) for batch in loader] == [2] * 21 + [1]
    trainer = own_trainers.trainer_of(own_trainers.classifier(), data, dataloader_drop_last=True, **arguments)
    assert [len(batch["labels"]) for batch in ours.prepare(trainer).get_train_dataloader()] == [2] * 20
    with pytest.raises(UsageError, match="there are 10 lengths for 43 samples"):
        ours.prepare(trainer, lengths=[5] * 10)
    with pytest.raises(UsageError, match="there are 10 lengths for 43 samples"):
        ours.loader(data, lengths=[5] * 10)


def test_samples_that_do_not_say_how_long_they_are_stay_as_they_come() -> None:
    class Texts(torch.utils.data.Dataset[str]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> str:
            return "a" * index

    def collate(texts: list[str]) -> dict[str, torch.Tensor]:
        return default_data_collator([own_trainers.Reviews()[len(text)] for text in texts])  # type: ignore[no-any-return]

    ours = tuned("reviews", padding="buckets")
    options = {"remove_unused_columns": False, **ours.arguments("transformers")}
    trainer = own_trainers.trainer_of(own_trainers.classifier(), Texts(), collate, **options)
    with pytest.warns(UserWarning, match="padding=buckets needs the samples' lengths"):
        ours.prepare(trainer)
    trainer.train()
    trainer = own_trainers.trainer_of(
        own_trainers.classifier(), own_trainers.Stream(), **ours.arguments("transformers")
    )
    with pytest.warns(UserWarning, match="come one by one"):
        ours.prepare(trainer)
    trainer.train()


def test_a_loader_s_batches_are_as_they_were_but_for_their_padding() -> None:
    class Own(dict[str, Any]):
        note = "kept"

    def collate(samples: list[Any]) -> Own:
        return Own(default_data_collator(samples))

    trim = pickle.loads(pickle.dumps(tuned("reviews", padding="longest").trim(default_data_collator)))
    samples = [own_trainers.Reviews()[index] for index in range(4)]
    assert trim(samples)["input_ids"].shape[1] < own_trainers.TOKENS
    found = tuned("reviews", padding="longest").trim(collate)(samples)
    assert isinstance(found, Own)
    assert found["input_ids"].shape[1] < own_trainers.TOKENS
    ids, classes = tuned("module", padding="longest").trim(default_collate)([(torch.ones(24), 1), (torch.ones(24), 0)])
    assert ids.shape == (2, 24)
    assert classes.tolist() == [1, 0]


def test_without_lengths_nothing_can_be_grouped() -> None:
    with pytest.warns(UserWarning, match="padding=buckets needs the samples' lengths"):
        loader = tuned("reviews", micro_batch=4, padding="buckets").loader(own_trainers.Reviews())
    assert {len(batch["input_ids"]) for batch in loader} == {4}


def test_padding_to_the_limit_is_left_as_it_is() -> None:
    assert tuned("reviews", padding="max").trim(default_data_collator) is default_data_collator
    with pytest.raises(UsageError, match="cifar10 makes its batches itself"):
        Tuned(
            name="cifar10", strategy=Strategy(micro_batch=8), profile=None, path=None, backend=backends.get("cpu"),
            limit=64,
        ).trim(default_collate)  # fmt: skip
