"""What a device family must provide, and the records it speaks in. No vendor code here.

A backend is one plain module that meets the Backend protocol (docs/adding-a-backend.md). Backends import torch inside
their functions: naming the module costs nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

from autotune.strategy import Allocator, Attention, Compile, Graphs, Precision

if TYPE_CHECKING:
    import torch

_WHOLE_MACHINES = ("cpu", "mps")
"""Kinds whose cores and memory are the machine's, all others are cards in it."""


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator or the CPU, as found on this machine."""

    kind: str
    """The backend's name: cpu, cuda, mps, fake."""
    name: str
    """What the vendor calls it."""
    architecture: str
    """CUDA compute capability and generation, Apple chip, or the CPU's ISA."""
    num_cores: int
    """CPU cores this process may use."""
    memory_total_bytes: int
    """The device's memory, or the cgroup's limit where that is lower."""
    memory_free_bytes: int
    memory_limit_bytes: int | None = None
    """The cgroup's limit, where there is one below the machine's memory."""
    versions: dict[str, str] = {}
    """torch, python, and the driver's and CUDA's where they exist."""

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that stay the same while the hardware does; software versions do not count. A card's host
        does not either, nor what its driver keeps of its memory."""
        memory_gib = self.memory_total_bytes / 2**30
        if self.kind in _WHOLE_MACHINES:
            measures = [self.num_cores, round(memory_gib)]
        else:
            multiple = 8 if memory_gib > 16 else 2  # as cards are sold; drivers keep up to a few percent
            measures = [multiple * math.ceil(memory_gib / multiple)]
        identity = "|".join([self.kind, self.name, self.architecture, *map(str, measures)])
        return hashlib.sha256(identity.encode()).hexdigest()[:12]


class Capability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing the device can or cannot do, found by running it."""

    name: str
    """Dotted: ``matmul.bf16``, ``attention.sdpa_flash.bf16``, ``compile.default``."""
    value: bool
    """Whether a search may use it."""
    reason: str = "ok"
    """``ok`` (with a remark after a colon where one helps), ``refused: <the error>``, ``too slow: <figures>`` or
    ``unknown: not probed``."""
    measured: dict[str, float] = {}
    """Figures with their unit in the key: ``gflop_per_s``, ``forward_ms``, ``backward_ms``."""


class Backend(Protocol):
    """The seam to one device family. Every function may be called in any process of the tuner."""

    name: str
    """Its key in the registry, and so what another process is told to look it up by."""
    device_type: str
    """torch's device type: what tensors, autocast and GradScaler are given."""
    attention: tuple[Attention, ...]
    """Attention settings worth trying on this family."""
    same_kernel: Mapping[Attention, Attention]
    """Of these, those that run the kernel of another wherever they run at all."""
    precisions: tuple[Precision, ...]
    """Precisions worth trying."""
    compile_modes: tuple[Compile, ...]
    """torch.compile modes that differ from one another on this family."""
    graphs: tuple[Graphs, ...]
    """What may be recorded and replayed."""
    allocators: tuple[Allocator, ...]
    """Allocator settings worth trying."""
    is_host_memory: bool
    """Whether the device's memory is this process's resident memory, so that a parent can watch it."""
    pins_memory: bool
    """Whether batches reach the device faster from page-locked memory."""
    matmul_multiple: int
    """What the sides of matrix products are to be multiples of to be computed at full rate, below fp32; 1 where that
    is not known to matter."""
    guess_micro_batch: int | None
    """The micro batch that a first guess takes at most; None for the whole global batch."""
    guess_compile: Compile
    """The compile mode that a first guess is tried with besides; none where compiling seldom pays."""

    def unavailable(self) -> str | None:
        """Why this machine has no such device; None where it has one. Creates no device context."""

    def device(self) -> Device:
        """The device as it is now. May create a device context: a long-lived parent asks in a child process."""

    def synchronize(self) -> None:
        """Returns when all work queued on the device is done."""

    def set_precision(self, precision: Precision) -> None:
        """Sets how fp32 matmuls and convolutions are computed: TF32 for ``tf32``, full fp32 otherwise."""

    def set_allocator(self, allocator: Allocator) -> None:
        """Puts the allocator setting in force for this process, for good. Raises RuntimeError where it cannot."""

    def limit_kernel_caches(self) -> None:
        """Called where inputs change their shape from batch to batch, before any is computed: keeps kernels that are
        cached by shape from taking memory without end."""

    def start_memory_window(self) -> None:
        """Peak memory counts from here. Called before the model is built, so that the model counts."""

    def peak_memory_bytes(self) -> int:
        """Peak memory since start_memory_window, in bytes."""

    def random_state(self) -> dict[str, torch.Tensor]:
        """The state of the random numbers that training on this device draws from, the host's among them."""

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Puts back what ``random_state`` gave."""

    def energy_j(self) -> float | None:
        """Joules that the device has drawn since some moment that stays the same; None where it has no counter."""

    def limit_memory(self, limit_bytes: int) -> None:
        """Makes this process fail with out-of-memory above the limit, where the platform can."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception is this family's way to say out of memory."""


def torch_device(backend: Backend) -> torch.device:
    """The torch device that a backend's tensors live on."""
    import torch

    return torch.device(backend.device_type)
