"""A scripted device for tests: CPU tensors, a memory of any size, out-of-memory where it is full. Used by name only.

Its memory is ``memory_bytes``, or AUTOTUNE_FAKE_MEMORY (such as ``512MiB``). The environment reaches child processes
only where it is set before the first one starts; limit_memory works in any of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import msgspec

from autotune.backends import cpu
from autotune.backends.base import Device
from autotune.strategy import Allocator, Attention, Compile, Graphs, Precision
from autotune.units import format_bytes, parse_bytes

name: str = "fake"
device_type: str = "cpu"
attention: tuple[Attention, ...] = ("eager", "sdpa")
same_kernel: Mapping[Attention, Attention] = {}
precisions: tuple[Precision, ...] = ("fp32", "bf16")
compile_modes: tuple[Compile, ...] = ("none",)
graphs: tuple[Graphs, ...] = ("none",)
allocators: tuple[Allocator, ...] = ("default",)
is_host_memory = True
pins_memory = False
matmul_multiple = 8
guess_micro_batch: int | None = 8
guess_compile: Compile = "none"

memory_bytes = 2**30

_limit_bytes: int | None = None
_script: Callable[[], None] | None = None

unavailable = cpu.unavailable
set_precision = cpu.set_precision
set_allocator = cpu.set_allocator
limit_kernel_caches = cpu.limit_kernel_caches
start_memory_window = cpu.start_memory_window
peak_memory_bytes = cpu.peak_memory_bytes
is_out_of_memory = cpu.is_out_of_memory
random_state = cpu.random_state
set_random_state = cpu.set_random_state


def device() -> Device:
    """A device that is the same on every machine, but for its versions."""
    return msgspec.structs.replace(
        cpu.device(),
        kind=name,
        name="fake",
        architecture="scripted",
        num_cores=2,
        memory_total_bytes=_memory_bytes(),
        memory_free_bytes=_memory_bytes(),
        memory_limit_bytes=None,
    )


def synchronize() -> None:
    """Does what ``script`` said. Raises MemoryError where the peak is above the device's memory or the limit."""
    if _script is not None:
        _script()
    capacity_bytes = min(_memory_bytes(), _limit_bytes or _memory_bytes())
    peak_bytes = peak_memory_bytes()
    if peak_bytes > capacity_bytes:
        raise MemoryError(f"fake device out of memory: {format_bytes(peak_bytes)} of {format_bytes(capacity_bytes)}")


def script(action: Callable[[], None]) -> None:
    """What synchronize does from now on in this process: hang, raise, or die, as a device in trouble does."""
    global _script
    _script = action


def energy_j() -> float:
    """A hundred watts."""
    return 100 * time.perf_counter()


def limit_memory(limit_bytes: int) -> None:
    """Makes synchronize fail above the limit."""
    global _limit_bytes
    _limit_bytes = limit_bytes


def _memory_bytes() -> int:
    scripted = os.environ.get("AUTOTUNE_FAKE_MEMORY")
    return parse_bytes(scripted) if scripted else memory_bytes
