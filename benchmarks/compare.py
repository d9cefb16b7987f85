"""Settings timed in turns on one workload: python -m benchmarks.compare [--data PATH] [--rounds 6] A.toml B.toml ...

Each argument is a profile's file, ``none`` for the plain baseline, or what differs from that, as in
``precision=bf16,padding=buckets``. They are timed in turns by the search's own race; the ratios to the first are paired
by round, with a 95 % interval. Ctrl-C ends it with the rounds that are done.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from autotune import backends, workloads
from autotune.measurement import Trial
from autotune.report.terminal import describe, interval_words
from autotune.search.finals import ratio
from autotune.search.turns import MIN_ROUNDS, Entrant, Race
from autotune.trial.pulse import Pulse
from benchmarks import job_of, strategy_of


@click.command()
@click.argument("settings", nargs=-1, required=True)
@click.option("--model", default="imdb", show_default=True)
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(min=MIN_ROUNDS), default=6, show_default=True)
def main(settings: tuple[str, ...], model: str, data: Path | None, rounds: int) -> None:
    module = workloads.get(model)
    ref = module.prepare(data, limit=None, on_progress=lambda _: None)
    workload = module.open_workload(ref)
    backend = backends.find()
    print(f"{backend.device().name}, torch {backend.device().versions['torch']}, {ref.source}")

    def entrant(number: int, name: str) -> Entrant:
        strategy = strategy_of(name, workload)
        trial = Trial(number=number, strategy=strategy, outcome="ok")
        return Entrant(trial=trial, job=job_of(strategy, ref, workload))

    def told(done: int) -> None:
        print(f"{done} of {rounds} rounds", file=sys.stderr, flush=True)

    status = 0
    with Pulse(backend.name) as pulse:
        race = Race(
            [entrant(number, name) for number, name in enumerate(settings)],
            timeout_s=600,
            memory_limit_bytes=int(0.9 * backend.device().memory_free_bytes),
            pulse=pulse,
        )
        try:
            race.run(enough_s=float("inf"), max_rounds=rounds, on_round=told)
        except KeyboardInterrupt:
            status = 130
    disturbed = f", {race.num_disturbed} disturbed by other work, which do not count" if race.num_disturbed else ""
    print(f"rounds: {race.num_rounds}{', interrupted' if status else ''}{disturbed}")
    if not race.num_rounds:
        sys.exit(status)
    for number, failure in race.failures.items():
        print(f"{settings[number]}: {failure.outcome}, {failure.reason}")
    finals = race.finals()
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
    sys.exit(status)


if __name__ == "__main__":
    main()
