"""Search methods on a recorded grid: ours, and what people use otherwise. Each says what it held for the best when."""

from __future__ import annotations

import functools
import itertools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import optuna

from autotune import backends
from autotune.flops import Flops
from autotune.measurement import Measurement, Trial
from autotune.search.guess import expert_guess
from autotune.search.journal import Journal
from autotune.search.objective import FASTEST, PlannedRun, hopeless, loss_of
from autotune.search.settings import Observer, Settings
from autotune.search.space import Space
from autotune.search.task import Task
from autotune.search.trials import Trials
from autotune.strategy import Padding, Strategy, baseline
from autotune.trial.pulse import Pulse
from autotune.trial.worker import Progress
from autotune.workloads.base import Workload, WorkloadRef
from benchmarks.recorded import Recorded, job_of

MAX_ASKED = 3000
"""At most so many trials, repeats included: a sampler that repeats itself is left alone then."""


@dataclass(frozen=True, kw_only=True)
class Replayed(Task):
    """A search's task on a grid."""

    recorded: Recorded

    @functools.cached_property
    def space(self) -> Space:
        """What was recorded."""
        return self.recorded.space

    @functools.cached_property
    def flops(self) -> Flops:
        """Not needed: what was recorded is of whole epochs."""
        return Flops(None, "nothing is trained in a replay")

    def timed_ways(self, baseline: Measurement) -> None:
        """None: a grid's model is autotune's own."""

    @functools.cached_property
    def planned(self) -> PlannedRun:
        """The training that it was recorded for."""
        return self.recorded.grid.header.planned

    @functools.cached_property
    def tokens(self) -> Callable[[Padding, int], float]:
        """As the grid's own search knew them."""
        found = self.recorded.grid.header.tokens
        return lambda padding, micro_batch: found[padding][micro_batch] if found else 1.0

    @property
    def baseline(self) -> Strategy:
        """The plain one."""
        return baseline(self.space.global_batch)


class Held(NamedTuple):
    """What a method holds for the best from some time on."""

    since_s: float
    strategy: Strategy


class _Noting(Observer):
    """Notes what the search holds for the best after each trial."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded
        self.held: list[Held] = []

    def on_trial_end(self, trial: Trial, best: Trial | None) -> None:
        if best is not None:
            self.held.append(Held(self._recorded.clock, best.strategy))


class _RecordedPulse(Pulse):
    """Records are moved to one speed by their own pulses; ``file`` says whether trials had beats of their own."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__(recorded.grid.header.hardware.device.kind)
        self._has_beats = any(record.trial.has_beats for record in recorded.grid.records)

    def beat(self) -> None:
        return None

    def file(self) -> str | None:
        return "recorded" if self._has_beats else None


