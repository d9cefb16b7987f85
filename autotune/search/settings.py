"""What a search is asked to do, and what it tells of itself while it does."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from autotune.measurement import Trial
from autotune.search.objective import Objective
from autotune.search.proof import Proof
from autotune.search.space import Space
from autotune.strategy import Strategy
from autotune.trial.worker import Progress


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked of a search."""

    objective: Objective = "time"
    min_speed: float | None = None
    """Where memory is minimised: the share of the fastest setting's samples a second that the winner must have."""
    budget_s: float | None = 300.0
    """Wall time for the trials, the race and the last test; None where only ``max_trials`` counts."""
    max_trials: int | None = None
    memory_budget_bytes: int | None = None
    includes_slow: bool = False
    """Whether what the probe found too slow is searched all the same."""
    allows_approximate: bool = False
    """Whether values that change what is trained are searched."""
    is_deterministic: bool = False
    """Whether every trial has to use algorithms that give the same result every time."""
    without: tuple[str, ...] = ()
    """Knobs, and ``knob=value``, that are left out."""
    explains: bool | None = None
    """Whether the best is timed without each of its knobs, on top of the budget; None: where the budget has time."""
    epochs: int | None = None
    """Epochs of the planned run; the recipe's by default."""
    seed: int = 0


class Observer:
    """Hears what a search is doing, and does nothing with what a subclass does not override."""

    def on_space(self, space: Space) -> None:
        """What will be searched."""

    def on_guess(self) -> None:
        """A few steps are timed in each precision, to know what to try first."""

    def on_trial_start(self, number: int, strategy: Strategy, origin: str) -> None:
        """A trial starts; ``origin`` says who proposed it."""

    def on_progress(self, progress: Progress) -> None:
        """The trial under way got on."""

    def on_trial_end(self, trial: Trial, best: Trial | None) -> None:
        """A trial ended."""

    def on_resume(self, trials: Sequence[Trial], best: Trial | None, spent_s: float) -> None:
        """An earlier run of this search was interrupted; its trials count."""

    def on_race(self, name: str, done: int) -> None:
        """A round of a race ended; at 0 it starts. The name says who is in it."""

    def on_taking_back(self, done: int, num_knobs: int) -> None:
        """A round of the best with what differs from it by one knob ended; at 0 they start."""

    def on_reference(self) -> None:
        """The plain baseline trains the steps that the last test compares."""

    def on_rounding(self) -> None:
        """The plain baseline trains them again, its weights nudged."""

    def on_proof(self, trial: Trial) -> None:
        """The last test of a setting starts."""

    def on_cold_start(self, trial: Trial) -> None:
        """The best is started once more, with nothing compiled."""

    def on_proof_end(self, trial: Trial, proof: Proof) -> None:
        """The last test of a setting ended."""
