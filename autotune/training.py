"""The trainer: epochs of the applied step, an evaluation after each, a record of both, and a state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from autotune.apply import Run
from autotune.errors import AutotuneError
from autotune.files import save
from autotune.strategy import Strategy
from autotune.workloads.base import Recipe

METRICS_FILE = "metrics.json"

T = TypeVar("T")


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch's figures."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    """Mean over the epoch's optimizer steps."""
    test_loss: float
    test_accuracy: float
    """Share classified correctly, 0 to 1; no number where samples have no class."""
    test_perplexity: float | None = None
    """The exponential of the test loss, where that is a token's cross-entropy."""
    train_s: float
    eval_s: float
    samples_per_s: float
    learning_rate: float
    """After the epoch's last step."""
    grad_norm: float | None = None
    """Mean L2 norm of the gradients before clipping; None where nothing is clipped."""


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """What every optimizer step so far was like."""

    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    grad_norms: tuple[float, ...]
    """Before clipping; empty where nothing is clipped."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """A training run's record, as written to metrics.json."""

    workload: str
    source: str
    device: str
    strategy: Strategy
    profile: str | None
    """The profile's file; None for the plain baseline. ``--knob`` may have changed its setting."""
    num_train: int
    num_test: int
    seed: int
    projected_s: float | None
    """What the search projected for a run of this length, where a profile tells."""
    wall_s: float
    """All sittings together."""
    peak_memory_bytes: int
    """Peak device memory of all sittings."""
    epochs: tuple[Epoch, ...]
    steps: Steps
    recipe: Recipe | None = None
    """None in records of before this was kept."""
    num_epochs: int | None = None
    """Planned ones, which the schedule goes by."""


