"""What a person who reads the probe would try first."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from autotune.backends.base import Backend
from autotune.checks.kernels import UNMASKED_MS
from autotune.passes import Way
from autotune.probe import Hardware
from autotune.search.space import ATTENTION_DTYPE, Space
from autotune.strategy import APPROXIMATE, PREFETCH, Attention, MemoryFormat, Optimizer, Precision, Strategy

MICRO_BATCH_S = 0.5
"""A micro batch that the baseline trains in less costs more by being one than it saves: launches, smaller products, the
weights and gradients read once more (docs/LOG.md 2026-11-28)."""


def attention_ms(hardware: Hardware, attention: Attention, precision: Precision, *, is_masked: bool) -> float:
    """What the probe's forward and backward pass through a kernel took, in milliseconds; infinite where it has no
    figure. One that takes no mask was timed without, which beside others' says nothing where ``is_masked``."""
    measured = hardware.capability(f"attention.{attention}.{ATTENTION_DTYPE[precision]}").measured
    if UNMASKED_MS in measured:
        return math.inf if is_masked else measured[UNMASKED_MS]
    return measured.get("forward_ms", math.inf) + measured.get("backward_ms", math.inf)


def expert_guess(
    space: Space,
    hardware: Hardware,
    backend: Backend,
    *,
    sample_s: float = math.inf,
    seconds: Mapping[Way, float] | None = None,
) -> Strategy:
    """What a person who reads the probe would write down: the fastest precision and attention it measured, no padding
    waste, no recomputation, memory retained, nothing compiled, the micro batch as usually pays on such a device.

    He knows that small micro batches of what the baseline does in ``sample_s`` a sample cost more than they bring, and
    where the model was timed takes the way in which it took the fewest ``seconds``.
    """
    most = max(backend.guess_micro_batch or space.global_batch, int(MICRO_BATCH_S / sample_s))

    def optimizer_ms(optimizer: Optimizer) -> float:
        return hardware.capability(f"optimizer.{optimizer}").measured.get("step_ms", math.inf)

    def format_ms(memory_format: MemoryFormat) -> float:
        return hardware.capability("channels_last").measured.get(f"{memory_format}_ms", 0.0)

    def gflop_per_s(precision: Precision) -> float:
        return hardware.capability(f"matmul.{precision}").measured.get("gflop_per_s", 0.0)

    def weight(precision: Precision) -> float:
        """fp16 needs a loss scaler and has less range: a person takes it only where it is twice as fast as bf16, as on
        cards before Ampere."""
        return 0.5 if precision == "fp16" else 1.0

    exact_attentions = [a for a in space.values["attention"] if a not in APPROXIMATE["attention"]]
    runnable = {p for a, p in space.pairs if a in exact_attentions}
    exact = [p for p in space.values["precision"] if p not in APPROXIMATE["precision"] and p in runnable]
    precision = max(exact, key=lambda p: gflop_per_s(p) * weight(p))
    memory_format = min(space.values["memory_format"], key=format_ms)
    ways = {way: taken_s for way, taken_s in (seconds or {}).items() if way[0] in exact}
    if ways:
        precision, memory_format = min(ways, key=lambda way: ways[way] / weight(way[0]))
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
            "memory_format": memory_format,
            "compile": "none",
            "workers": 0,
            "padding": next(p for p in ("buckets", "packed", "longest", "max") if p in space.values["padding"]),
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
