"""What other tools choose, and how fast that is beside ours: python -m benchmarks.peers [--only lightning]

Each tool gets a venv of its own under build/peers, the same model, data and machine, and chooses by its own means, with
its own defaults. What was chosen is then trained by one loop, the search's own race: each in turns with our choice, in
processes of their own; rates are of real samples, the ratio has a 95 % interval. Ours without a search is what
``autotune.load`` gives where there is no profile. Most of these tools look for a batch size, and so change the
training; ours keeps the recipe's global batch. Nothing else may run meanwhile.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
from rich.table import Table

from autotune import backends, workloads
from autotune.api import safe_defaults
from autotune.files import replace_file
from autotune.measurement import Interval, Trial
from autotune.report.terminal import describe, interval_words, stdout
from autotune.search.finals import ratio
from autotune.search.task import FREE_MEMORY_SHARE
from autotune.search.turns import Entrant, Race
from autotune.strategy import Strategy
from autotune.trial.pulse import Pulse
from autotune.units import format_bytes, format_duration, format_rate
from autotune.workloads.base import Workload, WorkloadRef
from benchmarks import job_of

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
PEERS: dict[str, list[str]] = {
    "accelerate": ["accelerate==1.15.0"],
    "transformers": ["transformers==5.23.0", "accelerate==1.15.0"],
    "lightning": ["lightning==2.6.6"],
    "deepspeed": ["deepspeed[autotuning]==0.19.8"],
    "pytorch_autotune": ["pytorch-autotune==2.0.0"],
}
"""What is installed beside torch and this project, by the script that makes it choose (choose_NAME.py)."""
PEER_TIMEOUT_S = 1800


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool chose."""

    tool: str
    words: str
    strategy: Strategy | None
    """None where it chose nothing."""
    search_s: float


class Timed(NamedTuple):
    """A choice in turns with ours."""

    samples_per_s: float
    peak_memory_bytes: int
    over: Interval
    """How many times faster ours is."""


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(PEERS)), help="Default: all.")
@click.option("--budget", multiple=True, default=("1m", "5m"), show_default=True, help="Of our own searches.")
@click.option("--resume", is_flag=True, help="Take over the choices that a run which was cut off has kept.")
@click.option("--seconds", default=120.0, show_default=True, help="Of each race.")
def main(only: tuple[str, ...], budget: tuple[str, ...], resume: bool, seconds: float) -> None:
    folder = ROOT / "build" / "peers"
    names = only or tuple(PEERS)
    if not resume:
        for tool in (*(f"autotune, {text}" for text in budget), *names):
            kept_at(folder, tool).unlink(missing_ok=True)
    chosen = functools.partial(kept, folder=folder)
    module = workloads.get("imdb")
    ref = module.prepare(None, limit=None, on_progress=print)
    workload = module.open_workload(ref)
    ours = [chosen(f"autotune, {text}", functools.partial(ours_in, text, folder)) for text in budget]
    theirs = [chosen(name, functools.partial(theirs_in, name, folder, workload)) for name in names]
    best, unsearched = ours[-1], safe_defaults("imdb")
    ours.insert(0, Choice(tool="autotune, no search", words=describe(unsearched), strategy=unsearched, search_s=0.0))
    assert best.strategy is not None
    timed: dict[Strategy, Timed | str] = {}
    for choice in [*ours, *theirs]:
        if choice.strategy and choice.strategy not in {best.strategy, *timed}:
            timed[choice.strategy] = in_turns(best.strategy, choice.strategy, ref, seconds)
            print(f"{choice.tool}, {choice.words}: {timed[choice.strategy]}", flush=True)
    stdout().print(table([*ours, *theirs], timed))


