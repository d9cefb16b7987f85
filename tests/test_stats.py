import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.stats import _signed_rank_quantile, paired_ratio, ratio_of_means, relative_margin


def test_a_paired_ratio_cancels_drift_that_hits_both_sides() -> None:
    drift = np.array([1.0, 1.4, 0.8, 1.1])
    interval = paired_ratio((3 * drift).tolist(), drift.tolist())
    assert (interval.low, interval.ratio, interval.high) == pytest.approx((3, 3, 3))


def test_unpaired_means_feel_the_drift() -> None:
    interval = ratio_of_means([3.0, 4.2, 2.4], [1.0, 1.4, 0.8])
    assert interval.low < 2.6 < interval.ratio < 3.4 < interval.high


def test_two_figures_that_happen_to_agree_do_not_make_it_sure() -> None:
    interval = ratio_of_means([4.0, 4.1], [1.0, 1.02, 0.98, 1.0])
    assert interval.low < 3.6 < interval.ratio < 4.5 < interval.high
    generator = np.random.default_rng(0)
    found = [ratio_of_means(*generator.normal(1, 0.05, (2, 3)).tolist()) for _ in range(400)]
    assert np.mean([one.low <= 1 <= one.high for one in found]) > 0.93


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


def test_a_single_pair_of_processes_claims_nothing() -> None:
    interval = paired_ratio([2.0] * 12, [1.0] * 12, [0] * 12)
    assert (interval.low, interval.ratio, interval.high) == pytest.approx((0, 2, math.inf))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_pairs_of_processes_have_one_inside_19_times_in_20(count: int) -> None:
    """Four rounds each; what the processes differ by is more than what the rounds do."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        logs = np.repeat(generator.normal(0, 0.02, count), 4) + generator.normal(0, 0.01, 4 * count)
        interval = paired_ratio(np.exp(logs).tolist(), [1.0] * (4 * count), np.repeat(np.arange(count), 4).tolist())
        inside += interval.low <= 1 <= interval.high
    assert 365 <= inside <= 394


def test_rounds_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="paired rounds"):
        paired_ratio([1.0], [])


def test_from_eight_rounds_on_a_disturbed_one_moves_nothing_far() -> None:
    slow = [1.10, 1.11, 1.09, 1.10, 1.12, 1.08, 1.10, 1.11, 1.10, 1.09] * 2
    clean = paired_ratio(slow, [1.0] * 20)
    disturbed = paired_ratio([*slow[:-1], 9.0], [1.0] * 20)
    assert clean.ratio == pytest.approx(1.10, abs=0.005)
    assert disturbed.ratio == pytest.approx(clean.ratio, abs=0.01)
    assert 1.05 < disturbed.low < disturbed.high < 1.25


@pytest.mark.parametrize(("count", "left_out"), [(8, 3), (10, 8), (12, 13), (15, 25), (20, 52), (50, 434)])
def test_the_signed_rank_quantile_is_the_tables(count: int, left_out: int) -> None:
    """Hollander and Wolfe 1999, table A.4, two-sided 5 %."""
    assert _signed_rank_quantile(count) == left_out + 1


def test_eight_rounds_interval_ends_at_the_fourth_averages() -> None:
    """P(W <= 3) = 5/256 for eight values: three averages of the 36 lie outside at either end."""
    logs = np.array([0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28])
    averages = sorted((logs[i] + logs[j]) / 2 for i in range(8) for j in range(i, 8))
    found = paired_ratio(list(np.exp(logs)), [1.0] * 8)
    assert (found.low, found.high) == pytest.approx((math.exp(averages[3]), math.exp(averages[-4])))


@pytest.mark.parametrize("count", [4, 9, 20])
def test_the_interval_of_rivals_that_are_the_same_holds_one(count: int) -> None:
    """Heavy-tailed noise on both sides, as other work on the machine makes it."""
    generator = np.random.default_rng(0)

    def seconds() -> list[float]:
        bursts = generator.random(count) < 0.2
        return list(np.exp(0.03 * generator.standard_normal(count)) * np.where(bursts, 2.0, 1.0))

    holds = 0
    for _ in range(400):
        found = paired_ratio(seconds(), seconds())
        holds += found.low <= 1 <= found.high
    assert holds >= 0.935 * 400


@pytest.mark.parametrize(("between", "lives", "longest"), [(0.02, 12, 8), (0.0, 12, 8), (0.05, 8, 6), (0.02, 5, 6)])
def test_rounds_that_share_their_processes_are_not_taken_for_independent(
    between: float, lives: int, longest: int
) -> None:
    generator = np.random.default_rng(0)
    holds, holds_alone = 0, 0
    for _ in range(300):
        sizes = generator.integers(1, longest + 1, lives)
        clusters = np.repeat(np.arange(lives), sizes)
        logs = np.repeat(generator.normal(0, between, lives), sizes) + 0.02 * generator.standard_t(3, sizes.sum())
        found = paired_ratio(list(np.exp(logs)), [1.0] * len(logs), clusters.tolist())
        alone = paired_ratio(list(np.exp(logs)), [1.0] * len(logs))
        holds += found.low <= 1 <= found.high
        holds_alone += alone.low <= 1 <= alone.high
    assert 0.92 * 300 <= holds <= 0.99 * 300
    assert holds_alone < 0.85 * 300 or between < 0.05, "the test must be able to fail"


def test_the_margin_of_one_value_is_unknown_and_shrinks_with_their_number() -> None:
    assert math.isinf(relative_margin([1.0]))
    assert relative_margin([1.0, 1.1, 0.9] * 5) < relative_margin([1.0, 1.1, 0.9])


def test_rounds_of_two_values_have_an_interval() -> None:
    clusters = [number // 2 for number in range(48)]
    found = paired_ratio([2.0, 2.1] * 24, [1.0] * 48, clusters)
    assert (found.low, found.high) == pytest.approx((2.0, 2.1))
    assert found.low < found.ratio < found.high
