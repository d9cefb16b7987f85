"""What a search may try on this hardware: the values of every knob, and the reason for each value left out."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import msgspec

from autotune.backends.base import Backend
from autotune.backends.cpu import thread_counts
from autotune.checks.kernels import UNMASKED_MS
from autotune.graphs import unrecorded_schedule
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

PREFETCHES = (PREFETCH, 8)
"""Batches that each loader process has ready."""
WORKERS = (0, 1, 2, 4, 8)
"""Loader processes; fewer where there are fewer cores."""

# Autocast and the kernels see 16-bit tensors; tf32 is fp32 storage, so its kernels are fp32's.
_ATTENTION_DTYPE: dict[Precision, str] = {
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

    def nearest(self, strategy: Strategy) -> Strategy:
        """A strategy of another device or workload, with plain values where its own are not tried here. What comes of
        it may still be refused."""
        values = self.params(strategy)
        for knob, known in self.values.items():
            if knob == "micro_batch":
                values[knob] = max((size for size in known if size <= values[knob]), default=min(known))
            elif values[knob] not in known:
                values[knob] = known[0]
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
        """The allowed strategies that differ in one knob, by at most one place in micro batch and workers; those of
        the knobs that pay most often first."""
        near = []
        for knob, values in self.values.items():
            here = values.index(getattr(strategy, knob))
            for index, value in enumerate(values):
                is_far = knob in ("micro_batch", "workers", "threads") and abs(index - here) > 1
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
) -> Space:
    """Only what the probe saw run, and run well. The baseline's own values are always in."""
    left_out: dict[str, str] = {}

    def allowed(knob: str, value: str, *capabilities: str) -> bool:
        if value in APPROXIMATE.get(knob, ()) and not allows_approximate:
            left_out[f"{knob}={value}"] = "changes what is trained: --allow-approximate"
            return False
        for name in capabilities:
            found = hardware.capability(name)
            runs = found.value or (includes_slow and found.reason.startswith("too slow"))
            if not (runs or (UNMASKED_MS in found.measured and not workload.has_masked_attention)):
                left_out[f"{knob}={value}"] = found.reason
                return False
        return True

    for missing in [value for value in get_args(Precision) if value not in backend.precisions]:
        left_out[f"precision={missing}"] = "not for this kind of device"
    precisions = [p for p in backend.precisions if p == "fp32" or allowed("precision", p, *_needs(p))]
    pairs = set()
    for attention in get_args(Attention):
        if attention not in backend.attention:
            left_out[f"attention={attention}"] = hardware.capability(f"attention.{attention}.fp32").reason
            continue
        if attention not in workload.attentions:
            left_out[f"attention={attention}"] = (
                "the model has no switch for it"
                if len(workload.attentions) > 1
                else "the model calls no kernel of torch's"
            )
            continue
        is_sparse = attention in APPROXIMATE["attention"]
        if is_sparse and not allowed("attention", attention):
            continue
        for precision in precisions:
            # what is sparse is made of torch's own choice of kernel, on CUDA of a kernel that is compiled for it
            kernel = ("window" if backend.device_type == "cuda" else "sdpa") if is_sparse else attention
            name = f"attention.{kernel}.{_ATTENTION_DTYPE[precision]}"
            # a model that calls no kernel may have no attention at all: how fast that is says nothing of it
            is_free = len(workload.attentions) == 1 or (attention, precision) == (workload.attentions[0], "fp32")
            if not (is_free or allowed("attention", f"{attention} in {precision}", name)):
                continue
            # asked of a CPU, where the model was looked at; elsewhere a trial finds out
            is_pinned = backend.device_type == "cpu" and attention in SDPA_KERNELS
            if is_pinned and attention in workload.refused_kernels:
                left_out[f"attention={attention}"] = f"refused by this model: {workload.refused_kernels[attention]}"
                continue
            pairs.add((attention, precision))
    attentions = [a for a in backend.attention if any((a, p) in pairs for p in precisions)]
    compile_modes = [c for c in backend.compile_modes if c == "none" or allowed("compile", c, f"compile.{c}")]
    for mode in [value for value in get_args(Compile) if value not in backend.compile_modes]:
        left_out[f"compile={mode}"] = "not for this kind of device"
    graphs = [g for g in backend.graphs if g == "none" or allowed("graphs", g, f"graphs.{g}")]
    for value in [value for value in get_args(Graphs) if value not in backend.graphs]:
        left_out[f"graphs={value}"] = "not for this kind of device"
    if "step" in graphs and (reason := unrecorded_schedule(workload.recipe.schedule)):
        graphs.remove("step")
        left_out["graphs=step"] = reason
    for setting in [value for value in get_args(Allocator) if value not in backend.allocators]:
        left_out[f"allocator={setting}"] = "not for this kind of device"
    allocators = [a for a in backend.allocators if a == "default" or allowed("allocator", a, f"allocator.{a}")]
    optimizers = [o for o in get_args(Optimizer) if o == "default" or allowed("optimizer", o, f"optimizer.{o}")]
    checkpoints = [c for c in get_args(Checkpoint) if workload.num_blocks >= _NEEDS_BLOCKS[c]]
    for checkpoint in [value for value in get_args(Checkpoint) if value not in checkpoints]:
        left_out[f"checkpoint={checkpoint}"] = (
            f"nothing of its own to recompute with {workload.num_blocks} repeated blocks"
        )
    if len(compile_modes) == 1:
        checkpoints.remove("memory_budget")
        left_out["checkpoint=memory_budget"] = "is the compiler's, and nothing compiles here"
    formats = ["contiguous"]
    if not workload.has_convolutions:
        left_out["memory_format=channels_last"] = "the model has no convolutions"
    elif allowed("memory_format", "channels_last", "channels_last"):
        formats.append("channels_last")
    paddings: tuple[Padding, ...] = get_args(Padding)
    if workload.pack is None:
        left_out["padding=packed"] = "the model does not take sequences in one row"
        paddings = paddings[:-1]
    if len(set(map(int, workload.train.lengths))) == 1:
        for padding in paddings[1:]:
            left_out[f"padding={padding}"] = "all samples are of one length"
        paddings = paddings[:1]
    scopes: tuple[CompileScope, ...] = get_args(CompileScope)
    if workload.num_blocks < 2 or len(compile_modes) == 1:
        reason = "the model repeats no block" if workload.num_blocks < 2 else "nothing compiles here"
        left_out["compile_scope=blocks"] = reason
        scopes = scopes[:1]
    counts = thread_counts(hardware.device.num_cores) if backend.device_type == "cpu" else ()
    threads = (0, *(count for count in counts if allowed("threads", str(count), f"threads.{count}")))
    workers = tuple(count for count in WORKERS if count <= hardware.device.num_cores)
    for count in WORKERS[len(workers) :]:
        left_out[f"workers={count}"] = f"there are {hardware.device.num_cores} cores"
    global_batch = workload.recipe.global_batch
    micro_batches = tuple(size for size in range(1, global_batch + 1) if global_batch % size == 0)
    if workload.has_batch_norm or not workload.is_split_exact:
        for size in micro_batches[:-1]:
            left_out[f"micro_batch={size}"] = (
                "batch normalisation would train on other statistics"
                if workload.has_batch_norm
                else "a batch's loss is not the mean of its samples' losses: another split would train otherwise"
            )
        micro_batches = micro_batches[-1:]
    return Space(
        global_batch=global_batch,
        values={
            "micro_batch": micro_batches,
            "attention": tuple(attentions),
            "compile": tuple(compile_modes),
            "compile_scope": scopes,
            "graphs": tuple(graphs),
            "allocator": tuple(allocators),
            "precision": tuple(precisions),
            "padding": paddings,
            "optimizer": tuple(optimizers),
            "threads": threads,
            "workers": workers,
            "checkpoint": tuple(checkpoints),
            "memory_format": tuple(formats),
            "prefetch": PREFETCHES,
            "deterministic": (is_deterministic,),
        },
        left_out=left_out,
        pairs=frozenset(pairs),
        is_masked=workload.has_masked_attention,
        whole_rows=frozenset(p for p in precisions if hardware.allows(f"packed.{_ATTENTION_DTYPE[p]}")),
    )