def ours_in(budget: str, folder: Path) -> Choice:
    """Our own search, from nothing."""
    profiles = folder / f"ours-{budget}"
    command = [sys.executable, "-m", "autotune", "search", "--model", "imdb", "--fresh", "--json", "--budget", budget]
    done = subprocess.run([*command, "--profiles", profiles], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    knobs = {knob: found["best"]["strategy"][knob] for knob in Strategy.__struct_fields__}
    strategy = msgspec.convert(knobs, Strategy)
    return Choice(tool=f"autotune, {budget}", words=describe(strategy), strategy=strategy, search_s=found["search_s"])


def theirs_in(name: str, folder: Path, workload: Workload) -> Choice:
    """What a peer chooses, in its venv, which is made where there is none yet."""
    python = folder / name / "bin" / "python"
    if not (folder / name / ".installed").is_file():
        print(f"{name}: installing {', '.join(PEERS[name])}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        for packages in ([], [*PEERS[name], "-e", str(ROOT)]):
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *packages, TORCH], check=True)
        (folder / name / ".installed").touch()
    print(f"{name}: choosing", flush=True)
    command = [str(python), "-m", f"benchmarks.peers.choose_{name}"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=PEER_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Choice(tool=name, words="not done in time", strategy=None, search_s=float(PEER_TIMEOUT_S))
    if done.returncode:
        return Choice(tool=name, words=f"failed, status {done.returncode}", strategy=None, search_s=0.0)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    plain = msgspec.to_builtins(workload.baseline)
    strategy = msgspec.convert({**plain, **found["strategy"]}, Strategy)
    return Choice(tool=name, words=found["words"], strategy=strategy, search_s=found["search_s"])


def kept(tool: str, choose: Callable[[], Choice], *, folder: Path) -> Choice:
    """What a tool chooses, on disk at once; what is there already, where that is something."""
    path = kept_at(folder, tool)
    if path.is_file():
        before = msgspec.json.decode(path.read_bytes(), type=Choice)
        if before.strategy is not None:
            return before
    choice = choose()
    replace_file(path, msgspec.json.encode(choice))
    return choice


def kept_at(folder: Path, tool: str) -> Path:
    """The file of its choice."""
    return folder / f"{tool.replace(', ', '-')}.json"


def in_turns(ours: Strategy, theirs: Strategy, ref: WorkloadRef, seconds: float) -> Timed | str:
    """Both in turns; the reason where theirs does not train."""
    backend, workload = backends.find(), workloads.open_workload(ref)
    entrants = [
        Entrant(
            trial=Trial(number=number, strategy=strategy, outcome="ok"),
            job=job_of(strategy, ref, workload),
        )
        for number, strategy in enumerate((ours, theirs))
    ]
    memory_limit_bytes = int(FREE_MEMORY_SHARE * backend.device().memory_free_bytes)
    with Pulse(backend.name) as pulse:
        race = Race(entrants, timeout_s=900, memory_limit_bytes=memory_limit_bytes, pulse=pulse)
        race.run(enough_s=seconds)
    if race.failures:
        return "; ".join(f"{end.outcome}: {end.reason}" for end in race.failures.values())
    first, second = race.finals()
    measured = second.measurement
    return Timed(measured.samples_per_s, measured.peak_memory_bytes, ratio(second, first))


def table(choices: list[Choice], timed: dict[Strategy, Timed | str]) -> Table:
    """One row for each tool."""
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("tool", "chose", "search", "samples/s", "peak memory", "ours is faster"):
        found.add_column(title, justify="left" if title in ("tool", "chose") else "right")
    for choice in choices:
        measured = timed.get(choice.strategy) if choice.strategy else None
        cells = ["", "", ""]
        if isinstance(measured, str):
            cells = [measured, "", ""]
        elif measured is not None:
            cells = [
                format_rate(measured.samples_per_s),
                format_bytes(measured.peak_memory_bytes),
                interval_words(measured.over),
            ]
        found.add_row(choice.tool, choice.words, format_duration(choice.search_s), *cells)
    return found


if __name__ == "__main__":
    main()
