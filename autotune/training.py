"""The trainer: epochs of the applied step, an evaluation after each, and a record of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from autotune.apply import Run
from autotune.errors import AutotuneError
from autotune.files import replace_file


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch's figures."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    """Mean over the epoch's optimizer steps."""
    test_loss: float
    test_accuracy: float
    """Share classified correctly, 0 to 1."""
    train_s: float
    eval_s: float
    samples_per_s: float
    learning_rate: float
    """After the epoch's last step."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """A training run's record, as written to metrics.json."""

    workload: str
    source: str
    device: str
    strategy: dict[str, str | int]
    profile: str | None
    """The profile's file; None for the plain baseline."""
    num_train: int
    num_test: int
    seed: int
    projected_s: float | None
    """What the search projected for a run of this length, where a profile tells."""
    wall_s: float
    peak_memory_bytes: int
    """Peak device memory since the backend's memory window was started."""
    epochs: tuple[Epoch, ...]
    step_losses: tuple[float, ...]


class Training:
    """Trains a run; what is done so far can be read at any time, after an interruption too."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.epochs: list[Epoch] = []
        self.wall_s = 0.0
        self._step_losses: list[torch.Tensor] = []

    @property
    def step_losses(self) -> tuple[float, ...]:
        """Mean loss of every optimizer step so far. Waits for the device."""
        return tuple(torch.stack(self._step_losses).float().tolist()) if self._step_losses else ()

    def train(
        self,
        num_epochs: int,
        *,
        on_step: Callable[[int, int, int], None] = lambda epoch, step, samples: None,
        on_evaluation: Callable[[int], None] = lambda epoch: None,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> None:
        """Trains and evaluates for some epochs. Raises AutotuneError when the loss is no longer a number."""
        begin = time.perf_counter()
        for epoch in range(1, num_epochs + 1):
            start = time.perf_counter()
            first = len(self._step_losses)
            num_samples = 0
            for step, batch in enumerate(self.run.loader, 1):
                self._step_losses.append(self.run.step(batch))
                num_samples += sum(micro.num_samples for micro in batch)
                self.wall_s = time.perf_counter() - begin
                on_step(epoch, step, num_samples)
            self.run.backend.synchronize()
            losses = torch.stack(self._step_losses[first:]).float()
            train_s = time.perf_counter() - start
            if not torch.isfinite(losses).all():
                step = int((~torch.isfinite(losses)).nonzero()[0]) + 1
                raise AutotuneError(
                    f"the loss is {losses[step - 1]:.0f} at step {step} of epoch {epoch}; training stopped"
                )
            on_evaluation(epoch)
            start = time.perf_counter()
            test_loss, accuracy = self.run.evaluate()
            eval_s = time.perf_counter() - start
            self.wall_s = time.perf_counter() - begin
            self.epochs.append(
                Epoch(
                    epoch=epoch,
                    train_loss=float(losses.mean()),
                    test_loss=test_loss,
                    test_accuracy=accuracy,
                    train_s=train_s,
                    eval_s=eval_s,
                    samples_per_s=num_samples / train_s,
                    learning_rate=self.run.optimizer.param_groups[0]["lr"],
                )
            )
            on_epoch(self.epochs[-1])

    def metrics(self, *, profile: str | None, projected_s: float | None, seed: int) -> Metrics:
        """The record of what is done so far."""
        workload, device = self.run.workload, self.run.backend.device()
        return Metrics(
            workload=workload.name,
            source=workload.source,
            device=f"{device.name}, {device.architecture}",
            strategy=self.run.strategy.to_dict(),
            profile=profile,
            num_train=workload.num_train,
            num_test=workload.num_test,
            seed=seed,
            projected_s=projected_s,
            wall_s=self.wall_s,
            peak_memory_bytes=self.run.backend.peak_memory_bytes(),
            epochs=tuple(self.epochs),
            step_losses=self.step_losses,
        )


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Writes the record as JSON, whole or not at all. Raises AutotuneError where it cannot be written."""
    try:
        replace_file(path, msgspec.json.format(msgspec.json.encode(metrics), indent=1) + b"\n")
    except OSError as exc:
        raise AutotuneError(f"metrics {path} cannot be written: {exc.strerror or exc}") from exc
