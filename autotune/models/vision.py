"""An image classifier in the manner of BDH (Pathway, "The Dragon Hatchling", 2025): sparse positive activations in many
neurons, that linear attention with rotary positions and low-rank maps connect; the maps are shared by all layers.

Here it sees patches of an image and a class token, in both directions; a last layer of softmax attention reads the
class token out. Shapes: B batch, T tokens, D width, H heads, N neurons of a head, V width of a head's values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.models.attention import SelfAttention


class Synapses(nn.Module):
    """The low-rank maps between the stream and the neurons."""

    def __init__(self, width: int, num_neurons: int) -> None:
        super().__init__()
        self.encode = nn.Linear(width, num_neurons, bias=False)
        self.encode_values = nn.Linear(width, num_neurons, bias=False)
        self.decode = nn.Linear(num_neurons, width, bias=False)


class HatchlingBlock(nn.Module):
    """Neurons that fire, what they attend to, and what follows from both, added to the stream."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attended_norm = nn.LayerNorm(width)
        self.decoded_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, synapses: Synapses, cos_TN: Tensor, sin_TN: Tensor) -> Tensor:
        """The stream after this block, BTD."""
        B, T, D = x_BTD.shape
        fired_BTHN = F.relu(synapses.encode(x_BTD)).view(B, T, self.num_heads, -1)
        turned_BHTN = rotated(fired_BTHN.transpose(1, 2), cos_TN, sin_TN)
        values_BHTV = x_BTD.view(B, T, self.num_heads, -1).transpose(1, 2)
        weights_BHTT = turned_BHTN @ turned_BHTN.transpose(-1, -2) / T  # fewer products than K^T V first, as T < N
        attended_BTD = (weights_BHTT.to(values_BHTV.dtype) @ values_BHTV).transpose(1, 2).reshape(B, T, D)
        gate_BTHN = F.relu(synapses.encode_values(self.attended_norm(attended_BTD))).view_as(fired_BTHN)
        decoded_BTD = synapses.decode(self.dropout(fired_BTHN * gate_BTHN).flatten(2))
        out_BTD: Tensor = self.norm(x_BTD + self.decoded_norm(decoded_BTD))
        return out_BTD


class VisionBDH(nn.Module):
    """Patches by a convolution, a class token, blocks with shared synapses, a linear head on the class token."""

    cos_TN: Tensor  # noqa: N815 - its shape
    sin_TN: Tensor  # noqa: N815

    def __init__(
        self,
        *,
        image_side: int = 32,
        patch_side: int = 4,
        num_classes: int = 10,
        width: int = 192,
        num_layers: int = 6,
        num_heads: int = 6,
        neurons_per_head: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        num_tokens = (image_side // patch_side) ** 2 + 1
        self.patches = nn.Conv2d(3, width, patch_side, stride=patch_side)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.place_TD = nn.Parameter(torch.zeros(num_tokens, width))
        self.input_norm = nn.LayerNorm(width)
        self.synapses = Synapses(width, num_heads * neurons_per_head)
        self.blocks = nn.ModuleList(HatchlingBlock(width, num_heads, dropout) for _ in range(num_layers))
        self.readout = SelfAttention(width, num_heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        cos_TN, sin_TN = rotations(num_tokens, neurons_per_head)
        self.register_buffer("cos_TN", cos_TN, persistent=False)
        self.register_buffer("sin_TN", sin_TN, persistent=False)
        for embedding in (self.class_token, self.place_TD):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits of the classes, [B, num_classes]."""
        patches_BTD = self.patches(images_BCHW).flatten(2).transpose(1, 2)
        tokens_BTD = torch.cat([self.class_token.expand(len(patches_BTD), -1, -1), patches_BTD], 1)
        x_BTD = self.input_norm(tokens_BTD + self.place_TD)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.synapses, self.cos_TN, self.sin_TN)
        x_BTD = x_BTD + self.readout(x_BTD, None)
        logits: Tensor = self.head(self.norm(x_BTD[:, 0]))
        return logits


def rotations(num_positions: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, [num_positions, size], a pair of places turned by each (Su et al.
    2021)."""
    frequency = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    angle = (torch.arange(num_positions)[:, None] * frequency).repeat_interleave(2, 1)
    return angle.cos(), angle.sin()


def rotated(x: Tensor, cos_TN: Tensor, sin_TN: Tensor) -> Tensor:
    """``x``, [..., T, N], its pairs of places turned by their position's angles."""
    across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos_TN.to(x.dtype) + across * sin_TN.to(x.dtype)
