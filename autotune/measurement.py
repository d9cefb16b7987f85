"""What a trial found: how it ended and, where it ran, its figures. Records only; measuring is timing.py's."""

from typing import Literal, Self

import msgspec

from autotune.strategy import Strategy

Outcome = Literal["ok", "pruned", "oom", "timeout", "crashed", "diverged", "invalid"]


class Lap(msgspec.Struct, frozen=True, kw_only=True):
    """Optimizer steps timed together, the device synchronised before and after.

    One step where a step takes long; as many as fill a tenth of a second where steps are short.
    """

    seconds: float
    """Wall time, loading and transfer included, without the pauses for the device's pulse."""
    wait_s: float
    """The part of it that was spent waiting for the loader."""
    num_steps: int
    num_samples: int
    num_tokens: int
    """Real tokens, padding not counted."""
    padded_tokens: int
    """Tokens computed."""
    padded_squares: int
    """Padded width squared, summed over the samples: attention's cost grows with it."""
    losses: tuple[float, ...]
    """Mean loss of each step."""
    joules: float | None = None
    """What the device drew; None where it has no counter."""
    num_compiled: int = 0
    """Graphs that torch.compile compiled meanwhile."""
    pulse_s: float | None = None
    """Seconds that a fixed piece of work took meanwhile: the device's own speed then."""


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How fast and how big one Strategy is on one Workload, projected from the timed steps to a whole epoch."""

    samples_per_s: float
    """Real samples trained per second, over an epoch with the workload's own lengths."""
    tokens_per_s: float
    """Real tokens per second, padding not counted."""
    step_ms: float
    """Mean optimizer step over an epoch, in milliseconds."""
    eval_samples_per_s: float
    """Samples evaluated per second."""
    warm_up_s: float
    """Seconds that the first steps took beyond what they take later: compilation, caches, autotuning."""
    loader_wait: float
    """Share of the step time spent waiting for data, 0 to 1."""
    peak_memory_bytes: int
    """Peak device memory of training and evaluation, the longest batch included."""
    joules_per_sample: float | None = None
    """What the device drew while it trained, per real sample; None where it has no counter."""

    def run_s(self, *, num_train: int, num_test: int, epochs: int) -> float:
        """Projected wall time of a run in seconds: warm-up once, then training and one evaluation an epoch."""
        return self.warm_up_s + epochs * (num_train / self.samples_per_s + num_test / self.eval_samples_per_s)


class Measurement(Rates, frozen=True, kw_only=True):
    """A trial's figures with the samples they were made from."""

    epoch_s: tuple[float, ...]
    """Seconds of a training epoch as projected from each timed lap alone: how much the figures spread."""
    losses: tuple[float, ...]
    """Mean loss of each step, warm-up included."""
    num_recompiled: int = 0
    """Graphs that were compiled when the warm-up was over; the laps in which they were count as warm-up, unless all
    are such laps."""
    is_from_cache: bool = False
    """Whether all that was compiled was found in the compiler's cache: the warm-up is that of a second start."""
    num_graph_breaks: int = 0
    """Reasons for which the compiler had to leave a part of the model to Python."""
    graph_break: str = ""
    """The first of them."""
    launched_evaluation: str = ""
    """Why the evaluation was not recorded as the steps were."""
    pulse_s: float | None = None
    """The device's own speed that the rates are for: laps from slower and faster moments are moved to it."""

    @property
    def remarks(self) -> str:
        """What a person should know of how it ran; nothing where it went well."""
        words = []
        if self.num_recompiled:
            words.append(f"compiled {self.num_recompiled} more graphs while timed")
        if self.num_graph_breaks:
            words.append(f"{self.num_graph_breaks} graph breaks, the first: {self.graph_break}")
        if self.launched_evaluation:
            words.append(f"the evaluation is not recorded: {self.launched_evaluation}")
        return "; ".join(words)

    def measured_again(self, later: Self) -> Self:
        """The later figures of the same strategy, but for the warm-up, which later finds compiled code at hand, and the
        peak memory, which is the larger."""
        return msgspec.structs.replace(
            later,
            warm_up_s=max(self.warm_up_s, later.warm_up_s),
            peak_memory_bytes=max(self.peak_memory_bytes, later.peak_memory_bytes),
            is_from_cache=self.is_from_cache and later.is_from_cache,
        )


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One Strategy tried: its outcome is data, whatever happened."""

    number: int
    strategy: Strategy
    outcome: Outcome
    reason: str = ""
    """Why the outcome is not ``ok``; what was special where it is."""
    measurement: Measurement | None = None
    """Present when the outcome is ok, and where a finished trial went over the memory budget."""
    samples_per_s: float | None = None
    """The measurement's; a rough estimate from the first steps where the trial was pruned."""
    wall_s: float = 0.0
    """What the trial cost the search."""
    others_cores: float | None = None
    """Of the cores that it might use, those that other work took while a finished trial was timed."""
    pulse_s: float | None = None
    """Seconds that a fixed piece of work took: the device's own speed then."""
    has_beats: bool = False
    """Whether that was taken again and again while it was timed, not before and after."""


class Interval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A ratio with its 95 % interval."""

    ratio: float
    low: float
    high: float
