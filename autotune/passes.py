"""How long a user's own model takes in each precision and memory format, by a few steps on the CPU. The probe times
matrix products: convolutions and recurrences may be slower in what is fastest for those."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from autotune.apply import Run
from autotune.step import Step
from autotune.strategy import MemoryFormat, Precision, Strategy
from autotune.workloads.seen import micro_of

ENOUGH_S, NUM_ROUNDS = 0.25, 3
"""So long the samples of a step take in the plain way; so many steps each way has in turns, and one before in which its
kernels are chosen."""
MAX_S = 10.0
"""So long all of it may take: a model that would take longer is not timed, and what is not done then is left."""
HOPELESS = 2.0
"""A way that takes so many times the least has no more steps."""

Way = tuple[Precision, MemoryFormat]
_FORMAT = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def num_samples(sample_s: float, num_ways: int, global_batch: int) -> int:
    """That a step should have where one takes ``sample_s`` in the plain way; 0 where all would take too long."""
    count = min(global_batch, max(2, round(ENOUGH_S / sample_s)))  # some models take no single one
    return count if count * sample_s * num_ways * (1 + NUM_ROUNDS) <= MAX_S else 0


def seconds_of(
    run: Run, ways: Sequence[Way], count: int, *, on_step: Callable[[], None] = lambda: None
) -> dict[Way, float]:
    """Of a step of ``count`` samples, the least in some rounds. Ways in which the model does not train, or not soon,
    are not there. The run, which must be on the CPU, is no use afterwards."""
    micro, model = micro_of(run.workload, np.arange(count)), run.model
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = run.workload.loss_for(model)

    def step_s(way: Way) -> float:
        precision, memory_format = way
        strategy = Strategy(micro_batch=count, precision=precision, memory_format=memory_format)
        step = Step(model, still, loss, strategy=strategy, device=torch.device("cpu"))
        model.to(memory_format=_FORMAT[memory_format])  # type: ignore[call-overload]
        start_s = time.perf_counter()
        step([micro])
        return time.perf_counter() - start_s

    def goes_on(number: int, way: Way) -> bool:
        """A first step that took several times as long as another's may have chosen its kernels, up to a point."""
        if number == 1:
            return first[way] <= max(ENOUGH_S, 2 * HOPELESS * min(first.values()))
        return number == 0 or (way in found and found[way] <= HOPELESS * min(found.values()))

    first, found = dict[Way, float](), dict[Way, float]()
    end_s = time.perf_counter() + MAX_S
    for number in range(1 + NUM_ROUNDS):
        for way in [way for way in (first if number else ways) if goes_on(number, way)]:
            if time.perf_counter() > end_s:
                break
            on_step()
            try:
                taken_s = step_s(way)
            except Exception:  # noqa: BLE001 - whatever the user's code raises
                found.pop(way, None)
                continue
            if number:
                found[way] = min(found.get(way, math.inf), taken_s)
            else:
                first[way] = taken_s
    return found
