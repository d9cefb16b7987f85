"""Whether noise is crowned as the winner: python -m benchmarks.noise [--races 40] [--seconds 20]

A second process loads one core at random, busy and idle for exponential times of one second on average. Meanwhile the
same setting is raced against itself (A/A), and against one that is truly 10 % slower (A/B: each of its steps is
followed by a wait of a tenth of the time that it took itself, whatever the load). The race is the search's own. A/A is
right where the 95 % interval of the ratio holds 1, A/B where all of it lies above 1.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from autotune import backends
from autotune.apply import apply
from autotune.data.batching import Indices
from autotune.measurement import Interval, Trial
from autotune.models.encoder import EncoderClassifier
from autotune.search.finals import ratio
from autotune.search.turns import Entrant, Race
from autotune.strategy import Strategy
from autotune.trial.pulse import Pulse
from autotune.trial.worker import Job
from autotune.workloads.base import Recipe, Workload, WorkloadRef, num_correct

BATCH, TOKENS = 8, 64
SLOWER = 0.10
RECIPE = Recipe(learning_rate=1e-3, weight_decay=0.0, warmup_steps=1, clip_norm=1.0, global_batch=BATCH, epochs=1)

STRATEGY = Strategy(micro_batch=BATCH, padding="max")
LOAD = """
import os, random, sys, time
generator = random.Random(int(sys.argv[1]))
parent = os.getppid()
while os.getppid() == parent:
    end = time.monotonic() + generator.expovariate(1.0)
    while time.monotonic() < end: pass
    time.sleep(generator.expovariate(1.0))
"""


class Data:
    """512 sequences of all lengths."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.lengths: Indices = generator.integers(16, TOKENS + 1, 512)
        self.labels: Indices = generator.integers(0, 2, 512)

    def ids(self, index: int) -> NDArray[np.uint16]:
        return np.full(self.lengths[index], 1 + self.labels[index], dtype=np.uint16)


class Slowed(nn.Module):
    """The encoder; waits after each backward pass for a share of the time since the forward pass began."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.encoder = EncoderClassifier(
            vocabulary_size=8, max_tokens=TOKENS, width=64, num_heads=4, ffn_width=256, num_layers=1
        )
        self.share = share
        self.start_s = 0.0
        self.timed_s = 0.0
        """Seconds from forward to backward so far, which is what the waits are shares of."""
        first = next(self.encoder.parameters())  # the embedding, whose gradient comes last
        first.register_post_accumulate_grad_hook(self.wait)  # type: ignore[no-untyped-call]

    def wait(self, _: object) -> None:
        now = time.perf_counter()
        self.timed_s += now - self.start_s
        end = now + self.share * (now - self.start_s)
        while time.perf_counter() < end:
            pass

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        self.start_s = time.perf_counter()
        output: Tensor = self.encoder(ids_BT=ids_BT, mask_BT=mask_BT)
        return output


class Noise:
    """A workload of short steps; the ref's ``folder`` is the share that its steps take longer."""

    RECIPE = RECIPE

    def prepare(self, data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
        return WorkloadRef(name="benchmarks.noise:WORKLOAD", folder=str(data or "0"), source="made up")

    def open_workload(self, ref: WorkloadRef) -> Workload:
        data = Data()
        return Workload(
            name="noise",
            recipe=RECIPE,
            source=ref.source,
            build_model=lambda: Slowed(float(ref.folder)),
            loss=lambda output, targets: F.cross_entropy(output, targets, reduction="sum"),
            num_correct=num_correct,
            train=data,
            test=data,
            max_tokens=TOKENS,
        )


WORKLOAD = Noise()


def raced(share: float, seconds: float) -> tuple[Interval, str]:
    """How many times slower B is than A, and the rounds it took to say so in words."""
    backend = backends.get("cpu")

    def entrant(number: int, folder: str) -> Entrant:
        ref = WORKLOAD.prepare(Path(folder), limit=None, on_progress=lambda _: None)
        job = Job(workload=ref, strategy=STRATEGY, backend=backend.name, memory_limit_bytes=None, seed=0)
        return Entrant(trial=Trial(number=number, strategy=STRATEGY, outcome="ok"), job=job)

    with Pulse(backend.name) as pulse:
        entrants = [entrant(0, "0"), entrant(1, str(share))]
        race = Race(entrants, timeout_s=120, memory_limit_bytes=2**40, pulse=pulse)
        race.run(enough_s=seconds)
    a, b = race.finals()
    return ratio(b, a), f"{race.num_rounds} rounds, {race.num_disturbed} disturbed"


def calibrated() -> float:
    """The share of forward and backward that makes a tenth of a whole step."""
    workload = WORKLOAD.open_workload(WORKLOAD.prepare(None, limit=None, on_progress=lambda _: None))
    run = apply(STRATEGY, workload, backends.get("cpu"))
    assert isinstance(run.model, Slowed)
    start = 0.0
    for epoch in range(6):
        if epoch == 1:  # the first one warms up
            start, run.model.timed_s = time.perf_counter(), 0.0
        for batch in run.loader:
            run.step(batch)
    return SLOWER * (time.perf_counter() - start) / run.model.timed_s


@click.command()
@click.option("--races", default=40, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Of one race.")
def main(races: int, seconds: float) -> None:
    device = backends.get("cpu").device()
    share = calibrated()
    quiet, rounds = raced(share, 40)
    print(f"{device.name}, {device.num_cores} cores, torch {device.versions['torch']}")
    print(f"quiet: B is {_words(quiet)} slower than A, {rounds}, share {share:.3f}", flush=True)
    right = {"A/A": 0, "A/B": 0}
    for number in range(races):
        load = subprocess.Popen([sys.executable, "-c", LOAD, str(number)])
        try:
            time.sleep(random.random())
            for kind, share_b in (("A/A", 0.0), ("A/B", share)):
                found, rounds = raced(share_b, seconds)
                is_right = found.low <= 1 <= found.high if kind == "A/A" else found.low > 1
                right[kind] += is_right
                print(f"{number:2} {kind} {_words(found)}, {rounds}{'' if is_right else '  WRONG'}", flush=True)
        finally:
            load.kill()
            load.wait()
    print(f"A/A: the interval holds 1 in {right['A/A']} of {races}; A/B: recognised in {right['A/B']} of {races}")


def _words(interval: Interval) -> str:
    return f"{interval.ratio:.3f}x ({interval.low:.3f} to {interval.high:.3f})"


if __name__ == "__main__":
    main()
