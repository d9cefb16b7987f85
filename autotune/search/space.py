"""What a search may try on this hardware: the values of every knob, and the reason for each value left out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar, get_args

import msgspec

from autotune.backends.base import Backend
from autotune.backends.cpu import thread_counts
from autotune.checks.kernels import UNMASKED_MS
from autotune.errors import UsageError
from autotune.graphs import unrecorded_optimizer, unrecorded_schedule
from autotune.models.attention import SDPA_KERNELS, WHOLE_ROW
from autotune.probe import Hardware
from autotune.strategy import (
    APPROXIMATE,
    PREFETCH,
    Allocator,
    Attention,
    Checkpoint,
    Compile,
    CompileScope,
    Graphs,
    MemoryFormat,
    Optimizer,
    Padding,
    Precision,
    Strategy,
)
from autotune.workloads.base import Workload

T = TypeVar("T")

PREFETCHES = (PREFETCH, 8)
"""Batches that each loader process has ready."""
OTHER_DEVICE = "not for this kind of device"
CHANGES = "changes what is trained: --allow-approximate"
WORKERS = (0, 1, 2, 4, 8, 16)
"""Loader processes; fewer where there are fewer cores for them."""

# Autocast and the kernels see 16-bit tensors; tf32 is fp32 storage, so its kernels are fp32's.
ATTENTION_DTYPE: dict[Precision, str] = {
    "fp32": "fp32",
    "tf32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "bf16_weights": "bf16",
    "fp8": "bf16",
}
_NEEDS_BLOCKS: dict[Checkpoint, int] = {
    "none": 0,
    "memory_budget": 0,
    "selective": 1,
    "every_block": 1,
    "every_2nd": 2,
    "every_4th": 3,
}


_COUPLED = ("micro_batch", "compile", "compile_scope", "checkpoint", "workers", "prefetch", "padding", "graphs")
"""Knobs of which one's value may rule out another's, besides attention and precision."""


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """The values worth trying for each knob, in order of plainness; the knobs that pay most often come first."""

    global_batch: int
    values: dict[str, tuple[Any, ...]]
    """By knob; accumulation is not among them: it follows from the micro batch."""
    left_out: dict[str, str]
    """``knob=value`` to the reason it is not tried."""
    pairs: frozenset[tuple[str, str]]
    """Attention and precision that run together."""
    whole_rows: frozenset[Precision] = frozenset()
    """In which one kernel of torch's takes all sequences of a packed row, so that the row can be compiled."""
    is_masked: bool = True
    """Whether attention is told which tokens are padding."""

    def strategy(self, params: dict[str, Any]) -> Strategy:
        """The strategy with these values; accumulation fills the global batch."""
        accumulation = self.global_batch // params["micro_batch"]
        strategy: Strategy = msgspec.convert({**params, "accumulation": accumulation}, Strategy)
        return strategy

    def params(self, strategy: Strategy) -> dict[str, Any]:
        """A strategy as the sampler's parameters."""
        return {knob: getattr(strategy, knob) for knob in self.values}

    def nearest(self, strategy: Strategy, instead: Strategy) -> Strategy:
        """A strategy of another device or workload, with the values of a second one where its own are not tried here.
        What comes of it may still be refused."""
        values = self.params(strategy)
        for knob, known in self.values.items():
            if knob == "micro_batch":
                values[knob] = max((size for size in known if size <= values[knob]), default=min(known))
            elif values[knob] not in known:
                values[knob] = getattr(instead, knob)
        if values.get("graphs") == "step" and self.strategy(values).unrecorded:
            values["graphs"] = "none"
        for knob in ("prefetch", "compile_scope", "checkpoint", "padding", "attention"):
            if self.refusal(self.strategy(values)) is None:
                break
            values[knob] = self.values[knob][0]
        return self.strategy(values)

    def refusal(self, strategy: Strategy) -> str | None:
        """Why this combination cannot run here; None where it can."""
        if (strategy.attention, strategy.precision) not in self.pairs:
            return f"attention {strategy.attention} does not run well in {strategy.precision} here"
        if (reason := next(iter(strategy.idle.values()), None)) is not None:
            return reason
        is_whole = strategy.precision in self.whole_rows and strategy.attention in WHOLE_ROW
        if strategy.graphs == "step" and (reason := strategy.unrecorded or self._asks(strategy, is_whole)):
            return reason
        if strategy.compile != "none" and strategy.padding == "packed" and not is_whole:
            return "every number of sequences would be compiled anew"
        if strategy.compiles_graphs and strategy.accumulation > 1:
            return "a CUDA graph's next replay overwrites the gradients that accumulation adds to (pytorch#169545)"
        return None

    def _asks(self, strategy: Strategy, is_whole_row: bool) -> str | None:
        """What the device would be asked in the middle of a step that is to be recorded."""
        if strategy.padding == "packed":
            return None if is_whole_row else "the device is asked for the length of each sequence in the row"
        if strategy.attention == "flash_attn" and self.is_masked:
            return "the device is asked how many tokens count"
        return None

    @property
    def size(self) -> int:
        """Combinations that may be tried."""
        coupled = [knob for knob in _COUPLED if knob in self.values]
        plain = {knob: values[0] for knob, values in self.values.items()}

        def num_allowed(attention: str, precision: str) -> int:
            fixed = plain | {"attention": attention, "precision": precision}
            chosen = itertools.product(*(self.values[knob] for knob in coupled))
            return sum(self.refusal(self.strategy(fixed | dict(zip(coupled, c, strict=True)))) is None for c in chosen)

        # pairs of one kind are refused the same
        kinds: dict[tuple[bool, bool, bool], list[tuple[str, str]]] = {}
        for attention, precision in sorted(self.pairs):
            is_whole = precision in self.whole_rows and attention in WHOLE_ROW
            kinds.setdefault((is_whole, precision == "fp16", attention == "flash_attn"), []).append(
                (attention, precision)
            )
        free = [values for knob, values in self.values.items() if knob not in (*coupled, "attention", "precision")]
        return sum(len(pairs) * num_allowed(*pairs[0]) for pairs in kinds.values()) * math.prod(map(len, free))

    def neighbours(self, strategy: Strategy) -> list[Strategy]:
        """The allowed strategies that differ in one knob, by at most one place in micro batch and threads; those of
        the knobs that pay most often first."""
        near = []
        for knob, values in self.values.items():
            here = values.index(getattr(strategy, knob))
            for index, value in enumerate(values):
                is_far = knob in ("micro_batch", "threads") and abs(index - here) > 1
                if index != here and not is_far:
                    near.append(self.strategy({**self.params(strategy), knob: value}))
        return [candidate for candidate in near if self.refusal(candidate) is None]


