from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autotune.data.batching import COARSE, FINE, Part, collate, in_a_row, pack, plan_epoch, plan_evaluation, rounding_of
from autotune.strategy import Padding, Strategy

PADDINGS: tuple[Padding, ...] = get_args(Padding)
MAX_TOKENS = 64


class Sequences:
    """Sequences whose ids count from 1, so that padding's 0 stands out."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        self.labels = np.arange(len(lengths), dtype=np.int64) % 2

    def ids(self, index: int) -> NDArray[np.uint16]:
        return np.arange(1, self.lengths[index] + 1, dtype=np.uint16)


@given(
    lengths=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=300),
    micro_log2=st.integers(0, 3),
    padding=st.sampled_from(PADDINGS),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_is_planned_once_and_fits_its_width(
    lengths: list[int], micro_log2: int, padding: Padding, seed: int
) -> None:
    data = Sequences(lengths)
    plan = plan_epoch(
        data.lengths, global_batch=8, micro_batch=2**micro_log2, padding=padding, max_tokens=MAX_TOKENS, seed=seed
    )
    indices = [int(i) for batch in plan for micro in batch.micro_batches for i in micro]
    assert sorted(indices) == list(range(len(lengths)))
    for batch in plan:
        assert batch.num_samples <= 8
        for micro, width in zip(batch.micro_batches, batch.widths, strict=True):
            assert len(micro) <= 2**micro_log2
            if padding == "packed":
                assert data.lengths[micro].sum() <= width < data.lengths[micro].sum() + FINE.row
                continue
            assert data.lengths[micro].max() <= width <= MAX_TOKENS
            assert width == MAX_TOKENS or padding != "max"
        made = [(pack if padding == "packed" else collate)(data, *one) for one in zip(*batch[:2], strict=True)]
        assert batch.padded_tokens == sum(micro.inputs["ids_BT"].numel() for micro in made)


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_optimizers_batches_do_not_depend_on_how_they_are_cut(padding: Padding) -> None:
    lengths = np.random.default_rng(0).integers(1, MAX_TOKENS, 500)

    def batches(micro_batch: int) -> list[frozenset[int]]:
        plan = plan_epoch(
            lengths, global_batch=16, micro_batch=micro_batch, padding=padding, max_tokens=MAX_TOKENS, seed=3
        )
        return [frozenset(int(i) for micro in batch.micro_batches for i in micro) for batch in plan]

    assert batches(16) == batches(4) == batches(1)


def test_all_but_buckets_give_the_optimizer_the_same_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, MAX_TOKENS, 100)

    def batches(padding: Padding) -> list[frozenset[int]]:
        plan = plan_epoch(lengths, global_batch=16, micro_batch=4, padding=padding, max_tokens=MAX_TOKENS, seed=3)
        return [frozenset(int(i) for micro in batch.micro_batches for i in micro) for batch in plan]

    assert batches("max") == batches("longest") == batches("packed")


def test_each_padding_wastes_less_than_max() -> None:
    lengths = np.random.default_rng(0).integers(1, MAX_TOKENS, 2000)
    padded = [
        sum(
            batch.padded_tokens
            for batch in plan_epoch(lengths, global_batch=16, micro_batch=8, padding=p, max_tokens=MAX_TOKENS, seed=0)
        )
        for p in PADDINGS
    ]
    assert padded[0] > padded[1] > padded[2] > lengths.sum()
    assert padded[1] > padded[3] > lengths.sum()


@pytest.mark.parametrize("padding", PADDINGS)
def test_epochs_are_shuffled_anew_and_bucketed_batches_come_in_random_order(padding: Padding) -> None:
    lengths = np.random.default_rng(0).integers(1, MAX_TOKENS, 400)
    first, second = (
        plan_epoch(lengths, global_batch=8, micro_batch=8, padding=padding, max_tokens=MAX_TOKENS, seed=seed)
        for seed in (0, 1)
    )
    assert [b.micro_batches[0].tolist() for b in first] != [b.micro_batches[0].tolist() for b in second]
    widths = [batch.widths[0] for batch in first]
    assert padding == "max" or widths != sorted(widths, reverse=True)


def test_an_evaluation_covers_every_sample_one_micro_batch_a_step() -> None:
    lengths = np.random.default_rng(0).integers(1, MAX_TOKENS, 50)
    for padding in PADDINGS:
        plan = plan_evaluation(lengths, micro_batch=8, padding=padding, max_tokens=MAX_TOKENS)
        assert sorted(int(i) for batch in plan for micro in batch.micro_batches for i in micro) == list(range(50))
        assert all(len(batch.micro_batches) == 1 for batch in plan)


def test_collate_pads_with_zeros_and_masks_them() -> None:
    micro = collate(Sequences([3, 5]), np.array([1, 0]), 8)
    assert micro.inputs["ids_BT"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert micro.inputs["mask_BT"].sum(1).tolist() == [5, 3]
    assert (micro.num_samples, micro.num_tokens) == (2, 8)
    assert micro.targets.tolist() == [1, 0]


def test_pack_puts_the_sequences_one_after_another() -> None:
    micro = pack(Sequences([3, 5]), np.array([1, 0]), 12)
    assert micro.inputs["ids_BT"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3] + 4 * [0]]
    assert micro.inputs["bounds"].tolist() == [0, 5, 8, 12]
    assert (micro.num_samples, micro.num_tokens) == (2, 8)
    assert micro.targets.tolist() == [1, 0]


def test_a_part_is_the_same_sequences_every_time() -> None:
    data = Sequences(list(range(1, 50)))
    part, again = Part(data, 7), Part(data, 7)
    assert part.lengths.tolist() == again.lengths.tolist()
    assert all(len(part.ids(i)) == part.lengths[i] for i in range(7))


@pytest.mark.parametrize("padding", ["longest", "buckets", "packed"])
def test_an_accelerators_batches_have_few_shapes(padding: Padding) -> None:
    lengths = np.random.default_rng(0).integers(50, 512, 4000)
    shapes = {}
    for is_host in (True, False):
        plan = plan_epoch(
            lengths,
            global_batch=32,
            micro_batch=32,
            padding=padding,
            max_tokens=512,
            seed=0,
            rounding=rounding_of(Strategy(micro_batch=32), is_host=is_host),
        )
        shapes[is_host] = {batch.widths for batch in plan}
    assert len(shapes[False]) <= 16
    assert len(shapes[False]) < len(shapes[True])
    multiple = COARSE.row if padding == "packed" else COARSE.width
    assert all(width % multiple == 0 for widths in shapes[False] for width in widths)


def test_what_is_recorded_has_an_accelerators_shapes() -> None:
    assert rounding_of(Strategy(micro_batch=32, graphs="step"), is_host=True) == COARSE
    assert rounding_of(Strategy(micro_batch=32, compile="reduce-overhead"), is_host=True) == COARSE
    assert rounding_of(Strategy(micro_batch=32, compile="default"), is_host=True) == FINE


@pytest.mark.parametrize("rest", [0, 3])
def test_a_row_says_where_each_of_its_sequences_lies(rest: int) -> None:
    row = in_a_row(np.array([2, 1, 3]), 6 + rest)
    assert row["bounds"].tolist() == [0, 2, 3, 6, 6 + rest]
    assert row["positions_BT"].tolist() == [[0, 1, 0, 0, 1, 2] + [0] * rest]
    assert row["sequence_S"].tolist() == [0, 0, 1, 2, 2, 2] + [3] * rest
    assert row["bounds"].dtype == torch.int32
