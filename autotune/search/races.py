"""Which settings race against which, for how long: a heat of the contenders, then the finalists and the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from autotune.measurement import Trial
from autotune.search import proof, turns
from autotune.search.history import NUM_FINALISTS, History
from autotune.search.proof import Proof
from autotune.search.settings import Observer
from autotune.search.standings import MIN_RACED, Standings
from autotune.search.task import Task
from autotune.search.trials import Trials
from autotune.search.turns import Entrant, Race
from autotune.trial.worker import Soak

FIELD, NUM_THROUGH = 6, 2
"""So many enter the heat at most, and so many of them the race."""
FINALS_SHARE, LEAST_SHARE = 0.3, 0.15
"""At most this share of the budget goes to heat and race, and at least so much is left for them."""
FINALS_S = 60.0
"""So long are they at most where there is no budget, and no longer than the trials took."""
SOAK_SHARE = 0.1
"""At most this share of the budget goes to the soak: a search of a minute would else soak for half of another."""
MIN_LAST_TEST_S = 120.0
"""However little is left of the budget, races and last tests may be so slow before they count as hanging."""


class Races:
    """The races of a search. What they show is in its standings."""

    def __init__(self, task: Task, observer: Observer, trials: Trials, standings: Standings) -> None:
        self._task, self._observer, self._trials, self._standings = task, observer, trials, standings
        self._history: History = trials.history
        self.has_reference = False
        """Whether the baseline's losses for the last test are known."""
        self.lacked_time = False
        """Whether what was to be raced last was not, as the budget had no time for it."""

    def left_s(self) -> float:
        """Of the budget, but for the last test."""
        budget_s = self._task.settings.budget_s
        return math.inf if budget_s is None else budget_s - self._trials.elapsed_s() - self._last_test_s()

    def reserved_s(self) -> float:
        """What the trials have to leave of the budget."""
        if self._history.reference_step_s is None:
            return 0.0
        share_s = self._share_s()
        field = self._field(share_s)
        shortest_s = self._heat_s(field) if field else self.shortest_s(self._entrants(share_s))
        least_s = LEAST_SHARE * (self._task.settings.budget_s or 0.0)
        return max(shortest_s, least_s) + self._last_test_s()

    def finalists(self) -> list[Trial]:
        """Who enters the race. Where time and memory allow, they come out of a heat: a larger field, raced for a few
        rounds without the plain baseline, which would take most of the time."""
        share_s, left_s = self._share_s(), self.left_s()
        enough_s, share_s = max(share_s, left_s), min(share_s, left_s)
        field = self._field(share_s)
        if not field:
            return self._entrants(enough_s)
        heat = self.race_of(field)
        spare_s = share_s - self._heat_s(field)
        heat_s = self.shortest_s(field, with_baseline=False) + spare_s / 2
        self._run(heat, heat_s, f"heat: the best {len(field)} in turns")
        rivals = [final for final in heat.finals() if self._history.may_win(final.trial, final.measurement)]
        through = [final.trial for final in self._standings.in_order(rivals)][:NUM_THROUGH]
        return through or self._entrants(enough_s)

    def run(self, finalists: Sequence[Trial], *, in_any_case: bool = False) -> None:
        """The finalists against the baseline, which is the first entrant; not where the time is up, unless it is
        wanted in any case. Where the time is what has ended the trials, they get all that is left of it."""
        reference = self._history.reference
        entrants = [trial for trial in finalists if trial is not reference]
        share_s = self._share_s()
        left_s = share_s if in_any_case else self.left_s()
        if self._history.reference_step_s is None:
            return
        self.lacked_time = self.shortest_s(entrants) > left_s + share_s
        if self.lacked_time:
            return
        while entrants and not self._fit_together([reference, *entrants]):
            entrants.remove(max(entrants, key=_peak_bytes))
        if not entrants:
            return
        race, earlier = self.race_of([reference, *entrants]), self._standings.race
        self._standings.race = race
        try:
            enough_s = left_s if self._trials.is_time_up and not in_any_case else min(share_s, left_s)
            self._run(race, enough_s, f"final: the best {len(entrants)} and the baseline in turns")
        finally:
            if race.num_rounds < MIN_RACED and earlier is not None:  # interrupted
                self._standings.race = earlier

    def shortest_s(self, field: Sequence[Trial], *, with_baseline: bool = True) -> float:
        """Of their race, at the speed that the device has now."""
        step_s = self._step_s if with_baseline else 0.0
        return turns.shortest_s(step_s, field, self._task.backend.name, self._history.slowdown_since)

    def _entrants(self, enough_s: float) -> list[Trial]:
        """Who races the baseline where there is no heat: as many, the best first, as their shortest race allows in so
        many seconds, one at least; all where each is the best for an aim of its own."""
        found = [trial for trial in self._history.finalists() if trial is not self._history.reference]
        while len(found) > 1 and len(self._task.sought) == 1 and self.shortest_s(found) > enough_s:
            found.pop()
        return found

    def race_of(self, trials: Sequence[Trial]) -> Race:
        """A race of these that nothing has been run of."""
        return Race(
            [
                Entrant(
                    trial=trial,
                    job=self._task.job(trial.strategy),
                    silence_s=self._trials.silence_s(trial.strategy),
                    compiles=self._task.compiles(trial.strategy),
                )
                for trial in trials
            ],
            timeout_s=max(MIN_LAST_TEST_S, self._trials.timeout_s(trials[-1].strategy)),
            memory_limit_bytes=self._task.machine_limit_bytes,
            pulse=self._trials.pulse,
        )

    def _run(self, race: Race, enough_s: float, name: str) -> None:
        """Those that fail in it are not to win."""
        self._observer.on_race(name, 0)
        self._standings.races.append(race)
        try:
            race.run(enough_s=enough_s, on_round=lambda done: self._observer.on_race(name, done))
        finally:  # an interrupt, too, must not let a failed one win
            for number, end in race.failures.items():
                self._history.failures[number] = Proof(outcome=end.outcome, reason=f"in the final: {end.reason}")
        if race.failures:
            self._trials.reconsider()

    def _last_test_s(self) -> float:
        best, compiling_s = self._history.best(), 0.0
        if best and best.measurement and self._task.compiles(best.strategy):
            compiling_s = turns.cached_s(best.measurement)
        return compiling_s + proof.needed_s(self._step_s, self.soak, has_reference=self.has_reference)

    @property
    def soak(self) -> Soak:
        """Of the winner: in full where a memory budget is to be held, as memory grows with the steps."""
        settings = self._task.settings
        if settings.budget_s is None or settings.memory_budget_bytes is not None:
            return proof.LONGEST_SOAK
        enough_s = min(proof.LONGEST_SOAK.enough_s, SOAK_SHARE * settings.budget_s)
        return msgspec.structs.replace(proof.LONGEST_SOAK, enough_s=enough_s)

    @property
    def _step_s(self) -> float:
        """Seconds of the plain baseline's step now."""
        history = self._history
        return (history.reference_step_s or 0.0) * history.slowdown_since(history.reference)

    def _share_s(self) -> float:
        """Of heat and race together, however much is left."""
        budget_s = self._task.settings.budget_s
        return min(FINALS_S, self._trials.elapsed_s()) if budget_s is None else FINALS_SHARE * budget_s

    def _field(self, share_s: float) -> list[Trial]:
        """Who enters a heat that leaves time for the race; nobody where the race itself could hold as many."""
        field = self._history.finalists(FIELD) if len(self._task.sought) == 1 else []
        while field and not self._fit_together(field):
            field.remove(max(field, key=_peak_bytes))
        while len(field) > NUM_FINALISTS and self._heat_s(field) > share_s:
            field.pop()
        return field if len(field) > NUM_FINALISTS and self._history.reference not in field else []

    def _heat_s(self, field: Sequence[Trial]) -> float:
        """The shortest heat, and the shortest race after it."""
        return self.shortest_s(field, with_baseline=False) + self.shortest_s(field[:NUM_THROUGH])

    def _fit_together(self, trials: Sequence[Trial]) -> bool:
        measured = [trial.measurement for trial in trials if trial.measurement]
        if turns.is_alone(self._task.backend.name, [found.step_ms / 1000 for found in measured]):
            return True
        return sum(map(_peak_bytes, trials)) + len(trials) * self._task.context_bytes < self._task.machine_limit_bytes


def _peak_bytes(trial: Trial) -> int:
    return trial.measurement.peak_memory_bytes if trial.measurement else 0
