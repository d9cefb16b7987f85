"""What each knob of the best setting brings: how much longer a run would take with that knob alone taken back.

Estimated by the surrogate from all trials and from what it expects of knobs beforehand, so that it costs nothing;
where few trials tell of a knob its interval is wide, and the estimate leans towards 1.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from autotune.measurement import Interval
from autotune.search.space import Space
from autotune.search.surrogate import Surrogate
from autotune.strategy import Strategy

_Z_975 = 1.96


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """One knob's part in the speed-up."""

    knob: str
    value: Any
    plain: Any
    """The baseline's value."""
    ratio: Interval
    """How many times longer the planned run is expected to take with the plain value, all else as in the best."""


def shares(surrogate: Surrogate, best: Strategy, baseline: Strategy, space: Space) -> tuple[Share, ...]:
    """Of every knob that the best sets otherwise, the largest first. Accumulation belongs to the micro batch; a knob
    that cannot be set back alone has none."""
    found = []
    for knob, (value, plain) in best.changed(baseline).items():
        if knob == "accumulation":
            continue
        taken_back = {knob: plain, "accumulation": baseline.accumulation} if knob == "micro_batch" else {knob: plain}
        without = msgspec.structs.replace(best, **taken_back)
        if space.refusal(without) is not None:
            continue
        mean, deviation = surrogate.log_ratio(without, best)
        low, middle, high = (math.exp(mean + z * deviation) for z in (-_Z_975, 0.0, _Z_975))
        found.append(Share(knob=knob, value=value, plain=plain, ratio=Interval(ratio=middle, low=low, high=high)))
    return tuple(sorted(found, key=lambda share: -share.ratio.ratio))
