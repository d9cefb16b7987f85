"""Attention over part of the keys, in blocks: a sliding window (Child et al. 2019), with global tokens (Longformer,
Beltagy et al. 2020), with random blocks besides (BigBird, Zaheer et al. 2020). Another function than full attention.

Every block of queries sees its own block of keys, the one before and the one after; ``window_global`` besides the first
block, whose queries see all keys; ``window_global_random`` besides some blocks drawn once and for all. Where attention
is causal, a query sees of the window the last tokens up to itself, as many as a block has, and of other blocks those
before it. Cost grows with the length, not with its square. On CUDA FlexAttention computes it (Dong et al. 2024);
elsewhere blocks of keys are gathered for ``scaled_dot_product_attention``.

Shapes: B batch, T tokens, H heads, K width of a head, N blocks of W tokens, M blocks of keys a block of queries sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.strategy import WINDOW, Attention

NUM_RANDOM = 1
"""Random blocks of keys that a block of queries sees."""


def attend_sparsely(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    mask_B11T: Tensor | None,
    kind: Attention,
    *,
    is_causal: bool = False,
    block: int = WINDOW,
) -> Tensor:
    """Softmax attention over the keys that ``kind`` names, BHTK. ``mask_B11T`` is true at the keys that count."""
    if q_BHTK.is_cuda and (flex := _compiled_flex()) is not None:
        return attend_flexibly(q_BHTK, k_BHTK, v_BHTK, mask_B11T, kind, flex, is_causal=is_causal, block=block)
    B, H, T, K = q_BHTK.shape
    num_blocks = -(-T // block)
    keys_NM = key_blocks(num_blocks, kind, is_causal)
    if mask_B11T is None:
        mask_B11T = torch.ones(B, 1, 1, T, dtype=torch.bool, device=q_BHTK.device)
    extra = num_blocks * block - T
    q, k, v = (F.pad(x, (0, 0, 0, extra)).view(B, H, num_blocks, block, K) for x in (q_BHTK, k_BHTK, v_BHTK))
    mask_BNW = F.pad(mask_B11T, (0, extra)).view(B, num_blocks, block)
    index = keys_NM.clamp(min=0).to(q.device)
    is_there_NM = (keys_NM >= 0).to(q.device)
    k, v = (x[:, :, index].flatten(3, 4).transpose(1, 2).flatten(0, 1) for x in (k, v))  # (B N) H (M W) K
    seen = (mask_BNW[:, index] & is_there_NM[None, :, :, None]).flatten(2, 3)[:, :, None]  # B N 1 (M W)
    if is_causal:
        seen = seen & _before(num_blocks, kind, block).to(q.device)
    out = _attended(q.transpose(1, 2).flatten(0, 1), k, v, seen.flatten(0, 1)[:, None])
    out_BHTK: Tensor = out.view(B, num_blocks, H, block, K).transpose(1, 2).flatten(2, 3)[:, :, :T]
    if kind == "window" or is_causal:
        return out_BHTK
    first = _attended(q_BHTK[:, :, :block], k_BHTK, v_BHTK, mask_B11T)
    return torch.cat([first, out_BHTK[:, :, block:]], 2)


def attend_flexibly(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    mask_B11T: Tensor | None,
    kind: Attention,
    flex: Callable[..., Any],
    *,
    is_causal: bool = False,
    block: int = WINDOW,
) -> Tensor:
    """The same by FlexAttention, which leaves out the blocks that nobody sees."""
    keep_BT = None if mask_B11T is None else mask_B11T[:, 0, 0].expand(q_BHTK.shape[0], q_BHTK.shape[2])

    def counted(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert keep_BT is not None
        return torch.where(keep_BT[b, k], score, float("-inf"))

    seen = _block_mask(q_BHTK.shape[2], kind, q_BHTK.device, is_causal, block)
    out_BHTK: Tensor = flex(q_BHTK, k_BHTK, v_BHTK, score_mod=None if keep_BT is None else counted, block_mask=seen)
    return out_BHTK


@functools.cache
def _block_mask(num_tokens: int, kind: Attention, device: torch.device, is_causal: bool, block: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    num_blocks = -(-num_tokens // block)
    seen_NN = torch.zeros(num_blocks, num_blocks + 1, dtype=torch.bool)
    keys_NM = key_blocks(num_blocks, kind, is_causal)
    seen_NN.scatter_(1, keys_NM % (num_blocks + 1), value=True)  # -1 goes beyond the last
    if kind != "window" and not is_causal:
        seen_NN[0] = True
    seen_NN = seen_NN[:, :num_blocks].to(device)
    whole_NN = torch.tensor(
        [[_is_whole(kind, query, key) for key in range(num_blocks)] for query in range(num_blocks)], device=device
    )

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen_NN[q // block, k // block]

    def sees_before(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_near = (q - k < block) | whole_NN[q // block, k // block]
        return seen_NN[q // block, k // block] & (k <= q) & is_near

    chosen = sees_before if is_causal else sees
    return create_block_mask(chosen, None, None, num_tokens, num_tokens, device=device.type)


@functools.cache
def _compiled_flex() -> Callable[..., Any] | None:
    """None where torch has no FlexAttention."""
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return None
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """A query that sees no key that counts is padding itself: it sees all, so that nothing is divided by zero."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~seen.any(-1, keepdim=True))


@functools.cache
def key_blocks(num_blocks: int, kind: Attention, is_causal: bool = False) -> Tensor:
    """The blocks of keys that each block of queries sees, NM; -1 where there are fewer than M.

    That the first block's queries see all where there are global tokens is not in it. Causal, there is none after.
    """
    generator = torch.Generator().manual_seed(num_blocks)
    rows = []
    for block in range(num_blocks):
        end = block + 1 if is_causal else num_blocks
        seen = [near for near in (block - 1, block, block + 1) if 0 <= near < end]
        if kind != "window" and 0 not in seen:
            seen.append(0)
        if kind == "window_global_random":
            others = [other for other in torch.randperm(num_blocks, generator=generator).tolist() if other not in seen]
            seen += [other for other in others if other < end][:NUM_RANDOM]
        rows.append(seen)
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def _is_whole(kind: Attention, query_block: int, key_block: int) -> bool:
    """Whether causal queries see all of a block of keys that comes before them, not only what is near."""
    return key_block < query_block - 1 or (kind != "window" and key_block == 0)


@functools.cache
def _before(num_blocks: int, kind: Attention, block: int) -> Tensor:
    """Which of the keys in its blocks a causal query sees, NW(MW)."""
    keys_NM = key_blocks(num_blocks, kind, is_causal=True)
    whole_NM = torch.tensor([[_is_whole(kind, query, int(key)) for key in row] for query, row in enumerate(keys_NM)])
    places_W = torch.arange(block)
    keys_N1MW = (keys_NM[:, :, None] * block + places_W)[:, None]
    queries_NW11 = (torch.arange(num_blocks)[:, None] * block + places_W)[:, :, None, None]
    is_near = (queries_NW11 - keys_N1MW < block) | whole_NM[:, None, :, None]
    return ((keys_N1MW <= queries_NW11) & is_near).flatten(2, 3)