class Training:
    """Trains a run; what is done so far can be read at any time, after an interruption too.

    ``stop`` ends it after the step under way: nothing is lost, and ``state`` is whole.
    """

    def __init__(self, run: Run, *, patience: int | None = None) -> None:
        self.run = run
        self.epochs: list[Epoch] = []
        self.step = 0
        """Optimizer steps done in the epoch under way."""
        self.wall_s = 0.0
        self.is_stopped = False
        self._patience = patience
        self._epoch_s = 0.0
        self._peak_bytes = 0
        self._losses, self._norms = _Series(), _Series()
        self._rates: list[float] = []
        self._random: dict[str, Any] | None = None

    def stop(self) -> None:
        """Ends the training after the step under way."""
        self.is_stopped = True

    @property
    def steps(self) -> Steps:
        """Every step so far. Waits for the device."""
        return Steps(
            losses=tuple(self._losses.numbers()),
            learning_rates=tuple(self._rates),
            grad_norms=tuple(self._norms.numbers()),
        )

    @property
    def peak_memory_bytes(self) -> int:
        """Peak device memory since the backend's memory window was started, or in an earlier sitting."""
        return max(self._peak_bytes, self.run.backend.peak_memory_bytes())

    @property
    def is_best(self) -> bool:
        """Whether the last epoch has the lowest test loss of all."""
        return bool(self.epochs) and self.epochs[-1].test_loss <= min(epoch.test_loss for epoch in self.epochs)

    @property
    def has_converged(self) -> bool:
        """Whether the test loss has not fallen for as many epochs as there is patience."""
        if self._patience is None or len(self.epochs) <= self._patience:
            return False
        losses = [epoch.test_loss for epoch in self.epochs]
        return min(losses[-self._patience :]) >= min(losses[: -self._patience])

    def train(
        self,
        num_epochs: int,
        *,
        on_step: Callable[[int, int, int], None] = lambda epoch, step, samples: None,
        on_evaluation: Callable[[int], None] = lambda epoch: None,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> None:
        """Trains and evaluates until so many epochs are done in all, or it has converged, or is stopped.

        Raises AutotuneError when the loss is no longer a number.
        """
        begin = time.perf_counter() - self.wall_s
        while len(self.epochs) < num_epochs and not self.is_stopped and not self.has_converged:
            number = len(self.epochs) + 1
            self._train_epoch(number, begin, on_step)
            if self.is_stopped:
                return
            self.check_losses()
            random, start = self.run.backend.random_state(), time.perf_counter()
            on_evaluation(number)
            run = self.run
            batches = run.evaluation_batches(run.evaluation_plan())
            test_loss, accuracy = run.evaluate(self._until_stopped(batches))
            if self.is_stopped:  # evaluated in part: what is drawn for it is drawn again
                self._random = random
                return
            eval_s = time.perf_counter() - start
            self.wall_s = time.perf_counter() - begin
            self._end_epoch(test_loss, accuracy, eval_s)
            on_epoch(self.epochs[-1])

    def state(self) -> dict[str, Any]:
        """All that going on needs, as ``torch.save`` takes it: tensors, numbers and words."""
        run = self.run
        return {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": None if run.scheduler is None else _plain_state(run.scheduler.state_dict()),
            "scaler": run.step.scaler_state(),
            "random": self._random or run.backend.random_state(),
            "epochs": msgspec.to_builtins(self.epochs),
            "step": self.step,
            "epoch_s": self._epoch_s,
            "wall_s": self.wall_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "steps": msgspec.to_builtins(self.steps),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state`` gave; the run must have been applied as that one was.

        Raises AutotuneError where the model or the optimizer is another.
        """
        run = self.run
        try:
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            if run.scheduler is not None:
                run.scheduler.load_state_dict(state["scheduler"])
            run.step.load_scaler_state(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError) as exc:
            raise AutotuneError(
                f"the run cannot be gone on with, its model or optimizer was another: {str(exc).splitlines()[0]}"
            ) from exc
        self.epochs = msgspec.convert(state["epochs"], list[Epoch])
        self.step, self._epoch_s, self.wall_s = state["step"], state["epoch_s"], state["wall_s"]
        self._peak_bytes = state["peak_memory_bytes"]
        steps = state["steps"]
        self._losses, self._norms = _Series(steps["losses"]), _Series(steps["grad_norms"])
        self._rates = list(steps["learning_rates"])
        self._random = state["random"]

    def check_losses(self) -> None:
        """Raises AutotuneError where a step's loss is no number. Waits for the device."""
        losses = self._losses.numbers()
        bad = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None:
            in_epoch = bad - (len(losses) - self.step) + 1
            raise AutotuneError(
                f"the loss is {losses[bad]:.0f} at step {in_epoch} of epoch {len(self.epochs) + 1}; training stopped"
            )

    def metrics(
        self, *, profile: str | None, projected_s: float | None, seed: int, num_epochs: int | None = None
    ) -> Metrics:
        """The record of what is done so far, of ``num_epochs`` that are planned."""
        workload, device = self.run.workload, self.run.backend.device()
        return Metrics(
            workload=workload.name,
            source=workload.source,
            device=f"{device.name}, {device.architecture}",
            strategy=self.run.strategy,
            profile=profile,
            num_train=workload.num_train,
            num_test=workload.num_test,
            seed=seed,
            projected_s=projected_s,
            wall_s=self.wall_s,
            peak_memory_bytes=self.peak_memory_bytes,
            epochs=tuple(self.epochs),
            steps=self.steps,
            recipe=workload.recipe,
            num_epochs=num_epochs,
        )

    def _train_epoch(self, number: int, begin: float, on_step: Callable[[int, int, int], None]) -> None:
        """The rest of the epoch's steps. A loader draws a random number as it starts: where an epoch is gone on with,
        that was before the state was taken."""
        run, random, self._random = self.run, self._random, None
        if random is not None and not self.step:
            run.backend.set_random_state(random)
        epoch = number - 1
        plan = run.loader.plan(epoch)
        run.loader.epoch = number
        batches = run.loader.over(plan[self.step :], epoch)
        if random is not None and self.step:
            run.backend.set_random_state(random)
        num_samples = sum(batch.num_samples for batch in plan[: self.step])
        start = time.perf_counter() - self._epoch_s
        for batch in batches:
            self._rates.append(run.optimizer.param_groups[0]["lr"])
            self._losses.append(run.step(batch))
            if run.step.grad_norm is not None:
                self._norms.append(run.step.grad_norm)
            num_samples += sum(micro.num_samples for micro in batch)
            self.step += 1
            now = time.perf_counter()
            self.wall_s, self._epoch_s = now - begin, now - start
            on_step(number, self.step, num_samples)
            if self.is_stopped:
                return
        run.backend.synchronize()
        self._epoch_s = time.perf_counter() - start

    def _end_epoch(self, test_loss: float, accuracy: float, eval_s: float) -> None:
        losses, workload = self._losses.numbers()[-self.step :], self.run.workload
        # where the loss scaler finds its scale, a step that it skips has a norm that is no number
        norms = [norm for norm in self._norms.numbers()[-self.step :] if math.isfinite(norm)]
        self.epochs.append(
            Epoch(
                epoch=len(self.epochs) + 1,
                train_loss=sum(losses) / len(losses),
                test_loss=test_loss,
                test_accuracy=accuracy,
                test_perplexity=workload.perplexity(test_loss),
                train_s=self._epoch_s,
                eval_s=eval_s,
                samples_per_s=workload.num_train / self._epoch_s,
                learning_rate=self.run.optimizer.param_groups[0]["lr"],
                grad_norm=sum(norms) / len(norms) if norms else None,
            )
        )
        self.step, self._epoch_s = 0, 0.0

    def _until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        for batch in batches:
            if self.is_stopped:
                return
            yield batch


class _Series:
    """Numbers that come as tensors on the device, which is waited for when they are asked for."""

    def __init__(self, numbers: Sequence[float] = ()) -> None:
        self._numbers = list(numbers)
        self._pending: list[torch.Tensor] = []

    def append(self, value: torch.Tensor) -> None:
        self._pending.append(value)

    def numbers(self) -> list[float]:
        if self._pending:
            self._numbers += torch.stack(self._pending).float().tolist()
            self._pending.clear()
        return self._numbers


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Writes the record as JSON, whole or not at all. Raises AutotuneError where it cannot be written."""
    save(path, msgspec.json.format(msgspec.json.encode(metrics), indent=1) + b"\n", "metrics")


def read_metrics(path: Path) -> Metrics:
    """A training run's record, by its file or the run's folder. Raises AutotuneError for what is none."""
    file = path / METRICS_FILE if path.is_dir() else path
    try:
        record = msgspec.json.decode(file.read_bytes())
        for epoch in record["epochs"]:  # JSON has no way to write what is no number
            epoch |= {field: _number(epoch[field]) for field in ("train_loss", "test_loss", "test_accuracy")}
        record["steps"]["grad_norms"] = list(map(_number, record["steps"]["grad_norms"]))
        return msgspec.convert(record, Metrics)
    except OSError as exc:
        raise AutotuneError(f"run {file} cannot be read: {exc.strerror or exc}") from exc
    except KeyError as exc:
        raise AutotuneError(f"{file} is no training run's record of this autotune: it has no {exc}") from exc
    except (msgspec.DecodeError, ValueError, TypeError) as exc:
        raise AutotuneError(f"{file} is no training run's record: {exc}") from exc


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's state without its functions, which the recipe gives again."""
    return {name: value for name, value in state.items() if not callable(value)}
