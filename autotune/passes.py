"""How long a user's own model takes in each precision and memory format, by a few steps on the CPU. The probe times
matrix products: convolutions and recurrences may be slower in what is fastest for those."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from autotune.step import Step
from autotune.strategy import MemoryFormat, Precision, Strategy
from autotune.workloads.base import Workload
from autotune.workloads.own_data import unchanged_numbers
from autotune.workloads.seen import micro_of, set_training, unchanged

ENOUGH_S, NUM_ROUNDS = 0.25, 3
"""So long the samples of a step take in the plain way; so many steps each way has in turns, and one before in which its
kernels are chosen."""
MAX_S = 10.0
"""So long all of it may take: a model that would take longer is not timed, and what is not done then is left."""
HOPELESS = 2.0
"""A way that takes so many times the least has no more steps."""

Way = tuple[Precision, MemoryFormat]
_FORMAT = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def seconds_of(workload: Workload, ways: Sequence[Way], sample_s: float) -> dict[Way, float]:
    """Of a step of a few samples that take ``sample_s`` each, the least in some rounds. Ways in which the model does
    not train, or not soon, are not there; none is where all would take too long."""
    count = min(workload.recipe.global_batch, max(2, round(ENOUGH_S / sample_s)))  # some models take no single one
    if count * sample_s * len(ways) * (1 + NUM_ROUNDS) > MAX_S:
        return {}
    micro, model = micro_of(workload, np.arange(count)), workload.sample_model()
    still = torch.optim.SGD(model.parameters(), lr=0.0)

    def step_s(way: Way) -> float:
        precision, memory_format = way
        strategy = Strategy(micro_batch=count, precision=precision, memory_format=memory_format)
        step = Step(model, still, workload.loss_for(model), strategy=strategy, device=torch.device("cpu"))
        model.to(memory_format=_FORMAT[memory_format])  # type: ignore[call-overload]
        start_s = time.perf_counter()
        step([micro])
        return time.perf_counter() - start_s

    def goes_on(number: int, way: Way) -> bool:
        """A first step that took several times as long as another's may have chosen its kernels, up to a point."""
        if number == 1:
            return first[way] <= max(ENOUGH_S, 2 * HOPELESS * min(first.values()))
        return number == 0 or (way in found and found[way] <= HOPELESS * min(found.values()))

    set_training(model)
    first, found = dict[Way, float](), dict[Way, float]()
    end_s = time.perf_counter() + MAX_S
    with unchanged_numbers(), unchanged(model, parameters=True):
        for number in range(1 + NUM_ROUNDS):
            for way in [way for way in (first if number else ways) if goes_on(number, way)]:
                if time.perf_counter() > end_s:
                    break
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
