"""Projected against real: python -m benchmarks.projection [--repeats 5] [--limit 2000] none A.toml

Each argument is a profile's file, or ``none`` for the plain baseline. A trial, as a search runs it, projects an epoch
of ``autotune train --limit N`` with its evaluation; then that command runs. What differs is the error of the projection
and what the machine's speed did in between.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from autotune import backends, workloads
from autotune.report.terminal import describe
from autotune.trial.runner import run_trial
from benchmarks import job_of, strategy_of


@click.command()
@click.argument("settings", nargs=-1, required=True)
@click.option("--model", default="imdb", show_default=True)
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--limit", default=2000, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(settings: tuple[str, ...], model: str, data: Path | None, limit: int, repeats: int) -> None:
    module = workloads.get(model)
    backend = backends.find()
    ref = module.prepare(data, limit=limit, on_progress=lambda _: None)
    workload = module.open_workload(ref)
    device = backend.device()
    print(f"{device.name}, {device.num_cores} cores, torch {device.versions['torch']}, {ref.source}")
    ratios: dict[str, list[float]] = {setting: [] for setting in settings}
    for number in range(repeats):
        for setting in settings:
            strategy = strategy_of(setting, workload)
            job = job_of(strategy, ref, workload)
            trial = run_trial(number, job, timeout_s=600, memory_limit_bytes=int(0.9 * device.memory_free_bytes))
            assert trial.measurement is not None, trial.reason
            projected_s = trial.measurement.run_s(num_train=workload.num_train, num_test=workload.num_test, epochs=1)
            real = trained(setting, model, data, limit)
            ratios[setting].append(real["wall_s"] / projected_s)
            print(
                f"{describe(strategy)}: projected {projected_s:.1f} s, real {real['wall_s']:.1f} s, "
                f"{ratios[setting][-1]:.3f}; peak in the trial {trial.measurement.peak_memory_bytes / 2**30:.2f} GiB, "
                f"in training {real['peak_memory_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )
    for setting, found in ratios.items():
        spread = f"({min(found):.3f} to {max(found):.3f})"
        print(f"{setting}: real over projected, median {statistics.median(found):.3f} {spread}")


def trained(setting: str, model: str, data: Path | None, limit: int) -> dict[str, float]:
    """The metrics of one epoch of ``autotune train``."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.json"
        command = [sys.executable, "-m", "autotune", "train", "--model", model, "--profile", setting, "--epochs", "1"]
        command += ["--limit", str(limit), "--metrics", str(metrics), *(["--data", str(data)] if data else [])]
        subprocess.run(command, check=True, capture_output=True)
        found: dict[str, float] = json.loads(metrics.read_text())
        return found


if __name__ == "__main__":
    main()
