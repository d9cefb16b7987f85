"""What untried settings are expected to take."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import optuna
import pytest

from autotune.search.explain import estimated
from autotune.search.sampling import Sampler
from autotune.search.space import Space
from autotune.search.surrogate import Known, Prior, Surrogate, expected_gain
from autotune.strategy import Strategy

VALUES: dict[str, tuple[Any, ...]] = {
    "micro_batch": (1, 2, 4, 8, 16, 32),
    "attention": ("eager", "sdpa", "sdpa_math", "sdpa_flash"),
    "precision": ("fp32", "bf16", "fp16"),
    "padding": ("max", "longest", "buckets", "packed"),
    "allocator": ("default", "retain"),
    "checkpoint": ("none", "selective", "every_2nd", "every_block"),
    "workers": (0, 1, 2),
    "compile": ("none",),
    "compile_scope": ("model",),
    "prefetch": (2,),
    "threads": (0,),
}
SPACE = Space(
    global_batch=32,
    values=VALUES,
    left_out={},
    pairs=frozenset(itertools.product(VALUES["attention"], VALUES["precision"])),
)
EFFECTS: dict[str, tuple[float, ...]] = {
    "micro_batch": (2.0, 1.5, 1.1, 0.9, 0.95, 1.0),
    "attention": (1.0, 0.93, 1.3, 0.9),
    "precision": (1.0, 0.5, 0.55),
    "padding": (1.0, 0.8, 0.55, 0.5),
    "allocator": (1.0, 0.75),
    "checkpoint": (1.0, 1.1, 1.2, 1.35),
    "workers": (1.0, 1.04, 1.08),
    **dict.fromkeys(("compile", "compile_scope", "prefetch", "threads"), (1.0,)),
}


def seconds(strategy: Strategy) -> float:
    """A device on which every knob does its part."""
    found = 1000.0
    for knob, values in VALUES.items():
        found *= EFFECTS[knob][values.index(getattr(strategy, knob))]
    return found


BASELINE = Strategy(micro_batch=32)
BEST = SPACE.strategy({knob: values[EFFECTS[knob].index(min(EFFECTS[knob]))] for knob, values in VALUES.items()})


def test_what_knobs_do_apart_predicts_what_they_do_together() -> None:
    apart = [BASELINE, *SPACE.neighbours(BASELINE)]
    surrogate = Surrogate(VALUES, [Known(strategy, seconds(strategy), 0.01) for strategy in apart])
    together = SPACE.strategy({**SPACE.params(BASELINE), "precision": "bf16", "padding": "packed"})
    mean, deviation = surrogate.predict([together, apart[0]])
    assert math.exp(mean[0]) == pytest.approx(seconds(together), rel=0.15)
    assert abs(math.log(seconds(together)) - mean[0]) < 2 * deviation[0]
    assert math.exp(mean[1]) == pytest.approx(1000, rel=0.02)
    assert deviation[1] < 0.02 < deviation[0]


def test_what_is_known_of_a_kernel_is_known_of_it_under_another_name() -> None:
    known = [Known(strategy, seconds(strategy), 0.01) for strategy in (BASELINE, *SPACE.neighbours(BASELINE))]
    sdpa, flash = (SPACE.strategy({**SPACE.params(BASELINE), "attention": name}) for name in ("sdpa", "sdpa_flash"))
    known = [one for one in known if one.strategy != flash]
    mean, deviation = Surrogate(VALUES, known, Prior(same_kernel={"sdpa_flash": "sdpa"})).predict([sdpa, flash])
    assert (mean[0], deviation[0]) == (mean[1], deviation[1])
    apart_mean, apart_deviation = Surrogate(VALUES, known).predict([sdpa, flash])
    assert apart_mean[1] != apart_mean[0]
    assert apart_deviation[1] > 5 * apart_deviation[0]


def test_what_three_knobs_do_only_together_is_learnt() -> None:
    """As on a CPU, where an allocator that retains memory helps eager attention on padded batches alone."""

    def seconds_of(strategy: Strategy) -> float:
        is_helped = strategy.attention == "eager" and strategy.padding != "packed" and strategy.allocator == "retain"
        return 1000.0 if is_helped or strategy.attention != "eager" or strategy.padding == "packed" else 1500.0

    def settings(sizes: tuple[int, ...]) -> list[Strategy]:
        knobs = {knob: VALUES[knob] for knob in ("attention", "padding", "allocator")}
        combinations = itertools.product(sizes, *knobs.values())
        plain = SPACE.params(BASELINE)
        return [
            SPACE.strategy({**plain, "micro_batch": size, **dict(zip(knobs, values, strict=True))})
            for size, *values in combinations
        ]

    known = [Known(strategy, seconds_of(strategy), 0.03) for strategy in settings((32,))]
    wanted = settings((16,))
    mean, _ = Surrogate(VALUES, known).predict(wanted)
    assert np.exp(mean) == pytest.approx([seconds_of(strategy) for strategy in wanted], rel=0.05)


def test_what_is_known_without_a_trial_is_expected_before_one() -> None:
    tokens = {"max": 512.0, "longest": 400.0, "buckets": 280.0, "packed": 276.0}
    prior = Prior(work=lambda strategy: tokens[strategy.padding])
    bucketed = msgspec.structs.replace(BASELINE, padding="buckets")
    known = [Known(BASELINE, 1000.0, 0.01)]
    mean, deviation = Surrogate(VALUES, known, prior).predict([BASELINE, bucketed])
    assert np.exp(mean) == pytest.approx([1000, 1000 * 280 / 512], rel=0.02)
    assert deviation[0] < 0.02 < Surrogate(VALUES, known, Prior()).predict([bucketed])[1][0] < deviation[1]
    log_ratio, _ = Surrogate(VALUES, known, prior).log_ratio(BASELINE, bucketed)
    assert math.exp(log_ratio) == pytest.approx(512 / 280, rel=0.02)
    # a device that does not heed the tokens of one padding is not expected to heed those of another
    unmoved = Surrogate(VALUES, [*known, Known(bucketed, 1000.0, 0.01)], prior)
    packed = msgspec.structs.replace(BASELINE, padding="packed")
    assert unmoved.predict([packed])[0] > Surrogate(VALUES, known, prior).predict([packed])[0] + 0.1
    sampler = Sampler(SPACE, optuna.create_study(), seed=0)
    proposal = sampler.propose(known, lambda strategy, loss: 1.0, prior)
    assert proposal is not None
    assert proposal.strategy.padding in ("buckets", "packed")


def test_what_each_knob_brings_is_told_with_how_sure_it_is() -> None:
    best = SPACE.strategy({**SPACE.params(BASELINE), "precision": "bf16", "padding": "packed", "micro_batch": 8})
    apart = [BASELINE, best, *SPACE.neighbours(best)]
    found = estimated(
        Surrogate(VALUES, [Known(strategy, seconds(strategy), 0.01) for strategy in apart]), best, BASELINE, SPACE
    )
    assert [(share.knob, share.value, share.plain) for share in found] == [
        ("precision", "bf16", "fp32"),
        ("padding", "packed", "max"),
        ("micro_batch", 8, 32),
    ]
    ratios = [share.ratio for share in found if share.ratio]
    for ratio, expected in zip(ratios, (2.0, 2.0, 1 / 0.9), strict=True):
        assert ratio.low < expected < ratio.high
        assert ratio.ratio == pytest.approx(expected, rel=0.05)
    few = estimated(Surrogate(VALUES, [Known(s, seconds(s), 0.01) for s in (BASELINE, best)]), best, BASELINE, SPACE)
    wide = [share.ratio.high / share.ratio.low > 1.5 for share in few if share.ratio]
    assert wide == [True] * 3, "two trials do not tell which knob did it"


def test_the_expected_gain_is_the_mean_of_what_is_gained() -> None:
    mean, deviation = np.array([0.3, -0.1, 0.0]), np.array([0.5, 0.2, 0.01])
    draws = np.random.default_rng(0).normal(mean, deviation, (200_000, 3))
    assert expected_gain(0.1, mean, deviation) == pytest.approx(
        np.maximum(1 - np.exp(draws - 0.1), 0).mean(0), rel=0.02
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_thousands_is_found_in_two_dozen_trials(seed: int) -> None:
    assert SPACE.size > 6000
    generator = np.random.default_rng(seed)
    sampler = Sampler(SPACE, optuna.create_study(), seed=seed)
    sampler.enqueue(BASELINE)
    known: list[Known] = []
    for _ in range(24):
        proposal = sampler.ask(known)
        assert proposal is not None
        loss = seconds(proposal.strategy) * float(np.exp(generator.normal(0, 0.03)))
        known.append(Known(proposal.strategy, loss, 0.03))
        sampler.tell(loss)
    assert min(seconds(one.strategy) for one in known) <= 1.02 * seconds(BEST)


def test_what_costs_more_to_try_has_to_promise_more() -> None:
    sampler = Sampler(SPACE, optuna.create_study(), seed=0)
    known = [Known(BASELINE, 1000.0, 0.03)]

    def costs_s(strategy: Strategy, loss: float) -> float:
        return 1.0 if strategy.precision == "fp32" else 100.0

    proposal = sampler.ask(known, costs_s)
    assert proposal is not None
    assert proposal.strategy.precision == "fp32"
    assert proposal.gain is not None
    assert proposal.gain > 0
    sampler.tell(None)
    free = sampler.ask(known)
    assert free is not None
    assert free.strategy.precision != "fp32"


def test_what_may_well_fail_has_to_promise_more_and_what_cannot_run_is_not_proposed() -> None:
    known = [Known(BASELINE, 1000.0, 0.03)]

    def proposed(chance: float) -> Strategy:
        sampler = Sampler(
            SPACE,
            optuna.create_study(),
            seed=0,
            chances=lambda strategies: [1.0 if one.precision == "fp32" else chance for one in strategies],
        )
        proposal = sampler.propose(known, lambda strategy, loss: 1.0)
        assert proposal is not None
        return proposal.strategy

    assert proposed(1.0).precision != "fp32"
    assert proposed(0.01).precision == proposed(0.0).precision == "fp32"


def test_what_takes_longer_than_there_is_time_for_is_not_proposed() -> None:
    def proposed(left_s: float) -> Strategy | None:
        sampler = Sampler(SPACE, optuna.create_study(), seed=0)
        known = [Known(BASELINE, 1000.0, 0.03)]
        proposal = sampler.propose(known, lambda one, loss: 1.0 if one.precision == "fp32" else 1.1, left_s=left_s)
        return proposal and proposal.strategy

    unhurried, hurried = proposed(2.0), proposed(1.0)
    assert unhurried is not None
    assert hurried is not None
    assert unhurried.precision != "fp32"
    assert hurried.precision == "fp32"
    assert proposed(0.5) is None


def test_a_race_tells_ratios_alone() -> None:
    """However fast the device was in it, and however far off the baseline's trial is."""
    one, other = (
        Strategy(micro_batch=8, padding="packed"),
        Strategy(micro_batch=8, padding="packed", allocator="retain"),
    )

    def told(baseline_s: float, slower: float, other_s: float) -> float:
        known = [
            *(Known(BASELINE, baseline_s, 0.15), Known(one, 50.0, 0.03), Known(other, 50.0, 0.07)),
            *(
                Known(setting, slower * s, 0.02, race=0)
                for setting, s in ((BASELINE, 100.0), (one, 50.0), (other, other_s))
            ),
        ]
        return Surrogate(VALUES, known).log_ratio(other, one)[0]

    plain = told(100.0, 1.0, 50.0)
    assert told(100.0, 1.5, 50.0) == pytest.approx(plain, abs=0.003)
    assert told(130.0, 1.0, 50.0) == pytest.approx(plain, abs=0.003)
    assert told(100.0, 1.0, 55.0) > plain + 0.04
