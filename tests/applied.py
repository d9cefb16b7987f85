"""Small runs of the reviews' classifier, with knobs in effect."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import torch

from autotune import backends, workloads
from autotune.apply import Run, apply
from autotune.models.encoder import EncoderClassifier
from autotune.strategy import Strategy
from autotune.workloads.base import Workload


def reviews(folder: Path) -> Workload:
    """The workload on a folder's reviews, cut to 64 tokens."""
    module = workloads.get("imdb")
    prepared = module.open_workload(module.prepare(folder, limit=None, on_progress=lambda _: None))
    return dataclasses.replace(prepared, max_tokens=64)


def small_model() -> EncoderClassifier:
    torch.manual_seed(1)
    return EncoderClassifier(width=32, num_heads=2, ffn_width=32, num_layers=2, dropout=0.0)


def run_of(workload: Workload, **knobs: object) -> Run:
    strategy = msgspec.convert({"micro_batch": 32, **knobs}, Strategy)
    return apply(strategy, workload, backends.get("cpu"), model=small_model())
