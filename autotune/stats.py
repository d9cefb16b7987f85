"""Statistics of noisy timings. No torch, no devices."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autotune.measurement import Interval

MIN_RANKED = 8
"""Pairs from which on the interval rests on ranks: with fewer it would be nearly all of their range."""
MIN_CLUSTERS = 6
"""Clusters from which on ranks serve; fewer have too few orders for an interval of 95 %."""
_MAX_SHIFTS = 2000
Values = NDArray[np.float64]
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t for 1 to 10 degrees of freedom (Fisher and Yates 1938, table III); the last serves
for more."""


def paired_ratio(slow_s: Sequence[float], fast_s: Sequence[float], clusters: Sequence[int] | None = None) -> Interval:
    """How many times longer ``slow_s`` took than ``fast_s``, round by round, with a 95 % interval.

    Drift that hits both sides of a round cancels. From eight rounds on the ratio is the Hodges-Lehmann estimate of the
    rounds' log ratios and the interval is Wilcoxon's signed-rank one (Hollander and Wolfe 1999, section 3.2): a round
    that other work disturbed moves neither far. With fewer rounds, their geometric mean and Student's t. Not the
    bootstrap: where few rounds happen to agree it claims a certainty that nobody has. A single round has no interval:
    it is 0 to infinity.

    ``clusters`` names the rounds that may share an error, such as those of one pair of processes: the interval is then
    the signed-rank one for clustered data (Rosner, Glynn and Lee 2006, Biometrics 62), its quantile Student's. With
    fewer than six clusters it is Student's t of their geometric means.

    Raises ValueError where the rounds do not match, or there are none.
    """
    if len(slow_s) != len(fast_s) or not slow_s:
        raise ValueError(f"paired rounds must match and exist, got {len(slow_s)} and {len(fast_s)}")
    logs = np.log(np.asarray(slow_s) / np.asarray(fast_s))
    if clusters is not None and (len(logs) < MIN_RANKED or len(set(clusters)) < MIN_CLUSTERS):
        logs, clusters = np.array([logs[np.equal(clusters, cluster)].mean() for cluster in sorted(set(clusters))]), None
    if len(logs) == 1:
        return Interval(ratio=math.exp(logs[0]), low=0.0, high=math.inf)
    if clusters is not None:
        low, middle, high = _clustered_signed_rank(logs, clusters)
    elif len(logs) >= MIN_RANKED:
        low, middle, high = _signed_rank(logs)
    else:
        middle, margin = float(logs.mean()), _t_margin(logs)
        low, high = middle - margin, middle + margin
    return Interval(ratio=math.exp(middle), low=math.exp(low), high=math.exp(high))


def relative_margin(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval (Student's t), as a share of the mean; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return _t_margin(np.asarray(values)) / float(np.mean(values))


def ratio_of_means(slow_s: Sequence[float], fast_s: Sequence[float]) -> Interval:
    """Mean of ``slow_s`` over mean of ``fast_s`` with a 95 % interval: of the difference of their logarithms, each
    side's standard error by the delta method, Student's t with the smaller side's degrees of freedom (Scheffe 1970).

    For figures that were not taken in turns: drift between the two is not in the interval. Where a side has but one
    figure there is no interval: it is 0 to infinity.
    """
    slow, fast = np.asarray(slow_s), np.asarray(fast_s)
    ratio = float(slow.mean() / fast.mean())
    fewest = min(len(slow), len(fast))
    if fewest < 2:
        return Interval(ratio=ratio, low=0.0, high=math.inf)
    errors = [float(side.std(ddof=1) / side.mean()) / math.sqrt(len(side)) for side in (slow, fast)]
    factor = math.exp(_t_quantile(fewest - 1) * math.hypot(*errors))
    return Interval(ratio=ratio, low=ratio / factor, high=ratio * factor)


def _t_quantile(degrees: int) -> float:
    return _T_975[min(degrees, len(_T_975)) - 1]


def _t_margin(values: Values) -> float:
    return _t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))


def _signed_rank(values: Values) -> tuple[float, float, float]:
    """Lower end, estimate and upper end: the averages of all pairs in order, and as many left out at either side as the
    signed-rank statistic falls below with a probability of 2.5 %."""
    averages = _walsh_averages(values)
    rank = _signed_rank_quantile(len(values))
    return float(averages[rank - 1]), float(np.median(averages)), float(averages[-rank])


def _clustered_signed_rank(values: Values, clusters: Sequence[int]) -> tuple[float, float, float]:
    """The shifts that the clustered test does not reject, and the middle one. Where many values are equal, as a coarse
    clock's, it may reject all: then the values' range.

    The sum of the signed ranks over the root of the summed squares of its clusters' parts is a mean of k cluster sums
    over its own spread about zero: of the size z where Student's t of k - 1 degrees is z sqrt((k - 1) / (k - z^2)).
    """
    averages = _walsh_averages(values)
    shifts = np.quantile(averages, np.linspace(0, 1, min(len(averages), _MAX_SHIFTS)))
    distances = values - shifts[:, None]
    ranks = np.abs(distances).argsort(1).argsort(1) + 1
    _, cluster_of = np.unique(clusters, return_inverse=True)
    count = int(cluster_of.max()) + 1
    sums = (np.sign(distances) * ranks) @ (cluster_of[:, None] == np.arange(count))
    quantile = _t_quantile(count - 1)
    limit = quantile * math.sqrt(count / (count - 1 + quantile**2))
    kept = shifts[np.abs(sums.sum(1)) <= limit * np.sqrt((sums**2).sum(1))]
    ends = kept if kept.size else values
    return float(ends.min()), float(np.median(averages)), float(ends.max())


def _walsh_averages(values: Values) -> Values:
    """The averages of all pairs, each value with itself among them, in order."""
    rows, columns = np.triu_indices(len(values))
    return np.sort((values[rows] + values[columns]) / 2)


def _signed_rank_quantile(count: int) -> int:
    """The largest k with P(W < k) <= 0.025, W the sum of the positive ranks of ``count`` values symmetric about 0.

    Exact: every subset of the ranks is equally likely, and the number of those with each sum follows rank by rank.
    """
    chances = np.zeros(count * (count + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, count + 1):
        chances[rank:] += chances[:-rank].copy()
        chances /= 2.0
    return int(np.searchsorted(np.cumsum(chances), 0.025, side="right"))
