"""What every peer is given: the model, the data, the loss and the optimizer of the plain baseline, as a person would
write them for it. Runs in the peer's own venv."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autotune import workloads
from autotune.search.task import FREE_MEMORY_SHARE
from autotune.workloads.base import Workload


def workload() -> Workload:
    """The project's own reviews classifier."""
    module = workloads.get("imdb")
    return module.open_workload(module.prepare(None, limit=None, on_progress=lambda _: None))


class Classifier(nn.Module):
    """The encoder with its loss, called with a batch's tensors by name."""

    accepts_loss_kwargs = False  # what transformers' Trainer would otherwise pass on to the encoder

    def __init__(self, of: Workload) -> None:
        super().__init__()
        self.encoder, self._loss = of.build_model(), of.loss

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.encoder(**inputs)
        if labels is None:
            return {"logits": logits}
        return {"loss": self._loss(logits, labels) / len(labels), "logits": logits}


def adamw(model: nn.Module, of: Workload) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=of.recipe.learning_rate, weight_decay=of.recipe.weight_decay)


class Batches:
    """Gives a DataLoader its batches, padded to the limit as the plain baseline's are."""

    def __init__(self, of: Workload) -> None:
        self._workload = of

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        micro = self._workload.collate(self._workload.train, np.asarray(indices), self._workload.max_tokens)
        return {**micro.inputs, "labels": micro.targets}


def loader(of: Workload, batch_size: int) -> DataLoader[Any]:
    """Random batches of the training reviews."""
    indices: Any = range(of.num_train)
    return DataLoader(indices, batch_size=batch_size, shuffle=True, collate_fn=Batches(of))


def limit_memory() -> None:
    """A tool that looks for the largest batch is told by an error, not by the kernel's OOM killer."""
    limit_bytes = int(FREE_MEMORY_SHARE * psutil.virtual_memory().available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


class Clock:
    """Seconds since it was built."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def report(self, words: str, **strategy: Any) -> None:
        """Prints what was chosen: knobs of a Strategy that differ from the plain baseline's."""
        print(json.dumps({"words": words, "strategy": strategy, "search_s": time.perf_counter() - self._start}))
