"""What each knob of the best setting brings: how much longer a run takes with that knob alone taken back.

Measured where there is time, the best and all that differ from it by one knob in turns; else estimated by the
surrogate from all trials and from what it expects of knobs beforehand, which costs nothing: where few trials tell of a
knob its interval is wide, and the estimate leans towards what the knob's work makes of it. What is measured to bring
nothing is set back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from autotune.measurement import Interval, Trial
from autotune.search.finals import ratio
from autotune.search.space import Space
from autotune.search.surrogate import Surrogate
from autotune.search.turns import CACHED_SHARE, MIN_ROUNDS, Race, is_alone
from autotune.strategy import Strategy

_START_S, _WARM_UP_STEPS = 1.5, 3
"""What each setting's process takes before it is timed, and its first steps."""
_Z_975 = 1.96
NOTHING = 0.02
"""What brings less, and perhaps nothing, is set back."""


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """One knob's part in the speed-up."""

    knob: str
    value: Any
    plain: Any
    """The baseline's value."""
    ratio: Interval | None
    """How many times longer it takes with the plain value, all else as in the best. None where it does not run so."""
    num_rounds: int = 0
    """Rounds in turns with the best that the ratio is from; at none it is estimated, and of the planned run."""
    reason: str = ""
    """Why it does not run with the plain value."""

    @property
    def brings_nothing(self) -> bool:
        """Whether it was measured to be as fast with the plain value."""
        found = self.ratio
        return self.num_rounds > 0 and found is not None and found.low <= 1.0 and found.ratio <= 1 + NOTHING


def taken_back(best: Strategy, baseline: Strategy, space: Space) -> dict[str, Strategy]:
    """The best without each of its knobs that can be set back alone. Accumulation belongs to the micro batch."""
    found = {}
    for knob in best.changed(baseline):
        without = set_back(best, baseline, [knob])
        if knob != "accumulation" and space.refusal(without) is None:
            found[knob] = without
    return found


def set_back(best: Strategy, baseline: Strategy, knobs: Iterable[str]) -> Strategy:
    """The best with the baseline's values of some knobs."""
    plain = {knob: getattr(baseline, knob) for knob in knobs}
    if "micro_batch" in plain:
        plain["accumulation"] = baseline.accumulation
    return msgspec.structs.replace(best, **plain)


def estimated(surrogate: Surrogate, best: Strategy, baseline: Strategy, space: Space) -> tuple[Share, ...]:
    """Every knob's share by the surrogate, the largest first."""
    found = []
    for knob, without in taken_back(best, baseline, space).items():
        mean, deviation = surrogate.log_ratio(without, best)
        low, middle, high = (math.exp(mean + z * deviation) for z in (-_Z_975, 0.0, _Z_975))
        found.append(_share(knob, best, baseline, Interval(ratio=middle, low=low, high=high)))
    return largest_first(found)


def measured(
    best: Trial,
    without: Mapping[str, Strategy],
    baseline: Strategy,
    *,
    race_of: Callable[[list[Trial]], Race],
    enough_s: float,
    on_round: Callable[[int, int], None] = lambda done, num_knobs: None,
) -> list[Share]:
    """The shares of some knobs by a race of the best with what it is without each."""
    rivals = {
        knob: Trial(number=-place, strategy=strategy, outcome="ok")
        for place, (knob, strategy) in enumerate(without.items(), 1)
    }
    on_round(0, len(rivals))
    race = race_of([best, *rivals.values()])
    race.run(enough_s=enough_s, on_round=lambda done: on_round(done, len(rivals)))
    finals = {final.trial.number: final for final in race.finals()}
    of_best, shares = finals.get(best.number), []
    for knob, rival in rivals.items() if of_best else ():
        assert of_best is not None
        final, end = finals.get(rival.number), race.failures.get(rival.number)
        if end is not None and end.outcome == "oom" and len(rivals) > 1:
            continue  # its neighbours may have taken the memory
        shares.append(
            _share(
                knob,
                best.strategy,
                baseline,
                ratio(final, of_best) if final else None,
                num_rounds=len(of_best.epoch_s),
                reason=f"{end.outcome}: {end.reason}" if end else "",
            )
        )
    return shares


def groups(without: Mapping[str, Strategy], peaks: Sequence[int], room_bytes: int) -> list[dict[str, Strategy]]:
    """As few as run side by side in so much memory; what does not fit even alone is left out."""
    found: list[dict[str, Strategy]] = [{}]
    left_bytes = room_bytes
    for (knob, strategy), peak_bytes in zip(without.items(), peaks, strict=True):
        if peak_bytes > room_bytes:
            continue
        if peak_bytes > left_bytes:
            found.append({})
            left_bytes = room_bytes
        found[-1][knob] = strategy
        left_bytes -= peak_bytes
    return [group for group in found if group]


def needed_s(step_s: float, warm_up_s: float, shares: Iterable[Share], backend: str) -> float:
    """Seconds that measuring takes, where the best's step takes ``step_s`` after a warm-up, which each of the others
    pays anew and processes of later turns find in the cache, and each knob brings so much."""
    steps_s = [step_s, *(step_s * share.ratio.ratio for share in shares if share.ratio)]
    num_rounds = MIN_ROUNDS + 1
    num_openings = num_rounds if is_alone(backend, steps_s) else 1
    opening_s = len(steps_s) * _START_S + _WARM_UP_STEPS * sum(steps_s)
    compiling_s = (len(steps_s) - 1 + (num_openings - 1) * len(steps_s) * CACHED_SHARE) * warm_up_s
    return num_openings * opening_s + compiling_s + num_rounds * sum(steps_s)


def _share(knob: str, best: Strategy, baseline: Strategy, found: Interval | None, **details: Any) -> Share:
    return Share(knob=knob, value=getattr(best, knob), plain=getattr(baseline, knob), ratio=found, **details)


def largest_first(shares: Iterable[Share]) -> tuple[Share, ...]:
    """Those first without which it does not run, then those that bring most."""
    return tuple(sorted(shares, key=lambda share: -(share.ratio.ratio if share.ratio else math.inf)))
