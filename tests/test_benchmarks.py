"""The benchmarks start; what they measure is nobody's test."""

from __future__ import annotations

import importlib
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from benchmarks import strategy_of

FILES = (Path(__file__).parents[1] / "benchmarks").glob("[a-z]*.py")
NAMES = sorted(path.stem for path in FILES if "__main__" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_tells_its_options(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    done = CliRunner().invoke(module.main, ["--help"])
    assert done.exit_code == 0
    assert module.__doc__


def test_a_setting_is_named_by_what_differs_from_the_plain_baseline(prepared: tuple[object, Workload]) -> None:
    workload = prepared[1]
    assert strategy_of("none", workload) == workload.baseline
    named = strategy_of("precision=bf16,micro_batch=8,accumulation=4,deterministic=true", workload)
    assert named == Strategy(precision="bf16", micro_batch=8, accumulation=4, deterministic=True)
    with pytest.raises(msgspec.ValidationError, match="presicion"):
        strategy_of("presicion=bf16", workload)