def build_space(
    hardware: Hardware,
    backend: Backend,
    workload: Workload,
    *,
    includes_slow: bool = False,
    allows_approximate: bool = False,
    is_deterministic: bool = False,
    without: Collection[str] = (),
) -> Space:
    """Only what the probe saw run, and run well. The baseline's own values are always in. ``without`` are knobs, and
    ``knob=value``, that the user leaves out. Raises UsageError where the baseline has such a value."""
    plain, left_out = workload.baseline, dict[str, str]()
    for knob, _, value in (option.partition("=") for option in without):
        if value == str(getattr(plain, knob)):
            raise UsageError(
                f"--without {knob}={value}: the plain baseline has it, with which everything is compared; leave others "
                f"out, or all others: --without {knob}"
            )

    def choose(knob: str, values: Iterable[T], why_not: Callable[[T], str | None] = lambda _: None) -> list[T]:
        """Of the values of a knob the baseline's, and those that nobody says anything against."""
        chosen = []
        for value in values:
            asked = next((option for option in (knob, f"{knob}={value}") if option in without), None)
            if value == getattr(plain, knob):
                chosen.append(value)
            elif reason := (f"as asked: --without {asked}" if asked else why_not(value)):
                left_out[f"{knob}={value}"] = reason
            else:
                chosen.append(value)
        return chosen

    def refused(*capabilities: str) -> str | None:
        for name in capabilities:
            found = hardware.capability(name)
            runs = found.value or (includes_slow and found.reason.startswith("too slow"))
            if not (runs or (UNMASKED_MS in found.measured and not workload.has_masked_attention)):
                return found.reason
        return None

    def no_precision(precision: Precision) -> str | None:
        if precision not in backend.precisions:
            return OTHER_DEVICE
        if precision in APPROXIMATE["precision"] and not allows_approximate:
            return CHANGES
        return refused(*_needs(precision))

    def no_attention(attention: Attention) -> str | None:
        if attention not in backend.attention:
            return hardware.capability(f"attention.{attention}.fp32").reason
        if attention not in workload.attentions:
            is_switched = len(workload.attentions) > 1
            return "the model has no switch for it" if is_switched else "the model calls no kernel of torch's"
        return CHANGES if attention in APPROXIMATE["attention"] and not allows_approximate else None

    def slow_pair(attention: Attention, precision: Precision) -> str | None:
        # what is sparse is made of torch's own choice of kernel, on CUDA of a kernel that is compiled for it
        is_sparse = attention in APPROXIMATE["attention"]
        kernel = ("window" if backend.device_type == "cuda" else "sdpa") if is_sparse else attention
        # a model that calls no kernel may have no attention at all: how fast that is says nothing of it
        is_free = len(workload.attentions) == 1 or (attention, precision) == (workload.attentions[0], "fp32")
        return None if is_free else refused(f"attention.{kernel}.{ATTENTION_DTYPE[precision]}")

    def no_graphs(graphs: Graphs) -> str | None:
        if graphs not in backend.graphs:
            return OTHER_DEVICE
        if workload.is_padded_by_batch:
            return "every width that the loader pads to would be recorded anew"
        if (own := workload.own_optimizer) is not None:
            return refused(f"graphs.{graphs}") or unrecorded_optimizer(own)
        return refused(f"graphs.{graphs}") or unrecorded_schedule(workload.recipe.schedule)

    def no_optimizer(setting: Optimizer) -> str | None:
        own = workload.own_optimizer
        if own is not None and setting not in own.defaults:
            return f"{type(own).__name__} has no such choice"
        return refused(f"optimizer.{setting}")

    def no_checkpoint(checkpoint: Checkpoint) -> str | None:
        if workload.num_blocks < _NEEDS_BLOCKS[checkpoint]:
            return f"nothing of its own to recompute with {workload.num_blocks} repeated blocks"
        if checkpoint == "memory_budget":
            return "is the compiler's, and nothing compiles here" if len(compile_modes) == 1 else None
        return workload.recompute_refusal

    def no_scope(_: CompileScope) -> str | None:
        if workload.num_blocks < 2:
            return "the model repeats no block"
        return "nothing compiles here" if len(compile_modes) == 1 else None

    def no_padding(padding: Padding) -> str | None:
        if padding == "packed" and workload.pack is None:
            return "the model does not take sequences in one row"
        if padding == "max":
            return "the loader pads to the longest of a batch"
        if len(set(map(int, workload.train.lengths))) == 1:
            is_own = workload.split is not None
            return "all samples are of one length" + (", as far as an attention_mask tells" if is_own else "")
        if padding == "buckets" and not getattr(workload.train, "is_shuffled", True):
            return "the loader gives its samples in their order (shuffle=True in it allows for this)"
        if padding == "buckets" and workload.mixing_refusal is not None:
            return workload.mixing_refusal
        return None if padding == "packed" else workload.trim_refusal

    def no_workers(count: int) -> str | None:
        if (reason := getattr(workload.train, "alone_because", None)) is not None:
            return str(reason)
        is_too_many = count * workload.reading_busy > num_cores
        return f"there are {num_cores} cores" if is_too_many else None

    num_cores, global_batch = hardware.device.num_cores, workload.recipe.global_batch
    divisors = [size for size in range(1, global_batch + 1) if global_batch % size == 0]
    precisions = choose("precision", _first(backend.precisions, get_args(Precision)), no_precision)
    pairs = set()
    for attention in choose("attention", _first(backend.attention, get_args(Attention)), no_attention):
        reasons = {precision: slow_pair(attention, precision) for precision in precisions}
        # asked of a CPU, where the model was looked at; elsewhere a trial finds out
        is_pinned = backend.device_type == "cpu" and attention in SDPA_KERNELS and None in reasons.values()
        if is_pinned and attention in workload.refused_kernels:
            left_out[f"attention={attention}"] = f"refused by this model: {workload.refused_kernels[attention]}"
            continue
        pairs |= {(attention, precision) for precision, reason in reasons.items() if reason is None}
        left_out |= {f"attention={attention} in {p}": reason for p, reason in reasons.items() if reason is not None}
    compile_modes = choose(
        "compile",
        _first(backend.compile_modes, get_args(Compile)),
        lambda mode: refused(f"compile.{mode}") if mode in backend.compile_modes else OTHER_DEVICE,
    )
    workers = choose("workers", WORKERS, no_workers)
    values: dict[str, Sequence[Any]] = {
        "micro_batch": choose("micro_batch", divisors, lambda _: workload.split_refusal),
        "attention": [a for a in backend.attention if any((a, p) in pairs for p in precisions)],
        "compile": compile_modes,
        "compile_scope": choose("compile_scope", get_args(CompileScope), no_scope),
        "graphs": choose("graphs", _first(backend.graphs, get_args(Graphs)), no_graphs),
        "allocator": choose(
            "allocator",
            _first(backend.allocators, get_args(Allocator)),
            lambda setting: refused(f"allocator.{setting}") if setting in backend.allocators else OTHER_DEVICE,
        ),
        "precision": precisions,
        "padding": choose("padding", get_args(Padding), no_padding),
        "optimizer": choose("optimizer", get_args(Optimizer), no_optimizer),
        "threads": choose(
            "threads",
            (0, *(thread_counts(num_cores) if backend.device_type == "cpu" else ())),
            lambda count: refused(f"threads.{count}"),
        ),
        "workers": workers,
        "checkpoint": choose("checkpoint", get_args(Checkpoint), no_checkpoint),
        "memory_format": choose(
            "memory_format",
            get_args(MemoryFormat),
            lambda _: refused("channels_last") if workload.has_convolutions else "the model has no convolutions",
        ),
        "prefetch": choose("prefetch", PREFETCHES, lambda _: "no loader processes" if workers == [0] else None),
        "deterministic": [is_deterministic],
    }
    known = {f"{knob}={value}" for knob, chosen in values.items() for value in chosen} | left_out.keys()
    for option in without:
        if "=" in option and option not in known:
            knob = option.partition("=")[0]
            there = ", ".join(one.partition("=")[2] for one in sorted(known) if one.startswith(f"{knob}="))
            raise UsageError(f"--without {option}: {knob} has no such value here; there are: {there}")
    return Space(
        global_batch=global_batch,
        values={knob: tuple(chosen) for knob, chosen in values.items()},
        left_out=left_out,
        pairs=frozenset(pairs),
        is_masked=workload.has_masked_attention,
        whole_rows=frozenset(p for p in precisions if hardware.allows(f"packed.{ATTENTION_DTYPE[p]}")),
    )


def _first(known: Sequence[T], values: Iterable[T]) -> tuple[T, ...]:
    """All values, those that are known first, in their order."""
    return tuple(dict.fromkeys((*known, *values)))


def _needs(precision: Precision) -> tuple[str, ...]:
    needs: dict[Precision, tuple[str, ...]] = {
        "fp32": (),
        "tf32": ("matmul.tf32",),
        "bf16": ("matmul.bf16", "autocast.bf16"),
        "fp16": ("matmul.fp16", "autocast.fp16", "grad_scaler"),
        "bf16_weights": ("matmul.bf16",),
        "fp8": ("matmul.fp8", "autocast.bf16"),
    }
    return needs[precision]
