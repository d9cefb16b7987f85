"""What one search is about, and the limits that follow from it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import msgspec

from autotune import __version__
from autotune.backends.base import Backend
from autotune.checks.compute import THREADS_SPEED
from autotune.flops import Flops, flops_of, matmul_capability
from autotune.measurement import Measurement, Trial
from autotune.passes import Way, num_samples
from autotune.probe import Hardware
from autotune.search.guess import attention_ms, expert_guess
from autotune.search.objective import AIMS, FASTEST, Aim, PlannedRun
from autotune.search.settings import Settings
from autotune.search.space import Space, build_space
from autotune.search.surrogate import Prior, prior_of
from autotune.search.work import loaded, tokens_of, work_of
from autotune.strategy import SPARSE, Attention, Padding, Precision, Strategy
from autotune.trial import pulse
from autotune.trial.worker import Job, TimeWays
from autotune.workloads.base import Workload, WorkloadRef

LONG_RUN_SHARE = 0.9
"""Host memory is held to this share of the user's budget: in an epoch the C library's heap peaks up to a tenth higher
than in the minute of a trial and a soak (docs/LOG.md 2026-11-22)."""
NO_WAIT = 0.01
"""Share of a step that counts as none of it: loader processes could only take cores away."""
MUCH_WAIT = 0.1
"""Share of the baseline's step from which on a guess has loader processes: whether a card had other work meanwhile,
their trial tells."""
NEARLY = 1.1
"""So many times the least that is expected is as good, with fewer loader processes."""
CONTEXT_BYTES = 600 * 2**20
"""An accelerator's context, which no allocator counts: some 500 MB on CUDA."""
FREE_MEMORY_SHARE = 0.9
"""Without a budget of the user's, trials may take this much of the memory that is free when the search starts."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A workload to be searched on a device, as the user wants it."""

    ref: WorkloadRef
    workload: Workload
    hardware: Hardware
    backend: Backend
    settings: Settings
    known_good: Strategy | None = None
    """What was the best on the nearest device or workload."""

    @functools.cached_property
    def planned(self) -> PlannedRun:
        """The training that the search prepares."""
        return PlannedRun(
            num_train=self.workload.num_train,
            num_test=self.workload.num_test,
            epochs=self.settings.epochs or self.workload.recipe.epochs,
        )

    @functools.cached_property
    def space(self) -> Space:
        """What may be tried."""
        return build_space(
            self.hardware,
            self.backend,
            self.workload,
            includes_slow=self.settings.includes_slow,
            allows_approximate=self.settings.allows_approximate,
            is_deterministic=self.settings.is_deterministic,
            without=self.settings.without,
        )

    @property
    def sought(self) -> tuple[Aim, ...]:
        """What a setting is to be found for, the profile's own first."""
        return AIMS[self.settings.objective]

    @property
    def aims(self) -> tuple[Aim, ...]:
        """What trials are made for, in turns: what is sought, and what has to be known besides."""
        return self.sought if self.settings.min_speed is None else (*self.sought, FASTEST)

    @property
    def baseline(self) -> Strategy:
        """The plain setting that everything is compared with."""
        return msgspec.structs.replace(self.workload.baseline, deterministic=self.settings.is_deterministic)

    @property
    def machine_limit_bytes(self) -> int:
        """What any process of the search may take."""
        return int(FREE_MEMORY_SHARE * self.hardware.device.memory_free_bytes)

    @property
    def memory_limit_bytes(self) -> int:
        """What a setting that is to win may take."""
        budget_bytes = self.settings.memory_budget_bytes
        if budget_bytes is None:
            return self.machine_limit_bytes
        return int(LONG_RUN_SHARE * budget_bytes) if self.backend.is_host_memory else budget_bytes

    @functools.cached_property
    def flops(self) -> Flops:
        """What training a sample takes by the model's own arithmetic."""
        return flops_of(self.workload)

    @functools.cached_property
    def matmul_flops(self) -> dict[Precision, float]:
        """The device's rate of matrix products, by precision, as far as the probe measured it."""
        found = {p: self.hardware.capability(matmul_capability(p)).measured for p in get_args(Precision)}
        return {p: 1e9 * measured["gflop_per_s"] for p, measured in found.items() if "gflop_per_s" in measured}

    @functools.cached_property
    def tokens(self) -> Callable[[Padding, int], float]:
        """Tokens that a sample takes on average under a padding and a micro batch, the padding's own included."""
        workload = self.workload
        return functools.cache(
            tokens_of(workload.train.lengths, workload.recipe.global_batch, max_tokens=workload.max_tokens)
        )

    @functools.cached_property
    def attention_slowdown(self) -> Callable[[Attention, Precision], float]:
        """How many times as long as the fastest of that precision the probe found a kernel to take on padded batches;
        1, as if it were the fastest, where it has no figure that says so. It has none of windows, as it tries but one
        that leaves nothing out."""

        @functools.cache
        def slowdown(attention: Attention, precision: Precision) -> float:
            def kernel_ms(name: Attention) -> float:
                kernel = self.backend.same_kernel.get(name, name)
                is_known = name not in SPARSE
                return attention_ms(self.hardware, kernel, precision, is_masked=True) if is_known else math.inf

            own_ms = kernel_ms(attention)
            fastest_ms = min(own_ms, *map(kernel_ms, self.space.values["attention"]))
            return own_ms / fastest_ms if math.isfinite(own_ms) else 1.0

        return slowdown

    def prior(self, aim: Aim, loaded_alone: Trial | None = None) -> Prior:
        """What is expected of settings before any is tried: that their time, or energy, goes by their work; and by how
        long they wait for data, where a trial without loader processes tells."""

        def computed(strategy: Strategy) -> float:
            measured = self.hardware.capability(f"threads.{strategy.threads}").measured
            return work_of(
                strategy,
                self.tokens(strategy.padding, strategy.micro_batch),
                threads_speed=measured.get(THREADS_SPEED, 1.0),
                attention_slowdown=self.attention_slowdown(strategy.attention, strategy.precision),
            )

        known = loaded_alone.measurement if loaded_alone is not None else None
        if loaded_alone is None or known is None or known.loader_wait < NO_WAIT:
            return self._prior(aim, computed)
        wait, scale = known.loader_wait, (1 - known.loader_wait) / computed(loaded_alone.strategy)
        return self._prior(aim, lambda strategy: self.loaded(strategy, scale * computed(strategy), wait))

    def loaded(self, strategy: Strategy, computed: float, read: float) -> float:
        """What a step takes by a strategy's loader processes that computes and reads for so long by itself."""
        num_cores, reading_busy = self.hardware.device.num_cores, self.workload.reading_busy
        num_busy = strategy.workers * reading_busy + (strategy.threads or num_cores)
        is_crowded = self.backend.is_host_memory and num_busy > num_cores
        return loaded(computed, read, strategy.workers, reading_busy if is_crowded else 0.0)

    def timed_ways(self, baseline: Measurement) -> TimeWays | None:
        """Precisions and memory formats that a few steps of a user's own model are timed in before the first guess: on
        a CPU, where the probe's products say less."""
        if not self.backend.is_host_memory or self.workload.split is None:
            return None
        precisions = [p for p in self.space.values["precision"] if p in ("fp32", "bf16", "fp16")]
        ways = tuple(itertools.product(precisions, self.space.values["memory_format"]))
        count = num_samples(_computed_s(baseline), len(ways), self.workload.recipe.global_batch)
        return TimeWays(ways=ways, num_samples=count) if len(ways) > 1 and count else None

    def guess(self, baseline: Measurement, seconds: Mapping[Way, float] | None = None) -> Strategy:
        """The expert's, who has seen the plain baseline, and the ``seconds`` of what was timed before."""
        is_small = FASTEST not in self.aims or not self.fits(baseline)  # small micro batches save memory
        sample_s = math.inf if is_small else _computed_s(baseline)
        guess = expert_guess(self.space, self.hardware, self.backend, sample_s=sample_s, seconds=seconds)
        return self.read_ahead(guess, baseline)

    def read_ahead(self, guess: Strategy, baseline: Measurement) -> Strategy:
        """A guess with loader processes, where the plain baseline waited for data for a good part of its time: the
        fewest that make it nearly as fast as any number, if it computes as much faster as its products are, and no
        more than there are cores."""
        read = baseline.loader_wait
        if read < MUCH_WAIT or FASTEST not in self.aims:
            return guess
        rates = [self.hardware.capability(matmul_capability(s.precision)).measured for s in (self.baseline, guess)]
        before, after = (rate.get("gflop_per_s", math.nan) for rate in rates)
        computed = (1 - read) * (before / after if before < after else 1.0)
        num_cores = self.hardware.device.num_cores
        counts = [count for count in self.space.values["workers"] if count <= num_cores]
        ways = [msgspec.structs.replace(guess, workers=count) for count in counts]
        expected = {way: self.loaded(way, computed, read) for way in ways if self.space.refusal(way) is None}
        least = NEARLY * min(expected.values(), default=0.0)
        return next((way for way, step in expected.items() if step <= least), guess)

    def _prior(self, aim: Aim, work: Callable[[Strategy], float]) -> Prior:
        return prior_of(aim.memory, work)._replace(same_kernel=self.backend.same_kernel)

    @property
    def context_bytes(self) -> int:
        """What a process takes of the device beside what is counted."""
        return 0 if self.backend.is_host_memory else CONTEXT_BYTES

    def compiles(self, strategy: Strategy) -> bool:
        """Whether something is compiled before it is fast, which may take a minute without a word: what
        ``torch.compile`` is asked for, and kernels that come so."""
        has_compiled_kernel = strategy.attention in (*SPARSE, "flash_attn") and not self.backend.is_host_memory
        return strategy.compile != "none" or has_compiled_kernel

    def fits(self, measurement: Measurement) -> bool:
        """Whether the peak is within the limit."""
        return measurement.peak_memory_bytes <= self.memory_limit_bytes

    def job(self, strategy: Strategy) -> Job:
        """The baseline is what others are compared with, so it may go over the user's budget; it cannot win then."""
        return Job(
            workload=self.ref,
            strategy=strategy,
            backend=self.backend.name,
            memory_limit_bytes=None if strategy == self.baseline else self.settings.memory_budget_bytes,
            seed=self.settings.seed,
            usual_cost=self.flops.cost,
        )

    def identity(self) -> dict[str, Any]:
        """All that the figures of the search depend on; how long it may take is not among it."""
        return {
            "autotune": __version__,
            "device": self.hardware.device.fingerprint,
            "num_cores": self.hardware.device.num_cores,
            "versions": self.hardware.device.versions,
            "pulse": pulse.WORK,
            "workload": msgspec.to_builtins(msgspec.structs.replace(self.ref, known=None)),
            "reading": (self.workload.is_padded_by_batch, self.workload.reading_busy),
            "recipe": msgspec.to_builtins(self.workload.recipe),
            "planned": msgspec.to_builtins(self.planned),
            "space": [list(map(list, self.space.values.items())), sorted(self.space.pairs)],
            "objective": self.settings.objective,
            "min_speed": self.settings.min_speed,
            "memory_budget_bytes": self.settings.memory_budget_bytes,
            "seed": self.settings.seed,
        }


def _computed_s(measurement: Measurement) -> float:
    """Of a sample, without the wait for data."""
    return (1 - min(measurement.loader_wait, 0.99)) / measurement.samples_per_s
