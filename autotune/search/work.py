"""What a setting has to do beside others, as far as that is known without a trial. Only ratios mean something.

The surrogate divides by it: a trial tells how far a setting is from what its work makes it take. What a number of
threads is worth and how fast attention kernels are is the probe's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from autotune.data.batching import Indices, plan_epoch
from autotune.strategy import Checkpoint, Padding, Strategy

NUM_PLANNED = 100
"""Batches that say how many tokens a setting computes: twice as many as buckets are drawn from."""
FORWARD_SHARE = 1 / 3
"""Of a step: the backward pass has twice the forward's products (Kaplan et al. 2020, section 2.1)."""
RECOMPUTED: dict[Checkpoint, float] = {
    "none": 0.0,
    "memory_budget": 0.0,
    "selective": 0.5,
    "every_4th": 1 / 4,
    "every_2nd": 1 / 2,
    "every_block": 1.0,
}
"""Share of the forward pass that is done twice; of what ``selective`` does not keep, a guess."""

ATTENTION_POWER = 0.3
"""A step is expected to take longer by its attention kernel's slowdown to this power: attention is a part of the step
only (docs/LOG.md 2026-11-26)."""


def tokens_of(lengths: Indices, global_batch: int, max_tokens: int) -> Callable[[Padding, int], float]:
    """Gives the tokens that a sample takes on average under a padding and a micro batch, the padding's own included."""
    some = np.random.default_rng(0).permutation(lengths)[: NUM_PLANNED * global_batch]

    def tokens(padding: Padding, micro_batch: int) -> float:
        plan = plan_epoch(
            some, global_batch=global_batch, micro_batch=micro_batch, padding=padding, max_tokens=max_tokens, seed=0
        )
        return max(1, sum(batch.padded_tokens for batch in plan)) / len(some)

    return tokens


def loaded(computed: float, read: float, num_workers: int, busy: float) -> float:
    """What a step takes that computes and reads for so long, as long as nothing else is done meanwhile. Loader
    processes read beside it, each a batch; of the cores that it computes with they take ``busy`` of that time."""
    return computed + read if num_workers == 0 else max(computed + busy * read, read / num_workers)


def work_of(strategy: Strategy, tokens: float, *, threads_speed: float, attention_slowdown: float) -> float:
    """Of a sample that takes so many tokens, on threads that are so many times as fast as torch's own choice, by an
    attention kernel that takes so many times as long as the fastest."""
    recomputed = 1 + FORWARD_SHARE * RECOMPUTED[strategy.checkpoint]
    return tokens * recomputed * math.pow(attention_slowdown, ATTENTION_POWER) / threads_speed
