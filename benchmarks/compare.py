"""Settings timed in turns on one workload: python -m benchmarks.compare [--data PATH] [--rounds 6] A.toml B.toml ...

Each argument is a profile's file, or ``none`` for the plain baseline. They are timed in turns by the search's own race;
the ratios to the first are paired by round, with a 95 % interval.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from autotune import backends, workloads
from autotune.measurement import Trial
from autotune.report.terminal import describe, interval_words
from autotune.search.finals import Entrant, Race, ratio
from autotune.trial.pulse import Pulse
from autotune.trial.worker import Job
from benchmarks import strategy_of


@click.command()
@click.argument("settings", nargs=-1, required=True)
@click.option("--model", default="imdb", show_default=True)
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--rounds", default=6, show_default=True)
def main(settings: tuple[str, ...], model: str, data: Path | None, rounds: int) -> None:
    module = workloads.get(model)
    ref = module.prepare(data, limit=None, on_progress=lambda _: None)
    workload = module.open_workload(ref)
    backend = backends.find()
    print(f"{backend.device().name}, torch {backend.device().versions['torch']}, {ref.source}, {rounds} rounds")

    def entrant(number: int, name: str) -> Entrant:
        strategy = strategy_of(name, workload)
        job = Job(workload=ref, strategy=strategy, backend=backend.name, memory_limit_bytes=None, seed=0)
        return Entrant(trial=Trial(number=number, strategy=strategy, outcome="ok"), job=job)

    with Pulse(backend.name) as pulse:
        race = Race(
            [entrant(number, name) for number, name in enumerate(settings)],
            timeout_s=600,
            memory_limit_bytes=int(0.9 * backend.device().memory_free_bytes),
            pulse=pulse,
        )
        race.run(enough_s=float("inf"), max_rounds=rounds)
    for number, failure in race.failures.items():
        print(f"{settings[number]}: {failure.outcome}, {failure.reason}")
    finals = race.finals()
    if race.num_disturbed:
        print(f"{race.num_disturbed} of {race.num_rounds} rounds were disturbed by other work and do not count")
    if not finals or finals[0].trial.number != 0:
        sys.exit(f"{settings[0]} has failed: there is nothing to compare with")
    first = finals[0]
    for final in finals:
        rates = sorted(workload.num_train / epoch_s for epoch_s in final.epoch_s)
        words = interval_words(ratio(first, final))
        print(
            f"{describe(final.trial.strategy)}: samples/s {rates[0]:.1f} .. {rates[len(rates) // 2]:.1f} .. "
            f"{rates[-1]:.1f}; {words} the first; peak {final.measurement.peak_memory_bytes / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main()
