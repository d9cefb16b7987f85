"""A pre-norm transformer encoder that classifies a text from the mean of its tokens.

Shapes: B batch, T tokens, D model width, C classes. Packed, B is 1 and T all sequences' tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autotune.models.attention import SelfAttention
from autotune.models.flash import LONGEST_REST, Row


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, num_heads: int, ffn_width: int, dropout: float, *, is_causal: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, is_causal=is_causal)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor | None, row: Row | None = None) -> Tensor:
        """The stream after this block, BTD."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), mask_B11T, row))
        out_BTD: Tensor = x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        return out_BTD


class EncoderClassifier(nn.Module):
    """Token and learned position embeddings, pre-norm blocks, mean over the real tokens, a linear head.

    With the default sizes it has 5,851,138 parameters.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int = 10_000,
        max_tokens: int = 512,
        num_classes: int = 2,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        ffn_width: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.position_embedding = nn.Embedding(max_tokens, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, ffn_width, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)  # GPT-2's initialisation (Radford et al. 2019)

    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        sequence_S: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """Logits BC for token ids BT; ``mask_BT`` is true at real tokens, false at padding.

        Packed, ids are 1T, the sequences one after another; where each lies is what ``in_a_row`` says of it. What is
        left of the row is padding, a sequence of its own that counts for nothing.
        """
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.dropout(self.token_embedding(ids_BT) + self.position_embedding(positions_BT))
        row = None if bounds is None else self._row(bounds)
        mask_B11T = None if mask_BT is None else mask_BT[:, None, None, :]
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_B11T, row)
        x_BTD = self.norm(x_BTD)
        if bounds is not None and sequence_S is not None:
            mean_BD = _means(x_BTD[0], sequence_S, len(bounds) - 2)
        elif mask_BT is not None:
            weight_BT1 = mask_BT.unsqueeze(-1).to(x_BTD.dtype)
            mean_BD = (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        else:
            mean_BD = x_BTD.mean(1)
        logits_BC: Tensor = self.head(mean_BD)
        return logits_BC

    def _row(self, bounds: Tensor) -> Row:
        """A device is only asked for the lengths, and waited for, where each sequence has to go by itself. What fills
        up the row may be longer than any sequence."""
        first = self.blocks[0]
        assert isinstance(first, Block)
        is_split = first.attention.kernel is None
        lengths = tuple(filter(None, bounds.diff().tolist())) if is_split else None
        return Row(bounds, max(self.position_embedding.num_embeddings, LONGEST_REST), lengths)


def _means(x_SD: Tensor, sequence_S: Tensor, num_sequences: int) -> Tensor:
    """The mean of each sequence's tokens, as one matrix product in the stream's own precision."""
    is_in_BS = sequence_S == torch.arange(num_sequences, device=x_SD.device)[:, None]
    weight_BS = is_in_BS.to(x_SD.dtype)
    with torch.autocast(x_SD.device.type, enabled=False):
        mean_BD: Tensor = weight_BS @ x_SD / weight_BS.sum(1, keepdim=True)
    return mean_BD
