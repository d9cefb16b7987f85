"""A training run's curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.errors import UsageError
from autotune.training import Training


def tensorboard_log(folder: Path, training: Training) -> Callable[[], None]:
    """A function that writes what it has not yet written; what a resumed training brings was written before. The first
    call makes the file. Raises UsageError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs tensorboard: pip install 'autotune-torch[tensorboard]'") from None
    writer: Any = None
    num_steps, num_epochs = len(training.steps.losses), len(training.epochs)

    def log() -> None:
        nonlocal writer, num_steps, num_epochs
        writer = writer or SummaryWriter(str(folder))
        steps, epochs = training.steps, training.epochs
        series = {"loss": steps.losses, "learning_rate": steps.learning_rates, "gradient_norm": steps.grad_norms}
        for title, values in series.items():
            for step, value in enumerate(values[num_steps:], num_steps + 1):
                writer.add_scalar(f"train/{title}", value, step)
        for epoch in epochs[num_epochs:]:
            quality, value = ("accuracy", epoch.test_accuracy)
            if epoch.test_perplexity is not None:
                quality, value = ("perplexity", epoch.test_perplexity)
            writer.add_scalar("test/loss", epoch.test_loss, epoch.epoch)
            writer.add_scalar(f"test/{quality}", value, epoch.epoch)
        num_steps, num_epochs = len(steps.losses), len(epochs)
        writer.flush()

    return log
