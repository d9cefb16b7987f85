"""A pre-norm transformer encoder that classifies a text from the mean of its tokens.

Shapes: B batch, T tokens, D model width, C classes. Packed, B is 1 and T all sequences' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.models.attention import SelfAttention
from autotune.models.flash import Row, row_of


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

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits BC for token ids BT; ``mask_BT`` is true at real tokens, false at padding.

        Packed, ids are 1T, the sequences one after another, and ``lengths`` says how long each is; what is left of
        the row is padding, a sequence of its own that counts for nothing.
        """
        positions_T = torch.arange(max(lengths or ids_BT.shape[1:]), device=ids_BT.device)
        if lengths is not None:
            positions_T = torch.cat([positions_T[:length] for length in lengths])
            positions_T = F.pad(positions_T, (0, ids_BT.shape[1] - len(positions_T)))
        x_BTD = self.dropout(self.token_embedding(ids_BT) + self.position_embedding(positions_T))
        row = None
        if lengths is not None:
            rest = ids_BT.shape[1] - sum(lengths)
            row = row_of([*lengths, rest] if rest else lengths, ids_BT.device)
        mask_B11T = None if mask_BT is None else mask_BT[:, None, None, :]
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_B11T, row)
        x_BTD = self.norm(x_BTD)
        if row is not None and lengths is not None:
            mean_BD = torch.stack([x_TD.mean(0) for x_TD in x_BTD[0].split(list(row.lengths))[: len(lengths)]])
        elif mask_BT is not None:
            weight_BT1 = mask_BT.unsqueeze(-1).to(x_BTD.dtype)
            mean_BD = (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        else:
            mean_BD = x_BTD.mean(1)
        logits_BC: Tensor = self.head(mean_BD)
        return logits_BC
