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
from autotune.workloads.seen import micro_of, set_training, unchanged

ENOUGH_S, NUM_ROUNDS = 0.25, 3
"""So long the samples of a step take in the plain way; so many steps each way has in turns, and one before in which its
kernels are chosen."""
HOPELESS = 2.0
"""A way that takes so many times the least has no more steps."""

Way = tuple[Precision, MemoryFormat]
_FORMAT = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def seconds_of(workload: Workload, ways: Sequence[Way], sample_s: float) -> dict[Way, float]:
    """Of a step of a few samples that take ``sample_s`` each, the least in some rounds. Ways in which the model does
    not train are not there."""
    count = min(workload.recipe.global_batch, max(2, round(ENOUGH_S / sample_s)))  # some models take no single one
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

    set_training(model)
    found: dict[Way, float] = dict.fromkeys(ways, math.inf)
    with torch.random.fork_rng(devices=[]), unchanged(model, parameters=True):
        for number in range(1 + NUM_ROUNDS):
            least_s = min(found.values(), default=math.inf)
            for way in [way for way, taken_s in found.items() if taken_s < HOPELESS * least_s or number < 2]:
                try:
                    taken_s = step_s(way)
                except Exception:  # noqa: BLE001 - whatever the user's code raises
                    del found[way]
                else:
                    found[way] = min(found[way], taken_s) if number else math.inf
    return found
