"""Predicted against measured peak memory: python -m benchmarks.memory [--model imdb] [--from 4,8] A.toml ...

Each argument is a profile's file, or ``none`` for the plain baseline; its micro batch is varied from 1 to 64 (as one
global batch of 64), each in a trial process that trains on its first batches and on the longest. The search's own model
predicts all from two of them.
"""

from __future__ import annotations

import click
import msgspec

from autotune import backends, workloads
from autotune.measurement import Trial
from autotune.report.terminal import describe
from autotune.search.memory import MemoryModel
from autotune.trial.runner import Session
from autotune.trial.worker import Command, Job
from autotune.units import format_bytes
from benchmarks import strategy_of

SIZES = (1, 2, 4, 8, 16, 32, 64)


@click.command()
@click.argument("settings", nargs=-1, required=True)
@click.option("--model", default="imdb", show_default=True)
@click.option(
    "--from", "known", default="4,8", show_default=True, help="Micro batches that the others are predicted from."
)
def main(settings: tuple[str, ...], model: str, known: str) -> None:
    module = workloads.get(model)
    backend = backends.find()
    ref = module.prepare(None, limit=None, on_progress=lambda _: None)
    device = backend.device()
    print(f"{device.name}, {device.num_cores} cores, torch {device.versions['torch']}, {ref.source}")
    for setting in settings:
        plain = strategy_of(setting, module.open_workload(ref))
        trials = {}
        for size in SIZES:
            strategy = msgspec.structs.replace(plain, micro_batch=size, accumulation=max(SIZES) // size)
            job = Job(workload=ref, strategy=strategy, backend=backend.name, memory_limit_bytes=None, seed=0)
            with Session(job, memory_limit_bytes=int(0.9 * device.memory_free_bytes)) as session:
                done = session.time(Command(min_laps=2, eval_batches=2), timeout_s=600)
            trials[size] = Trial(number=size, strategy=strategy, outcome="ok", measurement=done.measurement)
        memory = MemoryModel()
        for size in map(int, known.split(",")):
            memory.learn(trials[size])
        print(f"{describe(msgspec.structs.replace(plain, micro_batch=1, accumulation=64))}, predicted from {known}")
        for size, trial in trials.items():
            predicted, measured = memory.predict(trial.strategy), trial.measurement
            assert predicted is not None
            assert measured is not None
            peak_bytes = measured.peak_memory_bytes
            words = f"predicted {format_bytes(predicted):>9}, measured {format_bytes(peak_bytes):>9}"
            print(f"  micro batch {size:2}: {words}, {predicted / peak_bytes - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
