"""A user's own training script, small enough to be run often: blocks, dropout, one batch."""

from __future__ import annotations

from pathlib import Path

SCRIPT = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16))

    def forward(self, x):
        return x + self.body(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def workload():
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(8, 16, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    return Model(), batch
"""


def write(folder: Path) -> str:
    """Writes it; returns what ``--model`` is told."""
    path = folder / "own_script.py"
    path.write_text(SCRIPT)
    return f"{path}:workload"
