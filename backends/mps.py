"""Apple's GPUs, by Metal. Memory is the machine's own; peaks are sampled, since Metal keeps none."""

from __future__ import annotations

import platform
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autotune.backends import cpu
from autotune.backends.base import Device
from autotune.strategy import SPARSE, Allocator, Attention, Compile, Graphs, Precision

if TYPE_CHECKING:
    import torch

name: str = "mps"
device_type: str = "mps"
attention: tuple[Attention, ...] = ("eager", "sdpa", "sdpa_math", *SPARSE)
same_kernel: Mapping[Attention, Attention] = {}
precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "bf16_weights")
compile_modes: tuple[Compile, ...] = ("none", "default")
graphs: tuple[Graphs, ...] = ("none",)
allocators: tuple[Allocator, ...] = ("default",)
is_host_memory = False
pins_memory = False
matmul_multiple = 1
guess_micro_batch: int | None = None
guess_compile: Compile = "none"

SAMPLE_INTERVAL_S = 0.02

_OUT_OF_MEMORY_TEXT = "MPS backend out of memory"


def unavailable() -> str | None:
    """Why this machine has no MPS device."""
    import torch

    if not torch.backends.mps.is_built():
        return f"this torch ({torch.__version__}) is built without MPS"
    if not torch.backends.mps.is_available():
        return "torch finds no MPS device; it needs an Apple GPU and macOS 14 or later"
    return None


def device() -> Device:
    """The GPU; its memory is what Metal recommends one process to use."""
    import torch

    total_bytes = torch.mps.recommended_max_memory()
    return Device(
        kind=name,
        name=cpu.sysctl("machdep.cpu.brand_string") or "Apple GPU",
        architecture=f"{platform.machine()} Metal",
        num_cores=cpu.usable_cores(),
        memory_total_bytes=total_bytes,
        memory_free_bytes=max(0, total_bytes - torch.mps.driver_allocated_memory()),
        versions={
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "macos": platform.mac_ver()[0],
        },
    )


def synchronize() -> None:
    """Returns when all kernels on the GPU are done."""
    import torch

    torch.mps.synchronize()


def set_precision(precision: Precision) -> None:
    """Does nothing: Metal has no TF32."""


def set_allocator(allocator: Allocator) -> None:
    """Raises RuntimeError for anything but the default: torch's caching allocator retains memory by itself."""
    if allocator != "default":
        raise RuntimeError(f"allocator {allocator} is for CPUs; torch retains this device's memory by itself")


def limit_kernel_caches() -> None:
    """Does nothing: Metal keeps its graphs in host memory, out of reach."""


def start_memory_window() -> None:
    """Starts to sample what Metal has given to this process, each 20 ms, until the next window or the process's end."""
    import torch

    global _sampler
    if _sampler is not None:
        _sampler.stop()
    torch.mps.empty_cache()
    _sampler = _Sampler()
    _sampler.start()


def peak_memory_bytes() -> int:
    """Peak of the memory that Metal gave to this process, in bytes: a sample, so a shorter peak can be missed."""
    if _sampler is None:
        return 0
    _sampler.sample()
    return _sampler.peak_bytes


def random_state() -> dict[str, torch.Tensor]:
    """The state of the random numbers that training draws from: the device's, and the host's."""
    import torch

    return {**cpu.random_state(), "mps": torch.mps.get_rng_state()}


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Puts back what ``random_state`` gave."""
    import torch

    cpu.set_random_state(state)
    torch.mps.set_rng_state(state["mps"])


def energy_j() -> None:
    """None: Apple's counters need root."""
    return None


def limit_memory(limit_bytes: int) -> None:
    """Makes torch's allocator refuse what goes above the limit."""
    import torch

    fraction = limit_bytes / torch.mps.recommended_max_memory()
    torch.mps.set_per_process_memory_fraction(min(2.0, fraction))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Metal or the host's memory gave out; Metal's way is a plain RuntimeError."""
    if isinstance(error, RuntimeError) and _OUT_OF_MEMORY_TEXT in str(error):
        return True
    return cpu.is_out_of_memory(error)


class _Sampler:
    """Keeps the highest ``driver_allocated_memory`` seen, from a thread of its own."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="autotune-mps-memory", daemon=True)

    def start(self) -> None:
        self.sample()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def sample(self) -> None:
        import torch

        self.peak_bytes = max(self.peak_bytes, torch.mps.driver_allocated_memory())

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_INTERVAL_S):
            self.sample()


_sampler: _Sampler | None = None
