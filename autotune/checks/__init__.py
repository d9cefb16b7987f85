"""What the probe runs on a device: one small function per capability, each timed. Runs in the probe's child process.

A check returns its figures, or raises: the error's first line is the refusal. What is too slow to be worth a search is
judged afterwards, from the figures (autotune.probe).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import get_args

import msgspec

from autotune.backends.base import Backend
from autotune.backends.cpu import thread_counts, usable_cores
from autotune.checks.compute import (
    allocator,
    autocast,
    channels_last,
    compiled,
    energy_counter,
    grad_scaler,
    matmul,
    memory_copy,
    optimizer,
    step_graph,
    threads,
)
from autotune.checks.kernels import ATTENTION_PRECISIONS, attention, packed
from autotune.checks.tools import Figures, RefusalError, first_line
from autotune.strategy import APPROXIMATE, Attention, Precision

__all__ = ["Check", "Figures", "RefusalError", "first_line", "standard"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One capability and how to find out about it."""

    name: str
    run: Callable[[Backend], Figures] | None = None
    """Importable by name, so that a child process can be told to run it. None: see ``follows``."""
    follows: str | None = None
    """The capability whose value this one takes over: where it runs, this one does."""
    time_limit_s: float = 20.0
    """After this long without an answer the child is killed and the capability refused."""


def standard(backend: Backend) -> tuple[Check, ...]:
    """Every capability worth knowing of a device, quick ones first and torch.compile last."""
    precisions = [p for p in get_args(Precision) if p not in APPROXIMATE["precision"]]  # those compute as others do
    checks = [Check(name=f"matmul.{p}", run=functools.partial(matmul, precision=p)) for p in precisions]
    if "fp8" in backend.precisions:
        checks.append(Check(name="matmul.fp8", run=functools.partial(matmul, precision="fp8")))
    checks += [Check(name=f"autocast.{p}", run=functools.partial(autocast, precision=p)) for p in ("bf16", "fp16")]
    checks += [
        Check(name="grad_scaler", run=grad_scaler),
        Check(name="optimizer.foreach", run=functools.partial(optimizer, option="foreach")),
        Check(name="optimizer.fused", run=functools.partial(optimizer, option="fused")),
        Check(name="channels_last", run=channels_last),
        Check(name="memory_copy", run=memory_copy),
        Check(name="energy_counter", run=energy_counter),
    ]
    if backend.device_type == "cpu":
        counts = thread_counts(usable_cores())
        checks += [Check(name=f"threads.{count}", run=functools.partial(threads, count=count)) for count in counts]
    checks += [
        Check(
            name=f"attention.{kernel}.{p}",
            run=functools.partial(attention, kernel=kernel, precision=p),
            time_limit_s=60.0 if kernel == "flash_attn" else 20.0,  # version 4 compiles its kernels
        )
        for kernel in get_args(Attention)
        if kernel not in APPROXIMATE["attention"]
        for p in ATTENTION_PRECISIONS
    ]
    if backend.device_type == "cuda":  # FlexAttention, which is compiled; elsewhere it is made of torch's own kernels
        first, *others = ATTENTION_PRECISIONS
        compiled_kernel = functools.partial(attention, kernel="window", precision=first)
        checks.append(Check(name=f"attention.window.{first}", run=compiled_kernel, time_limit_s=120.0))
        checks += [Check(name=f"attention.window.{p}", follows=f"attention.window.{first}") for p in others]
        checks += [Check(name=f"packed.{p}", run=functools.partial(packed, precision=p)) for p in ("bf16", "fp16")]
    checks += [Check(name=f"graphs.{value}", run=step_graph) for value in backend.graphs if value != "none"]
    ran = None
    for mode in backend.compile_modes:
        if mode == "none":
            continue
        if mode == "max-autotune" and ran is not None:
            checks.append(Check(name=f"compile.{mode}", follows=ran))
            continue
        ran = f"compile.{mode}"
        checks.append(Check(name=ran, run=functools.partial(compiled, mode=mode), time_limit_s=120.0))
    # Last of all: it cannot be undone in the child that runs it.
    checks += [
        Check(name=f"allocator.{setting}", run=functools.partial(allocator, setting=setting))
        for setting in backend.allocators
        if setting != "default"
    ]
    return tuple(checks)
