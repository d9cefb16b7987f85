"""Marks that several files of tests need."""

from __future__ import annotations

import sys

import pytest
import torch

on_a_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pauses = pytest.mark.skipif(sys.platform != "linux", reason="what is timed is paused on Linux only")
