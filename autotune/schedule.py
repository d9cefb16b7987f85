"""The learning rate over a run: a linear warm-up to the recipe's rate, then what the recipe names."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from autotune.workloads.base import Recipe, Schedule

NUM_RESTARTS = 3
"""Times that ``restarts`` goes back to the full rate; its cycles are equally long (Loshchilov and Hutter 2017)."""


def schedule(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> LRScheduler:
    """The recipe's schedule for so many steps; beyond them the rate stays where it ends."""
    if recipe.schedule == "onecycle":
        return _OneCycle(optimizer, max_lr=recipe.learning_rate, total_steps=max(2, total_steps))
    least = recipe.least_rate / recipe.learning_rate
    warmup, shape = warmup_steps(recipe, total_steps), _SHAPES[recipe.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return least + (1 - least) * shape(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    return LambdaLR(optimizer, factor)


def warmup_steps(recipe: Recipe, total_steps: int) -> int:
    """The recipe's warm-up; where the whole run is shorter than twice that, its first tenth."""
    return recipe.warmup_steps if total_steps >= 2 * recipe.warmup_steps else max(1, total_steps // 10)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _restarts(progress: float) -> float:
    cycle = progress * (NUM_RESTARTS + 1)
    return _cosine(cycle - math.floor(cycle)) if progress < 1 else 0.0


_SHAPES: dict[Schedule, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": lambda progress: 1 - progress,
    "restarts": _restarts,
    "constant": lambda _: 1.0,
}
"""The rate as a share of the recipe's, by the share of the steps after the warm-up that are done."""


class _OneCycle(OneCycleLR):
    """torch's, which counts its own warm-up, and refuses steps beyond its last (Smith and Topin 2018)."""

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch + 1 < self.total_steps:
            super().step(epoch)
