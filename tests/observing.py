"""What watches a search or a model and keeps what it saw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotune.apply import Run
from autotune.measurement import Trial
from autotune.search.settings import Observer
from autotune.strategy import Strategy
from autotune.trial.pulse import Pulse


class Silent(Observer):
    """Says nothing; ``origins`` are those of the trials, in order."""

    def __init__(self) -> None:
        self.origins: list[str] = []
        self.resumed = 0
        """Trials taken over from an interrupted search."""

    def on_resume(self, trials: Sequence[Trial], best: Trial | None, spent_s: float) -> None:
        self.resumed = len(trials)

    def on_trial_start(self, number: int, strategy: Strategy, origin: str) -> None:
        self.origins.append(origin)


class SilentPulse(Pulse):
    """A device whose own speed is not measured."""

    def beat(self) -> float | None:
        return None

    def file(self) -> None:
        return None


def matmul_dtypes(run: Run) -> list[torch.dtype]:
    """Of what the encoder's first projection gives, pass by pass as training goes on."""
    seen: list[torch.dtype] = []
    first = run.model.get_submodule("blocks.0.attention.qkv")
    first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    return seen
