"""Which strategy to try next: Optuna's study, told about every trial, kept from asking twice for the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from autotune.search.space import Space
from autotune.strategy import Strategy

if TYPE_CHECKING:
    import optuna

_STARTUP_TRIALS = 5
"""Trials before the Parzen estimators take over; the baseline, the guess and its neighbours are among them."""
_TRIES = 40


class Sampler:
    """Proposes strategies; ``tell`` must follow every ``ask``."""

    def __init__(
        self,
        space: Space,
        study: optuna.Study,
        *,
        seed: int,
        seen: Iterable[Strategy] = (),
        is_hopeless: Callable[[Strategy], bool] = lambda _: False,
    ) -> None:
        """``seen`` was tried before; what ``is_hopeless`` says so of is not proposed, but where it is enqueued."""
        import optuna

        self._space = space
        self._seen: set[Strategy] = set(seen)
        seed += len(self._seen)  # a search that goes on does not propose again what it has seen
        self._random = random.Random(seed)
        self._study = study
        study.sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=_STARTUP_TRIALS, seed=seed)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            knob: optuna.distributions.CategoricalDistribution(values) for knob, values in space.values.items()
        }
        self._is_hopeless = is_hopeless
        self._queue: list[Strategy] = []
        self._turn = 0
        self._asked: optuna.trial.Trial | None = None

    @property
    def asked(self) -> optuna.trial.Trial:
        """Optuna's trial for what was asked for last."""
        assert self._asked is not None
        return self._asked

    def enqueue(self, strategy: Strategy, *, again: bool = False) -> None:
        """Has this strategy asked for before Optuna chooses again, unless it was tried already; ``again`` even then."""
        if again:
            self._seen.discard(strategy)
        self._queue.insert(0 if again else len(self._queue), strategy)

    def ask(self, near: Strategy | None = None) -> Strategy | None:
        """A strategy not asked for before; None when all there are have been.

        What is queued comes first. Then two in three are untried neighbours of ``near``, the best so far, and the rest
        are Optuna's; where it only repeats itself, anything untried.
        """
        import optuna

        while self._queue:
            strategy = self._queue.pop(0)
            if strategy not in self._seen:
                return self._take(strategy)
        neighbours = [] if near is None else self._space.neighbours(near)
        untried = [strategy for strategy in neighbours if self._may_try(strategy)]
        self._turn += 1
        if untried and self._turn % 3:
            return self._take(untried[0])
        for _ in range(_TRIES):
            trial = self._study.ask(self._distributions)
            strategy = self._space.strategy(trial.params)
            if self._may_try(strategy) and self._space.refusal(strategy) is None:
                self._seen.add(strategy)
                self._asked = trial
                return strategy
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        untried = untried or self._untried()
        return self._take(self._random.choice(untried)) if untried else None

    def tell(self, loss: float | None) -> None:
        """The last asked strategy's loss; None for one that cannot be used."""
        import optuna

        if loss is None:
            self._study.tell(self.asked, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(self.asked, loss)
        self._asked = None

    def _take(self, strategy: Strategy) -> Strategy:
        self._study.enqueue_trial(self._space.params(strategy))
        self._asked = self._study.ask(self._distributions)
        self._seen.add(strategy)
        return strategy

    def _untried(self) -> list[Strategy]:
        import itertools

        knobs, values = zip(*self._space.values.items(), strict=True)
        combinations = itertools.product(*values)
        everything = (self._space.strategy(dict(zip(knobs, chosen, strict=True))) for chosen in combinations)
        return [strategy for strategy in everything if self._may_try(strategy) and not self._space.refusal(strategy)]

    def _may_try(self, strategy: Strategy) -> bool:
        return strategy not in self._seen and not self._is_hopeless(strategy)
