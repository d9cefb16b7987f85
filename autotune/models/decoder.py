"""A pre-norm transformer decoder that predicts each token of a text from those before it.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autotune.models.encoder import Block


class DecoderLM(nn.Module):
    """Token embeddings, sinusoidal positions, pre-norm causal blocks, an output head of its own weights.

    With the default sizes it has 28,941,393 parameters.
    """

    position_TD: Tensor  # noqa: N815 - its shape

    def __init__(
        self,
        *,
        vocabulary_size: int = 50_257,
        max_tokens: int = 256,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        ffn_width: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.register_buffer("position_TD", sinusoids(max_tokens, width), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, ffn_width, dropout, is_causal=True) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size)
        self.scale = math.sqrt(width)
        nn.init.normal_(self.token_embedding.weight, std=width**-0.5)  # of the positions' size, once scaled
        nn.init.normal_(self.head.weight, std=0.02)  # GPT-2's: begins as a uniform guess
        nn.init.zeros_(self.head.bias)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits BTV of the token after each of BT."""
        x_BTD = self.token_embedding(ids_BT) * self.scale + self.position_TD[: ids_BT.shape[1]]
        x_BTD = self.dropout(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, None)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Positions as sines and cosines of falling frequency, [num_positions, width] (Vaswani et al. 2017)."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = torch.arange(num_positions)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
