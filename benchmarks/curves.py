"""Baseline and best on the same batches, loss by loss: python -m benchmarks.curves --model NAME [--steps 60]

Both train from the same weights on the same samples in the same order, by the recipe, without
dropout (which no two kernels draw alike). The best is this device's saved profile.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from autotune import backends, store, workloads
from autotune.apply import apply
from autotune.backends.base import Backend
from autotune.report.terminal import describe
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.seen import without_dropout

ROWS = 12


def curve(strategy: Strategy, workload: Workload, backend: Backend, steps: int) -> list[float]:
    """The loss of each step."""
    run = apply(strategy, workload, backend, total_steps=steps)
    generator = np.random.default_rng(0)
    batches = [generator.integers(0, workload.num_train, workload.recipe.global_batch) for _ in range(steps)]
    with without_dropout(run.model):
        return torch.stack([run.step(batch) for batch in run.loader.over(run.loader.plan_of(batches))]).tolist()


@click.command()
@click.option("--model", "name", default="imdb", show_default=True)
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--profiles", type=click.Path(path_type=Path))
@click.option("--steps", default=60, show_default=True)
def main(name: str, data: Path | None, profiles: Path | None, steps: int) -> None:
    backend, module = backends.find(), workloads.get(name)
    ref = module.prepare(data, limit=None, on_progress=lambda _: None)
    workload = module.open_workload(ref)
    found = store.find_profile(backend.device(), workloads.wanted(name), profiles)
    if found is None:
        raise click.ClickException(f"no profile for {name}; make one: autotune search --model {name}")
    best = found[0].strategy
    print(f"{name}: {describe(workload.baseline)} against {describe(best)}", flush=True)
    base_losses, best_losses = (curve(strategy, workload, backend, steps) for strategy in (workload.baseline, best))
    print("step   baseline  best      apart")
    apart = [abs(b / a - 1) for a, b in zip(base_losses, best_losses, strict=True)]
    for step in sorted({*range(0, steps, -(-steps // ROWS)), steps - 1}):
        print(f"{step + 1:4}   {base_losses[step]:.5f}   {best_losses[step]:.5f}   {apart[step]:.3%}")
    print(f"at most {max(apart):.3%} apart, {np.median(apart):.3%} in the median")


if __name__ == "__main__":
    main()
