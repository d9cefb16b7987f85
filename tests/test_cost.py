"""How timings become a cost, and a cost an epoch."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.cost import BY_TOKENS, Cost, Work, fit, total


def works(count: int, seed: int = 0) -> list[Work]:
    """Steps of 8 to 32 samples, 20 to 500 tokens wide."""
    generator = np.random.default_rng(seed)
    widths = generator.integers(20, 500, count)
    return [Work(1, 16 * float(width), 16 * float(width) ** 2) for width in widths]


@pytest.mark.parametrize("true", [Cost(0.3, 0, 0), Cost(0, 1e-4, 0), Cost(0, 1e-4, 3e-7), Cost(0.5, 1e-4, 0)])
def test_what_is_timed_is_explained(true: Cost) -> None:
    timed = works(12)
    found = fit(timed, [true.of(work) for work in timed])
    epoch = total(works(500, seed=1))
    assert found.of(epoch) == pytest.approx(true.of(epoch), rel=0.01)


def test_noise_and_a_disturbed_step_move_the_epoch_little() -> None:
    true = Cost(0.05, 1e-4, 3e-7)
    generator = np.random.default_rng(0)
    epoch = total(works(500, seed=1))
    errors = []
    for seed in range(20):
        timed = works(10, seed)
        seconds = [true.of(work) * np.exp(0.02 * generator.standard_normal()) for work in timed]
        seconds[3] *= 3
        errors.append(fit(timed, seconds).of(epoch) / true.of(epoch) - 1)
    assert abs(float(np.median(errors))) < 0.03
    assert max(map(abs, errors)) < 0.2


def test_few_timings_go_by_what_is_usual_and_that_is_by_tokens_alone() -> None:
    timed, usual = works(4), Cost(0, 1, 7e-4)
    assert fit(timed, [1.0] * 4) == BY_TOKENS
    assert fit(timed, [1.0] * 4, usual) == usual


def test_what_is_usual_is_one_of_the_explanations() -> None:
    """Noisy timings as few as a race's turns have: what is nearly true of them beats what would have to be fitted."""
    usual, true = Cost(0, 1, 7e-4), Cost(0, 1e-4, 7.5e-8)
    generator = np.random.default_rng(0)
    epoch = total(works(500, seed=1))
    errors: dict[Cost, list[float]] = {BY_TOKENS: [], usual: []}
    for seed in range(200):
        timed = works(6, seed)
        seconds = [true.of(work) * np.exp(0.08 * generator.standard_normal()) for work in timed]
        for cost, found in errors.items():
            fitted = fit(timed, seconds, cost)
            carried_s = sum(seconds) * fitted.of(epoch) / fitted.of(total(timed))
            found.append(carried_s / true.of(epoch) - 1)
    spread = {cost: float(np.std(found)) for cost, found in errors.items()}
    assert spread[usual] < 0.9 * spread[BY_TOKENS]
    assert abs(float(np.mean(errors[usual]))) < 0.02
    assert fit(works(12), [3.0 * true.of(work) for work in works(12)], BY_TOKENS).of(epoch) == pytest.approx(
        3.0 * true.of(epoch), rel=0.02
    ), "many timings need no telling"


def test_equal_batches_are_explained_by_anything() -> None:
    same = [Work(1, 512.0, 512.0**2)] * 8
    assert fit(same, [2.0] * 8).of(total(same)) == pytest.approx(16.0)
