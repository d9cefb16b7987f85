"""Attention over part of the keys: which keys each query sees, whatever way it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from autotune.models.sparse import attend_flexibly, attend_sparsely, key_blocks
from autotune.strategy import SPARSE, WINDOW, Attention


def block_mask(num_blocks: int, kind: Attention) -> Tensor:
    """Which blocks of keys (columns) each block of queries (rows) sees, NN."""
    seen_NN = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for block, keys in enumerate(key_blocks(num_blocks, kind).tolist()):
        seen_NN[block, [key for key in keys if key >= 0]] = True
    if kind != "window":
        seen_NN[0] = True
    return seen_NN


def tensors(num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sequences, the second a third as long."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, num_tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask_B11T = (
        torch.arange(num_tokens)[None, None, None] < torch.tensor([num_tokens, num_tokens // 3])[:, None, None, None]
    )
    return q, k, v, mask_B11T


@pytest.mark.parametrize("num_tokens", [40, 256, 300, 512])
@pytest.mark.parametrize("kind", SPARSE)
def test_it_is_full_attention_with_the_blocks_mask(kind: Attention, num_tokens: int) -> None:
    q, k, v, mask = tensors(num_tokens)
    seen = block_mask(-(-num_tokens // WINDOW), kind).repeat_interleave(WINDOW, 0).repeat_interleave(WINDOW, 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:num_tokens, :num_tokens] & mask)
    found = attend_sparsely(q, k, v, mask, kind)
    counts = mask[:, 0, 0]
    for one, other in ((expected, found), *(_gradients((q, k, v), expected, found, counts))):
        torch.testing.assert_close(other.transpose(1, 2)[counts], one.transpose(1, 2)[counts], atol=1e-10, rtol=1e-8)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_tokens", [40, 300])
@pytest.mark.parametrize("kind", SPARSE)
def test_flex_attention_computes_the_same(kind: Attention, num_tokens: int) -> None:
    """Its unfused form and forward only, which is all that it has on a CPU; compiled, tests/gpu."""
    q, k, v, mask = (tensor.detach() for tensor in tensors(num_tokens))
    for given in (mask, None):
        counts = mask[:, 0, 0] if given is not None else torch.ones(2, num_tokens, dtype=torch.bool)
        found = attend_flexibly(q, k, v, given, kind, flex_attention)
        expected = attend_sparsely(q, k, v, given, kind)
        torch.testing.assert_close(
            found.transpose(1, 2)[counts], expected.transpose(1, 2)[counts], atol=1e-10, rtol=1e-8
        )
        assert found.isfinite().all()


def _gradients(
    inputs: tuple[Tensor, ...], expected: Tensor, found: Tensor, counts: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """By every input, of what the tokens that count attend to."""
    each = [
        torch.autograd.grad(out.transpose(1, 2)[counts].square().sum(), inputs, retain_graph=True)
        for out in (expected, found)
    ]
    return list(zip(*each, strict=True))


@pytest.mark.parametrize("kind", SPARSE)
def test_a_query_sees_its_neighbours_and_what_its_kind_adds(kind: Attention) -> None:
    seen = block_mask(12, kind)
    rows = torch.arange(12)
    assert seen[(rows[:, None] - rows).abs() <= 1].all()
    assert seen[0].all() == (kind != "window")
    assert seen[:, 0].all() == (kind != "window")
    others = [int(count) - 3 for count in seen[2:11].sum(1)]
    assert set(others) == {{"window": 0, "window_global": 1, "window_global_random": 2}[kind]}
    assert key_blocks(12, kind).shape[1] <= 5


def test_batches_that_are_not_padded_need_no_mask() -> None:
    q, k, v, _ = tensors(320)
    whole = torch.ones(2, 1, 1, 320, dtype=torch.bool)
    torch.testing.assert_close(attend_sparsely(q, k, v, None, "window"), attend_sparsely(q, k, v, whole, "window"))


def causal_mask(num_tokens: int, kind: Attention, block: int) -> Tensor:
    """Which keys (columns) each causal query (row) sees, TT, written token by token."""
    keys_NM = key_blocks(-(-num_tokens // block), kind, is_causal=True)
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for query in range(num_tokens):
        for key in range(query + 1):
            near = query - key < block
            far = key // block in keys_NM[query // block] and key // block < query // block - 1
            is_global = kind != "window" and key < block
            seen[query, key] = near or far or is_global
    return seen


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("num_tokens", "block"), [(40, 16), (48, 16), (100, 32), (20, 64)])
@pytest.mark.parametrize("kind", SPARSE)
def test_causal_queries_see_the_last_tokens_and_nothing_after_themselves(
    kind: Attention, num_tokens: int, block: int
) -> None:
    q, k, v, _ = tensors(num_tokens)
    seen = causal_mask(num_tokens, kind, block)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    found = attend_sparsely(q, k, v, None, kind, is_causal=True, block=block)
    every = torch.ones(2, num_tokens, dtype=torch.bool)
    for one, other in ((expected, found), *(_gradients((q, k, v), expected, found, every))):
        torch.testing.assert_close(other, one, atol=1e-10, rtol=1e-8)
    q, k, v = (x.detach() for x in (q, k, v))
    by_flex = attend_flexibly(q, k, v, None, kind, flex_attention, is_causal=True, block=block)
    torch.testing.assert_close(by_flex, expected.detach(), atol=1e-10, rtol=1e-8)


def test_a_causal_window_of_sixteen_sees_sixteen_tokens() -> None:
    assert causal_mask(100, "window", 16).sum(1).tolist() == [min(place + 1, 16) for place in range(100)]
