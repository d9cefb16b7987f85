"""What watches a search or a model and keeps what it saw."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from unittest import mock

import torch

from autotune.apply import Run
from autotune.measurement import Trial
from autotune.process import Child
from autotune.search.settings import Observer
from autotune.strategy import Strategy
from autotune.trial import pulse
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


class SleepingPulse(Pulse):
    """Its fixed work is a sleep. For models that sleep, too: those are as fast on a busy machine, whose own speed would
    make them out to be faster than they are."""

    def _start(self) -> Child:
        if self._child is None:
            self._child = Child(_serve_sleeping, self._backend_name, self.pauses)
        return self._child


def _serve_sleeping(connection: Connection, backend_name: str, pauses: bool) -> None:
    work = pulse._Work({lambda: time.sleep(0.01): 1})
    with mock.patch.multiple(pulse, _paused_work=lambda: work, _unpaused_work=lambda _: work):
        pulse._serve(connection, backend_name, pauses)


def matmul_dtypes(run: Run) -> list[torch.dtype]:
    """Of what the encoder's first projection gives, pass by pass as training goes on."""
    seen: list[torch.dtype] = []
    first = run.model.get_submodule("blocks.0.attention.qkv")
    first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    return seen
