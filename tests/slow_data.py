"""Data that are far away, for a search in real processes: each imports this, and nothing that takes long."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Slow(Dataset[tuple[Tensor, int]]):
    """Of whose time more is spent waiting for them than on anything else."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(0.002)
        return torch.rand(4), index % 3


def workload() -> tuple[nn.Module, DataLoader[tuple[Tensor, int]]]:
    return nn.Linear(4, 3), DataLoader(Slow(), batch_size=8, shuffle=True)
