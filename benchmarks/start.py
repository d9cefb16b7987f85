"""What a trial's start costs: python -m benchmarks.start [--rounds 10]

From the call to the trial's word that it starts its first step (model, optimizer and loader built), forked from the
warm server and from a fresh interpreter (what another operating system does), in turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import click

from autotune import backends, workloads
from autotune.process import Child
from autotune.strategy import baseline
from autotune.trial import worker
from autotune.trial.worker import Command, Job, Progress

FRESH = """
import os, sys
import msgspec
from autotune.trial.worker import Command, Job, main
class Connection:
    def send(self, message):
        print(message.stage, flush=True)
        if message.stage == "first step": os._exit(0)
main(Connection(), msgspec.json.decode(sys.argv[1], type=Job))
"""


def warm(job: Job) -> tuple[float, float]:
    """Seconds to the trial's first word, and to its first step, forked from the server."""
    start = time.perf_counter()
    with Child(worker.main, job) as child:
        child.send(Command(min_laps=1))
        first_s = 0.0
        while True:
            message = child.receive(120)
            first_s = first_s or time.perf_counter() - start
            if isinstance(message, Progress) and message.stage == "first step":
                return first_s, time.perf_counter() - start


def fresh(job: Job) -> tuple[float, float]:
    """The same from a fresh interpreter."""
    import msgspec

    start = time.perf_counter()
    command = [sys.executable, "-c", FRESH, msgspec.json.encode(job).decode()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    first_s = time.perf_counter() - start
    process.stdout.readline()
    step_s = time.perf_counter() - start
    process.communicate()
    return first_s, step_s


@click.command()
@click.option("--model", default="imdb", show_default=True)
@click.option("--rounds", default=10, show_default=True)
def main(model: str, rounds: int) -> None:
    module = workloads.get(model)
    backend = backends.find()
    ref = module.prepare(None, limit=None, on_progress=lambda _: None)
    strategy = baseline(module.RECIPE.global_batch)
    job = Job(workload=ref, strategy=strategy, backend=backend.name, memory_limit_bytes=None, seed=0)
    device = backend.device()
    print(f"{device.name}, {device.num_cores} cores, torch {device.versions['torch']}, {rounds} rounds in turns")
    print(f"the first of all, server started for it: {warm(job)[1]:.2f} s")
    times: dict[str, list[tuple[float, float]]] = {"forked from the warm server": [], "fresh interpreter": []}
    for _ in range(rounds):
        times["forked from the warm server"].append(warm(job))
        times["fresh interpreter"].append(fresh(job))
    for what, found in times.items():
        for which, values in zip(("first word", "first step"), zip(*found, strict=True), strict=True):
            print(f"{what}, {which}: {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
