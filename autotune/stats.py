"""Statistics of noisy timings. No torch, no devices."""

import math
from collections.abc import Sequence

import numpy as np

from autotune.measurement import Interval

_RESAMPLES = 4000
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t for 1 to 10 degrees of freedom (Fisher and Yates 1938, table III); the last serves
for more."""


def paired_ratio(slow_s: Sequence[float], fast_s: Sequence[float]) -> Interval:
    """How many times longer ``slow_s`` took than ``fast_s``, round by round, with a 95 % interval.

    The ratio is the geometric mean over rounds; the interval is Student's t over the rounds' logarithms (Student 1908),
    so that drift that hits both sides of a round cancels. Not the bootstrap: races have three to six rounds, and where
    few happen to agree it claims a certainty that nobody has. A single round has no interval: it is 0 to infinity.
    """
    if len(slow_s) != len(fast_s) or not slow_s:
        raise ValueError(f"paired rounds must match and exist, got {len(slow_s)} and {len(fast_s)}")
    logs = np.log(np.asarray(slow_s) / np.asarray(fast_s))
    ratio = float(np.exp(logs.mean()))
    if len(logs) == 1:
        return Interval(ratio=ratio, low=0.0, high=math.inf)
    quantile = _T_975[min(len(logs) - 1, len(_T_975)) - 1]
    factor = math.exp(quantile * float(logs.std(ddof=1)) / math.sqrt(len(logs)))
    return Interval(ratio=ratio, low=ratio / factor, high=ratio * factor)


def ratio_of_means(slow_s: Sequence[float], fast_s: Sequence[float], seed: int = 0) -> Interval:
    """Mean of ``slow_s`` over mean of ``fast_s`` with a 95 % percentile bootstrap interval, each side on its own.

    For figures that were not taken in turns: drift between the two is not in the interval.
    """
    generator = np.random.default_rng(seed)
    slow, fast = np.asarray(slow_s), np.asarray(fast_s)
    resampled = generator.choice(slow, (_RESAMPLES, len(slow))).mean(1) / generator.choice(
        fast, (_RESAMPLES, len(fast))
    ).mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(ratio=float(slow.mean() / fast.mean()), low=float(low), high=float(high))
