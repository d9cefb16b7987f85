from typing import Any

import pytest

from autotune.strategy import Strategy, baseline


def test_the_baseline_is_plain_fp32_with_the_whole_batch_at_once() -> None:
    plain = baseline(32)
    assert plain.to_dict() == {
        "attention": "eager",
        "precision": "fp32",
        "checkpoint": "none",
        "micro_batch": 32,
        "accumulation": 1,
        "compile": "none",
        "compile_scope": "model",
        "graphs": "none",
        "workers": 0,
        "prefetch": 2,
        "padding": "max",
        "threads": 0,
        "allocator": "default",
        "optimizer": "default",
        "memory_format": "contiguous",
        "window": 64,
        "deterministic": False,
    }


def test_changed_gives_own_and_other_value_of_the_knobs_that_differ() -> None:
    tuned = Strategy(precision="bf16", micro_batch=8, accumulation=4)
    assert tuned.changed(baseline(32)) == {
        "precision": ("bf16", "fp32"),
        "micro_batch": (8, 32),
        "accumulation": (4, 1),
    }


@pytest.mark.parametrize(
    "bad", [{"micro_batch": 0}, {"micro_batch": 8, "accumulation": 0}, {"micro_batch": 1, "prefetch": 0}]
)
def test_counts_below_their_least_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be >="):
        Strategy(**bad)


@pytest.mark.parametrize("knob", ["workers", "threads"])
def test_a_slip_of_the_pen_is_refused_before_it_takes_the_machine_down(knob: str) -> None:
    most: dict[str, Any] = {"micro_batch": 1, knob: 1024}
    assert getattr(Strategy(**most), knob) == 1024
    for count in (-1, 1025):
        slip: dict[str, Any] = {"micro_batch": 1, knob: count}
        with pytest.raises(ValueError, match=f"{knob} must be from 0 to 1024"):
            Strategy(**slip)