def attention_ms(hardware: Hardware, attention: Attention, precision: Precision, *, is_masked: bool) -> float:
    """What the probe's forward and backward pass through a kernel took, in milliseconds; infinite where it has no
    figure. One that takes no mask was timed without, which beside others' says nothing where ``is_masked``."""
    measured = hardware.capability(f"attention.{attention}.{_ATTENTION_DTYPE[precision]}").measured
    if UNMASKED_MS in measured:
        return math.inf if is_masked else measured[UNMASKED_MS]
    return measured.get("forward_ms", math.inf) + measured.get("backward_ms", math.inf)


def expert_guess(space: Space, hardware: Hardware, backend: Backend) -> Strategy:
    """What a person who reads the probe would write down: the fastest precision and attention it measured, no padding
    waste, no recomputation, memory retained, nothing compiled, the micro batch as usually pays on such a device."""
    most = backend.guess_micro_batch or space.global_batch

    def optimizer_ms(optimizer: Optimizer) -> float:
        return hardware.capability(f"optimizer.{optimizer}").measured.get("step_ms", math.inf)

    def format_ms(memory_format: MemoryFormat) -> float:
        return hardware.capability("channels_last").measured.get(f"{memory_format}_ms", 0.0)

    def gflop_per_s(precision: Precision) -> float:
        return hardware.capability(f"matmul.{precision}").measured.get("gflop_per_s", 0.0)

    # fp16 needs a loss scaler and has less range: a person takes it only where it is twice as fast
    # as bf16, as on cards before Ampere.
    exact_attentions = [a for a in space.values["attention"] if a not in APPROXIMATE["attention"]]
    runnable = {p for a, p in space.pairs if a in exact_attentions}
    exact = [p for p in space.values["precision"] if p not in APPROXIMATE["precision"] and p in runnable]
    precision = max(exact, key=lambda p: gflop_per_s(p) * (0.5 if p == "fp16" else 1.0))
    attentions = [a for a in exact_attentions if (a, precision) in space.pairs]
    micro_batches = space.values["micro_batch"]
    fitting = [size for size in micro_batches if size <= most] or micro_batches[:1]
    guess = space.strategy(
        {
            "attention": min(attentions, key=lambda a: attention_ms(hardware, a, precision, is_masked=False)),
            "precision": precision,
            "checkpoint": "none",
            "micro_batch": max(fitting),
            "compile_scope": "model",
            "threads": 0,
            "prefetch": PREFETCH,
            "deterministic": space.values["deterministic"][0],
            "memory_format": min(space.values["memory_format"], key=format_ms),
            "compile": "none",
            "workers": 0,
            "padding": next(p for p in ("buckets", *space.values["padding"]) if p in space.values["padding"]),
            "allocator": space.values["allocator"][-1],
            "optimizer": min(space.values["optimizer"], key=optimizer_ms),
            "graphs": space.values["graphs"][-1],
        }
    )
    return guess if space.refusal(guess) is None else msgspec.structs.replace(guess, graphs="none")


def compiled_guess(space: Space, backend: Backend, guess: Strategy) -> Strategy | None:
    """A guess compiled, where that usually pays on this device family: each repeated block by itself where there are
    such, as that is compiled once (PyTorch, "Reducing torch.compile cold start compilation time with regional
    compilation")."""
    if backend.guess_compile == "none" or backend.guess_compile not in space.values["compile"]:
        return None
    scope = space.values["compile_scope"][-1]
    compiled = msgspec.structs.replace(guess, compile=backend.guess_compile, compile_scope=scope)
    return compiled if space.refusal(compiled) is None else None


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
