"""Trains a run for some steps, timing and weighing forward pass, backward pass and update apart, and evaluates it."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import msgspec

from autotune.apply import Run
from autotune.data.batching import MicroBatch
from autotune.step import Phase


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What some steps of training took, and what came of them. Times are medians over the steps but the first.

    A step begins with waiting for its batch."""

    num_steps: int
    step_ms: float
    forward_ms: float
    backward_ms: float
    update_ms: float
    samples_per_s: float
    """Real samples of a step over the median step."""
    forward_bytes: int
    """Peak memory up to the end of the first forward pass: what the backward pass needs is kept by then."""
    backward_bytes: int
    """Peak memory up to the end of the first backward pass."""
    peak_memory_bytes: int
    """Of all steps and the evaluation."""
    train_loss: float
    """Mean over the last quarter of the steps."""
    test_loss: float
    accuracy: float | None
    """Share of the samples evaluated that was classified correctly; None where they have no class."""
    perplexity: float | None
    losses: tuple[float, ...]


def train_some(run: Run, num_steps: int, num_eval: int, on_step: Callable[[int], None] = lambda _: None) -> Trained:
    """Takes the recipe's first ``num_steps`` steps, then evaluates the first ``num_eval`` test samples.

    Raises whatever the run raises, FloatingPointError where a loss is no number, the test loss included.
    """
    backend = run.backend
    seconds: dict[Phase, list[float]] = {"forward": [], "backward": [], "update": []}
    peaks: dict[Phase, int] = {}
    spent: dict[Phase, float] = {}
    last = 0.0

    def reached(phase: Phase) -> None:
        nonlocal last
        backend.synchronize()
        now = time.perf_counter()
        spent[phase] = spent.get(phase, 0.0) + now - last
        last = now
        if phase not in peaks:
            peaks[phase] = backend.peak_memory_bytes()
            last = time.perf_counter()

    run.step.on_phase = reached
    losses: list[float] = []
    steps: list[float] = []
    num_samples = 0
    start = time.perf_counter()
    for batch in itertools.islice(_batches(run), num_steps):
        spent.clear()
        last = time.perf_counter()
        loss = float(run.step(batch))
        backend.synchronize()
        steps.append(time.perf_counter() - start)
        for phase, found in seconds.items():
            found.append(spent.get(phase, 0.0))
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} at step {len(losses) + 1}")
        losses.append(loss)
        num_samples += sum(micro.num_samples for micro in batch)
        on_step(len(losses))
        start = time.perf_counter()
    run.step.on_phase = None
    test_loss, accuracy = run.evaluate(run.evaluation_batches(run.evaluation_plan(num_eval)))
    if not math.isfinite(test_loss):
        raise FloatingPointError(f"test loss {test_loss} after {len(losses)} steps")
    timed = slice(1 if num_steps > 1 else 0, None)
    last_quarter = losses[-max(1, len(losses) // 4) :]
    return Trained(
        num_steps=len(losses),
        step_ms=1000 * statistics.median(steps[timed]),
        forward_ms=1000 * statistics.median(seconds["forward"][timed]),
        backward_ms=1000 * statistics.median(seconds["backward"][timed]),
        update_ms=1000 * statistics.median(seconds["update"][timed]),
        samples_per_s=num_samples / len(losses) / statistics.median(steps[timed]),
        forward_bytes=peaks["forward"],
        backward_bytes=peaks["backward"],
        peak_memory_bytes=backend.peak_memory_bytes(),
        train_loss=sum(last_quarter) / len(last_quarter),
        test_loss=test_loss,
        accuracy=None if math.isnan(accuracy) else accuracy,
        perplexity=run.workload.perplexity(test_loss),
        losses=tuple(losses),
    )


def _batches(run: Run) -> Iterator[list[MicroBatch]]:
    while True:
        yield from run.loader
