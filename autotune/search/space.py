"""What a search may try on this hardware: the values of every knob, and the reason for each value left out."""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from autotune.backends.base import Backend
from autotune.probe import Hardware
from autotune.step import uses_cuda_graphs
from autotune.strategy import Attention, Checkpoint, Padding, Precision, Strategy
from autotune.workloads.base import Workload

MAX_WORKERS = 8
"""More loader processes than this are not searched; fewer where there are fewer cores."""

# Autocast and the kernels see 16-bit tensors; tf32 is fp32 storage, so its kernels are fp32's.
_ATTENTION_DTYPE: dict[Precision, str] = {"fp32": "fp32", "tf32": "fp32", "bf16": "bf16", "fp16": "fp16"}
_EVERY_NEEDS_BLOCKS: dict[Checkpoint, int] = {"none": 0, "every_block": 1, "every_2nd": 2, "every_4th": 3}


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """The values worth trying for each knob, in order of plainness; the knobs that pay most often come first."""

    global_batch: int
    values: dict[str, tuple[Any, ...]]
    """By knob; accumulation is not among them: it follows from the micro batch."""
    left_out: dict[str, str]
    """``knob=value`` to the reason it is not tried."""
    pairs: frozenset[tuple[str, str]]
    """Attention and precision that run together."""

    def strategy(self, params: dict[str, Any]) -> Strategy:
        """The strategy with these values; accumulation fills the global batch."""
        accumulation = self.global_batch // params["micro_batch"]
        strategy: Strategy = msgspec.convert({**params, "accumulation": accumulation}, Strategy)
        return strategy

    def params(self, strategy: Strategy) -> dict[str, Any]:
        """A strategy as the sampler's parameters."""
        return {knob: getattr(strategy, knob) for knob in self.values}

    def refusal(self, strategy: Strategy) -> str | None:
        """Why this combination cannot run here; None where it can."""
        if (strategy.attention, strategy.precision) not in self.pairs:
            return f"attention {strategy.attention} does not run well in {strategy.precision} here"
        if uses_cuda_graphs(strategy) and strategy.accumulation > 1:
            return "a CUDA graph's next replay overwrites the gradients that accumulation adds to (pytorch#169545)"
        return None

    @property
    def size(self) -> int:
        """Combinations that may be tried."""
        others = 1
        for knob, values in self.values.items():
            others *= len(values) if knob not in ("attention", "precision") else 1
        return others * len(self.pairs)

    def neighbours(self, strategy: Strategy) -> list[Strategy]:
        """The allowed strategies that differ in one knob, by at most one place in micro batch and workers; those of
        the knobs that pay most often first."""
        near = []
        for knob, values in self.values.items():
            here = values.index(getattr(strategy, knob))
            for index, value in enumerate(values):
                is_far = knob in ("micro_batch", "workers") and abs(index - here) > 1
                if index != here and not is_far:
                    near.append(self.strategy({**self.params(strategy), knob: value}))
        return [candidate for candidate in near if self.refusal(candidate) is None]


def build_space(
    hardware: Hardware,
    backend: Backend,
    workload: Workload,
    *,
    includes_slow: bool = False,
) -> Space:
    """Only what the probe saw run, and run well. The baseline's own values are always in."""
    left_out: dict[str, str] = {}

    def allowed(knob: str, value: str, *capabilities: str) -> bool:
        for name in capabilities:
            found = hardware.capability(name)
            if not found.value and not (includes_slow and found.reason.startswith("too slow")):
                left_out[f"{knob}={value}"] = found.reason
                return False
        return True

    precisions = [p for p in backend.precisions if p == "fp32" or allowed("precision", p, *_needs(p))]
    pairs = set()
    for attention in backend.attention:
        for precision in precisions:
            name = f"attention.{attention}.{_ATTENTION_DTYPE[precision]}"
            if (attention, precision) == ("eager", "fp32") or allowed("attention", f"{attention} in {precision}", name):
                pairs.add((attention, precision))
    attentions = [a for a in backend.attention if any((a, p) in pairs for p in precisions)]
    compile_modes = [c for c in backend.compile_modes if c == "none" or allowed("compile", c, f"compile.{c}")]
    allocators = [a for a in backend.allocators if a == "default" or allowed("allocator", a, f"allocator.{a}")]
    checkpoints = [c for c in get_args(Checkpoint) if workload.num_blocks >= _EVERY_NEEDS_BLOCKS[c]]
    for checkpoint in set(get_args(Checkpoint)) - set(checkpoints):
        left_out[f"checkpoint={checkpoint}"] = f"nothing of its own to recompute with {workload.num_blocks} blocks"
    global_batch = workload.recipe.global_batch
    return Space(
        global_batch=global_batch,
        values={
            "micro_batch": tuple(size for size in range(1, global_batch + 1) if global_batch % size == 0),
            "attention": tuple(attentions),
            "compile": tuple(compile_modes),
            "allocator": tuple(allocators),
            "precision": tuple(precisions),
            "padding": get_args(Padding),
            "workers": tuple(sorted({0, 1, 2, 4, 8} & set(range(min(MAX_WORKERS, hardware.device.num_cores) + 1)))),
            "checkpoint": tuple(checkpoints),
        },
        left_out=left_out,
        pairs=frozenset(pairs),
    )


def expert_guess(space: Space, hardware: Hardware, backend: Backend) -> Strategy:
    """What a person who reads the probe would write down: the fastest precision and attention it measured, no padding
    waste, no recomputation, memory retained; micro batch and compilation as usually pays on this device family."""
    most = backend.guess_micro_batch or space.global_batch

    def attention_ms(attention: Attention, precision: Precision) -> float:
        measured = hardware.capability(f"attention.{attention}.{_ATTENTION_DTYPE[precision]}").measured
        return measured.get("forward_ms", float("inf")) + measured.get("backward_ms", float("inf"))

    def gflop_per_s(precision: Precision) -> float:
        return hardware.capability(f"matmul.{precision}").measured.get("gflop_per_s", 0.0)

    # fp16 needs a loss scaler and has less range: a person takes it only where it is twice as fast
    # as bf16, as on cards before Ampere.
    precisions = sorted(space.values["precision"], key=lambda p: gflop_per_s(p) * (0.5 if p == "fp16" else 1.0))
    precision = precisions[-1]
    attentions = [a for a in space.values["attention"] if (a, precision) in space.pairs]
    micro_batches = space.values["micro_batch"]
    fitting = [size for size in micro_batches if size <= most]
    return space.strategy(
        {
            "attention": min(attentions, key=lambda a: attention_ms(a, precision)),
            "precision": precision,
            "checkpoint": "none",
            "micro_batch": max(fitting),
            "compile": backend.guess_compile if backend.guess_compile in space.values["compile"] else "none",
            "workers": 0,
            "padding": "buckets",
            "allocator": space.values["allocator"][-1],
        }
    )


def _needs(precision: Precision) -> tuple[str, ...]:
    needs: dict[Precision, tuple[str, ...]] = {
        "fp32": (),
        "tf32": ("matmul.tf32",),
        "bf16": ("matmul.bf16", "autocast.bf16"),
        "fp16": ("matmul.fp16", "autocast.fp16", "grad_scaler"),
    }
    return needs[precision]