def ours(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
    """The search's own trials, until the budget is spent."""
    return search_on(recorded, Settings(budget_s=budget_s, max_trials=MAX_ASKED, seed=seed))[0]


def ours_until_settled(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
    """As a search is by default: it ends when no trial is expected to save the planned run its own time."""
    return search_on(recorded, Settings(budget_s=budget_s, seed=seed))[0]


def search_on(recorded: Recorded, settings: Settings) -> tuple[list[Held], list[Trial]]:
    """What a search's trials on a grid hold for the best, and the trials."""
    header = recorded.grid.header
    task = Replayed(
        recorded=recorded,
        ref=WorkloadRef(name=header.model, folder="", source=header.source),
        workload=cast("Workload", None),  # a grid has no model
        hardware=header.hardware,
        backend=backends.get(header.hardware.device.kind),
        settings=settings,
    )
    noting, journal = _Noting(recorded), Journal(optuna.create_study())
    trials = Trials(task, noting, journal, _RecordedPulse(recorded), run=recorded.run, clock=lambda: recorded.clock)
    trials.run(reserved_s=lambda: 0.0)
    return noting.held, trials.history.all


class _Rival:
    """Measures whole trials, remembers them, and holds the fastest. One that ``gives_up`` ends hopeless trials as ours
    does, and learns what they would have taken."""

    def __init__(self, recorded: Recorded, budget_s: float, *, gives_up: bool = False) -> None:
        self._recorded, self._budget_s, self._gives_up = recorded, budget_s, gives_up
        self.losses: dict[Strategy, float] = {}
        self.held: list[Held] = []
        self._best: Trial | None = None

    @property
    def is_over(self) -> bool:
        return self._recorded.clock >= self._budget_s or len(self.losses) == len(self._recorded.by_strategy)

    def loss(self, strategy: Strategy) -> float:
        """Seconds of the planned run; infinite where it did not run."""
        if strategy not in self.losses:
            trial = self._recorded.run(0, job_of(strategy), memory_limit_bytes=2**60, hopeless=self._hopeless(strategy))
            loss = loss_of(trial, FASTEST, self._recorded.grid.header.planned, reference=self._best)
            self.losses[strategy] = loss = math.inf if loss is None else loss
            if trial.measurement is not None and (self._best is None or loss < self.losses[self._best.strategy]):
                self._best = trial
                self.held.append(Held(self._recorded.clock, strategy))
        return self.losses[strategy]

    def _hopeless(self, strategy: Strategy) -> Callable[[Progress], str | None]:
        best = self._best.samples_per_s if self._best and self._gives_up else None
        if best is None:
            return lambda _: None
        return lambda progress: hopeless(progress, best, strategy.compile != "none")


def _in_order(strategies: Callable[[Recorded, int], Sequence[Strategy]]) -> Callable[..., list[Held]]:
    def method(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
        rival = _Rival(recorded, budget_s)
        for strategy in strategies(recorded, seed):
            if rival.is_over:
                break
            rival.loss(strategy)
        return rival.held

    return method


def _shuffled(recorded: Recorded, seed: int) -> list[Strategy]:
    strategies = list(recorded.by_strategy)
    random.Random(seed).shuffle(strategies)
    return strategies


def _grid_order(recorded: Recorded, _: int) -> list[Strategy]:
    everything = itertools.product(*recorded.space.values.values())
    named = (recorded.space.strategy(dict(zip(recorded.space.values, chosen, strict=True))) for chosen in everything)
    return [strategy for strategy in named if recorded.space.refusal(strategy) is None]


def _optuna(
    sampler: Callable[[int], optuna.samplers.BaseSampler], *, is_helped: bool = False
) -> Callable[..., list[Held]]:
    """The sampler is told that a combination that was not recorded takes for ever: it would learn nothing from trials
    that fail, and the GP would name the same again and again. ``is_helped`` gives it what ours has beside the sampler:
    the expert's guess, and giving up what is hopeless."""

    def method(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
        rival, space = _Rival(recorded, budget_s, gives_up=is_helped), recorded.space
        knobs = {knob: values for knob, values in space.values.items() if len(values) > 1}
        plain = {knob: values[0] for knob, values in space.values.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Clip non-finite values")  # the GP does, as it should
            study = optuna.create_study(sampler=sampler(seed))
            if is_helped:
                guess = space.params(_guess(recorded))
                study.enqueue_trial({knob: guess[knob] for knob in knobs})
            for _ in range(MAX_ASKED):
                if rival.is_over:
                    break
                trial = study.ask()
                chosen = {knob: trial.suggest_categorical(knob, values) for knob, values in knobs.items()}
                strategy = space.strategy({**plain, **chosen})
                study.tell(trial, math.inf if space.refusal(strategy) is not None else rival.loss(strategy))
        return rival.held

    return method


def one_knob_at_a_time(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
    """From the plain baseline: all values of a knob, keep the best, the next knob; again until nothing gets better."""
    rival, space = _Rival(recorded, budget_s), recorded.space
    here = baseline(space.global_batch)
    rival.loss(here)
    knobs = [knob for knob, values in space.values.items() if len(values) > 1]
    random.Random(seed).shuffle(knobs)
    while not rival.is_over:
        before = here
        for knob in knobs:
            for value in space.values[knob]:
                near = space.strategy({**space.params(here), knob: value})
                if space.refusal(near) is None and not rival.is_over:
                    rival.loss(near)
            here = rival.held[-1].strategy if rival.held else here
        if here == before:
            break
    return rival.held


def guess_then_batch_size(recorded: Recorded, seed: int, budget_s: float) -> list[Held]:
    """What people do with a batch-size finder: write down what should be fast, then have the micro batch doubled while
    it fits. The fastest of those, not the largest, is held."""
    rival, space, guess = _Rival(recorded, budget_s), recorded.space, _guess(recorded)
    if space.refusal(guess) is None:
        rival.loss(guess)
    for micro_batch in space.values["micro_batch"]:
        strategy = space.strategy({**space.params(guess), "micro_batch": micro_batch})
        if space.refusal(strategy) is None and (rival.is_over or not math.isfinite(rival.loss(strategy))):
            break
    return rival.held


def _guess(recorded: Recorded) -> Strategy:
    hardware = recorded.grid.header.hardware
    return expert_guess(recorded.space, hardware, backends.get(hardware.device.kind))


METHODS: dict[str, Callable[..., list[Held]]] = {
    "autotune": ours,
    "autotune until settled": ours_until_settled,
    "Optuna TPE": _optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "Optuna TPE helped": _optuna(lambda seed: optuna.samplers.TPESampler(seed=seed), is_helped=True),
    "Optuna TPE multivariate group": _optuna(
        lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
    ),
    "Optuna GP": _optuna(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "random": _in_order(_shuffled),
    "grid order": _in_order(_grid_order),
    "one knob at a time": one_knob_at_a_time,
    "guess then batch size": guess_then_batch_size,
}
FEWER_SEEDS = {"Optuna GP": 10}
"""Methods whose own computation takes too long for all seeds."""
