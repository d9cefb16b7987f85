"""Which strategy to try next: what is expected to gain most for the time that trying it takes.

Optuna's study keeps what was asked and told, so that its storage, its dashboard and its plots serve; what is asked for
is chosen here, by the surrogate, among the neighbours of the best and a few at random.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from autotune.search.space import Space
from autotune.search.surrogate import ORDERED, PRIOR_OF_TIME, Known, Prior, Surrogate, expected_gain
from autotune.strategy import Strategy

if TYPE_CHECKING:
    import optuna

_NUM_NEAR = 3
"""The neighbours of so many of the best are candidates, and the neighbours of the best one's."""
_NUM_RANDOM = 300
"""So many draws from the whole space are candidates besides."""


class Proposal(NamedTuple):
    """What to try next."""

    strategy: Strategy
    gain: float | None = None
    """By what share of its time the best so far is expected to be beaten; None where it was enqueued or drawn."""
    cost_s: float = 0.0
    """What trying it is expected to take."""


class Sampler:
    """Proposes strategies; ``tell`` must follow every ``ask`` and every ``take``."""

    def __init__(
        self,
        space: Space,
        study: optuna.Study,
        *,
        seed: int,
        seen: Iterable[Strategy] = (),
        chances: Callable[[Sequence[Strategy]], Sequence[float]] = lambda strategies: [1.0] * len(strategies),
    ) -> None:
        """``seen`` was tried before. ``chances`` says how likely strategies are to run at all; one that has none is not
        proposed, but where it is enqueued."""
        import optuna

        self._space = space
        self._seen: set[Strategy] = set(seen)
        self._random = random.Random(seed + len(self._seen))  # a search that goes on draws anew
        self._study = study
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            knob: optuna.distributions.CategoricalDistribution(values) for knob, values in space.values.items()
        }
        self._chances = chances
        self._queue: list[Strategy] = []
        self._asked: optuna.trial.Trial | None = None

    @property
    def asked(self) -> optuna.trial.Trial:
        """Optuna's trial for what was asked for last."""
        assert self._asked is not None
        return self._asked

    def enqueue(self, strategy: Strategy, *, again: bool = False) -> None:
        """Has this strategy asked for before any other, unless it was tried already; ``again`` even then."""
        if again:
            self._seen.discard(strategy)
        self._queue.insert(0 if again else len(self._queue), strategy)

    def ask(
        self, known: Sequence[Known] = (), cost_s: Callable[[Strategy, float], float] = lambda strategy, loss: 1.0
    ) -> Proposal | None:
        """What is proposed, taken."""
        proposal = self.propose(known, cost_s)
        return None if proposal is None else self.take(proposal)

    def propose(
        self,
        known: Sequence[Known],
        cost_s: Callable[[Strategy, float], float],
        prior: Prior = PRIOR_OF_TIME,
        left_s: float = math.inf,
    ) -> Proposal | None:
        """A strategy not taken before; None when all there are have been, or none can be tried in ``left_s``.

        What is queued comes first, however long it takes. ``cost_s`` says what trying a strategy of an expected loss
        takes.
        """
        while self._queue:
            strategy = self._queue.pop(0)
            if strategy not in self._seen:
                return Proposal(strategy)
        likely = self._candidates(known)
        if not likely:
            untried = self._untried()
            return Proposal(self._random.choice(untried)) if untried else None
        candidates = list(likely)
        if not known:
            return Proposal(candidates[-1])
        surrogate = Surrogate(self._space.values, known, prior)
        best_log = float(surrogate.predict([one.strategy for one in _contenders(known)])[0].min())
        mean, deviation = surrogate.predict(candidates)
        gains = expected_gain(best_log, mean, deviation) * np.array([*likely.values()])
        losses = np.exp(mean).tolist()
        costs_s = np.array([cost_s(strategy, loss) for strategy, loss in zip(candidates, losses, strict=True)])
        chosen = int(np.argmax(np.where(costs_s <= left_s, gains / costs_s, -1.0)))
        if costs_s[chosen] > left_s:
            return None
        return Proposal(candidates[chosen], float(gains[chosen]), float(costs_s[chosen]))

    def tell(self, loss: float | None) -> None:
        """The last asked strategy's loss; None for one that cannot be used."""
        import optuna

        if loss is None:
            self._study.tell(self.asked, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(self.asked, loss)
        self._asked = None

    def _candidates(self, known: Sequence[Known]) -> dict[Strategy, float]:
        """Each with its chance to run."""
        best = [one.strategy for one in sorted(_contenders(known), key=lambda one: one.loss)[:_NUM_NEAR]]
        near = [neighbour for strategy in best for neighbour in self._space.neighbours(strategy)]
        around = self._space.neighbours(best[0]) if best else []
        further = [neighbour for strategy in around for neighbour in self._space.neighbours(strategy)]
        drawn = [
            self._space.strategy({knob: self._random.choice(values) for knob, values in self._space.values.items()})
            for _ in range(_NUM_RANDOM)
        ]
        found = dict.fromkeys([*near, *further, *(one for one in drawn if not self._space.refusal(one))])
        reach = {knob: self._reach(knob, known) for knob in ORDERED if knob != "workers"}  # of which waiting tells
        near_known = [one for one in found if all(getattr(one, knob) in values for knob, values in reach.items())]
        return self._likely(near_known)

    def _reach(self, knob: str, known: Sequence[Known]) -> set[Any]:
        """The values of an ordered knob that are known, and the next ones: no leaps into the dark."""
        values = self._space.values[knob]
        places = {values.index(getattr(one.strategy, knob)) for one in known} or set(range(len(values)))
        return {value for place, value in enumerate(values) if {place - 1, place, place + 1} & places}

    def take(self, proposal: Proposal) -> Proposal:
        """Asks Optuna's study for what was proposed; ``tell`` must follow."""
        self._study.enqueue_trial(self._space.params(proposal.strategy))
        self._asked = self._study.ask(self._distributions)
        self._seen.add(proposal.strategy)
        return proposal

    def _untried(self) -> list[Strategy]:
        knobs, values = zip(*self._space.values.items(), strict=True)
        combinations = itertools.product(*values)
        everything = (self._space.strategy(dict(zip(knobs, chosen, strict=True))) for chosen in combinations)
        return list(self._likely([strategy for strategy in everything if not self._space.refusal(strategy)]))

    def _likely(self, strategies: Sequence[Strategy]) -> dict[Strategy, float]:
        """Those not seen that have a chance."""
        untried = [strategy for strategy in strategies if strategy not in self._seen]
        found = zip(untried, self._chances(untried), strict=True)
        return {strategy: chance for strategy, chance in found if chance > 0}


def _contenders(known: Sequence[Known]) -> Sequence[Known]:
    """Those that may win; where none may, all."""
    return [one for one in known if one.may_win] or known
