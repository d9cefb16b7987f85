import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.stats import paired_ratio, ratio_of_means


def test_a_paired_ratio_cancels_drift_that_hits_both_sides() -> None:
    drift = np.array([1.0, 1.4, 0.8, 1.1])
    interval = paired_ratio((3 * drift).tolist(), drift.tolist())
    assert (interval.low, interval.ratio, interval.high) == pytest.approx((3, 3, 3))


def test_unpaired_means_feel_the_drift() -> None:
    interval = ratio_of_means([3.0, 4.2, 2.4], [1.0, 1.4, 0.8])
    assert interval.low < 2.6 < interval.ratio < 3.4 < interval.high


@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=15), st.integers(0, 9))
def test_the_interval_holds_the_ratio(times: list[float], seed: int) -> None:
    others = np.random.default_rng(seed).uniform(0.5, 2, len(times)).tolist()
    interval = paired_ratio(times, others)
    assert interval.low <= interval.ratio * (1 + 1e-9)
    assert interval.ratio <= interval.high * (1 + 1e-9)


@pytest.mark.parametrize("rounds", [2, 3, 5, 12])
def test_two_settings_that_do_not_differ_have_one_inside_19_times_in_20(rounds: int) -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        a, b = generator.normal(1, 0.05, (2, rounds))
        interval = paired_ratio(a.tolist(), b.tolist())
        inside += interval.low <= 1 <= interval.high
    assert 365 <= inside <= 394


def test_a_single_round_claims_nothing() -> None:
    interval = paired_ratio([2.0], [1.0])
    assert (interval.low, interval.ratio, interval.high) == (0, 2, float("inf"))


def test_rounds_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="paired rounds"):
        paired_ratio([1.0], [])
