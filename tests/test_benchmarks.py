"""The benchmarks start; what they measure is nobody's test."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from click.testing import CliRunner

FILES = (Path(__file__).parents[1] / "benchmarks").glob("[a-z]*.py")
NAMES = sorted(path.stem for path in FILES if "__main__" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_tells_its_options(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    done = CliRunner().invoke(module.main, ["--help"])
    assert done.exit_code == 0
    assert module.__doc__
