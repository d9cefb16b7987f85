"""Whether a strategy trains as the plain baseline does: the losses of a few steps on the same samples from the same
weights, without dropout (which no two kernels draw alike), at the recipe's full learning rate.

The samples are short ones, so that the fp32 reference costs seconds; they come twice, so that gradients that are wrong
or missing show in the second pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autotune.strategy import Precision, Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from autotune.apply import Run
    from autotune.data.batching import MicroBatch

NUM_BATCHES, NUM_PASSES = 4, 2
NUM_STEPS = NUM_BATCHES * NUM_PASSES
OWN_RATE = 0.1
"""Of the rate of an optimizer of the user's own, whose warm-up is not known: these are its first steps."""
_MAX_SKIPPED = 20

NUDGE = 1e-6
"""Share of a weight that some roundings of fp32 add up to, as in sums of hundreds of numbers in another order."""
DOUBTFUL = 10
"""So many times the tolerance may be rounding that a training makes much of."""
TOLERANCE: dict[Precision, float] = {
    "fp32": 1e-4,
    "tf32": 2e-3,
    "fp16": 2e-3,
    "bf16": 1.6e-2,
    "bf16_weights": math.inf,
    "fp8": math.inf,
}
"""How far a step's loss may be from the reference's (``deviation``). bf16's is what torch.testing.assert_close allows
a single operation's result (rtol, torch 2.13); fp16 and tf32 keep three bits more and get an eighth of it; fp32's is
for other orders of summing. Settings that train alike stay far below: on imdb 3.5e-3 in bf16, 8e-5 in fp16, 2e-7 in
fp32 (2-core CPU, docs/LOG.md 2026-11-21)."""


def losses(
    run: Run,
    num_steps: int = NUM_STEPS,
    num_samples: int | None = None,
    on_step: Callable[[], None] = lambda: None,
    nudge: float = 0.0,
) -> tuple[float, ...]:
    """Trains a fresh run for some steps; the loss of each. Its schedule is taken from it: the rate stays at its peak,
    or at a tenth of the optimizer's own where there is no schedule.

    ``num_samples`` of each batch are taken, or all. ``on_step`` is called before each step. Every weight is changed by
    ``nudge`` of it on average first, either way.
    """
    import numpy as np
    import torch

    from autotune.workloads.seen import without_dropout

    lengths = run.loader.lengths
    global_batch = run.strategy.global_batch
    wanted = NUM_BATCHES * global_batch
    short = np.argsort(lengths, kind="stable")[: max(wanted, len(lengths) // 4)]
    samples = np.resize(np.random.default_rng(0).permutation(short), wanted)
    batches = [batch[:num_samples] for batch in np.split(samples, NUM_BATCHES)]
    if run.step.scheduler is not None:
        for group, rate in zip(run.optimizer.param_groups, run.step.scheduler.base_lrs, strict=True):
            group["lr"] = group.get("max_lr", rate)
        run.step.scheduler = None
    else:
        for group in run.optimizer.param_groups:
            group["lr"] = group["lr"] * OWN_RATE
    if nudge:
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in run.model.parameters():
                weight.mul_(1 + nudge * torch.randn(weight.shape, generator=draw).to(weight.device))
    plan = (run.loader.plan_of(batches) * NUM_PASSES)[:num_steps]
    steps: list[Tensor] = []
    with without_dropout(run.model):
        for batch in run.loader.over(plan):
            on_step()
            steps.append(_unskipped(run, batch))
    if run.step.graphs is not None:
        run.step.graphs.forget()  # they have no dropout
    return tuple(torch.stack(steps).float().tolist())


def deviation(reference: Sequence[float], found: Sequence[float]) -> float:
    """The largest distance of a step's loss from the reference's, as a share of the reference's root mean square;
    infinite where one is no number.

    A share of the step's own loss would say nothing of a model that soon knows these batches by heart: a DistilBERT
    whose loss falls from 0.70 to 0.008 in eight steps is 7 % away at the last in bf16, and 9 % in fp32 where the
    weights are rounded to bf16 once before the first (docs/LOG.md 2026-11-22).
    """
    if len(reference) != len(found) or not all(map(math.isfinite, found)):
        return math.inf
    scale = math.sqrt(sum(loss**2 for loss in reference) / len(reference))
    return max(abs(b - a) for a, b in zip(reference, found, strict=True)) / max(scale, 1e-12)


def is_doubtful(strategy: Strategy, reference: Sequence[float], found: Sequence[float]) -> bool:
    """Whether a setting is so little off that it may be by roundings, as some trainings make much of them (batch
    normalisation and a high rate): one in fp32, where they are all that may differ."""
    tolerance = TOLERANCE["fp32"]
    is_plain = strategy.precision == "fp32" and not strategy.is_approximate
    return is_plain and tolerance < deviation(reference, found) < DOUBTFUL * tolerance


def difference(
    strategy: Strategy, reference: Sequence[float], found: Sequence[float], rounding: float = 0.0
) -> str | None:
    """Why a strategy does not train as the reference does; None where it does. One that the user has allowed to differ
    has only to train. ``rounding`` is how far the reference's own losses go when its weights are nudged: a doubtful
    setting may be as far off."""
    allowed = math.inf if strategy.is_approximate else TOLERANCE[strategy.precision]
    distance = deviation(reference, found)
    if is_doubtful(strategy, reference, found) and math.isfinite(rounding):
        allowed = max(allowed, rounding)
    if distance <= allowed and math.isfinite(distance):
        return None
    return (
        f"its losses leave the fp32 baseline's by {100 * distance:.2g}% on the same batches, {100 * allowed:.2g}% is "
        f"allowed in {strategy.precision}"
    )


def _unskipped(run: Run, batch: list[MicroBatch]) -> Tensor:
    """The step's loss; a step that the fp16 loss scaler skipped, as it does until its scale fits, is taken again."""
    for _ in range(_MAX_SKIPPED):
        before = run.step.loss_scale
        loss = run.step(batch)
        if before is None or (run.step.loss_scale or 0.0) >= before:
            break
    return loss
