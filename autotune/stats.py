"""Statistics of noisy timings. No torch, no devices."""

from collections.abc import Sequence

import numpy as np

from autotune.measurement import Interval

_RESAMPLES = 4000


def paired_ratio(slow_s: Sequence[float], fast_s: Sequence[float], seed: int = 0) -> Interval:
    """How many times longer ``slow_s`` took than ``fast_s``, round by round, with a 95 % interval.

    The ratio is the geometric mean over rounds; the interval is the percentile bootstrap over rounds (Efron 1979),
    so that drift that hits both sides of a round cancels. With one round the interval is the ratio itself.
    """
    if len(slow_s) != len(fast_s) or not slow_s:
        raise ValueError(f"paired rounds must match and exist, got {len(slow_s)} and {len(fast_s)}")
    logs = np.log(np.asarray(slow_s) / np.asarray(fast_s))
    resampled = np.random.default_rng(seed).choice(logs, size=(_RESAMPLES, len(logs))).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(ratio=float(np.exp(logs.mean())), low=float(np.exp(low)), high=float(np.exp(high)))


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
