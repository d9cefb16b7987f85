"""NVIDIA devices (and AMD's, which torch also calls cuda). One process tunes one device: torch's current one."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from autotune.backends import cpu
from autotune.backends.base import Device
from autotune.strategy import Allocator, Attention, Compile, Graphs, Precision

if TYPE_CHECKING:
    import torch

name: str = "cuda"
device_type: str = "cuda"
attention: tuple[Attention, ...] = get_args(Attention)
same_kernel: Mapping[Attention, Attention] = {}
precisions: tuple[Precision, ...] = get_args(Precision)
compile_modes: tuple[Compile, ...] = get_args(Compile)
graphs: tuple[Graphs, ...] = get_args(Graphs)
allocators: tuple[Allocator, ...] = ("default",)
is_host_memory = False
pins_memory = True
matmul_multiple = 64  # 128 bytes in half precision (NVIDIA, Matrix Multiplication Background)
guess_micro_batch: int | None = None
guess_compile: Compile = "default"

_GENERATIONS = {(7, 5): "Turing", (8, 9): "Ada"}
_GENERATIONS_BY_MAJOR = {7: "Volta", 8: "Ampere", 9: "Hopper", 10: "Blackwell", 11: "Blackwell", 12: "Blackwell"}

# Libraries that allocate beside torch's allocator say it in their own words
_OUT_OF_MEMORY_TEXTS = (
    "CUDA out of memory",
    "HIP out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def unavailable() -> str | None:
    """Why this machine has no CUDA device. Counts through NVML where it can, which creates no context."""
    import torch

    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"this torch ({torch.__version__}) is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where there is no driver; we say so ourselves
        count = torch.cuda.device_count()
    return None if count > 0 else "torch finds no CUDA device; see nvidia-smi and CUDA_VISIBLE_DEVICES"


def device() -> Device:
    """torch's current CUDA device as it is now. Creates a context on it."""
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        kind=name,
        name=properties.name,
        architecture=_architecture(properties.major, properties.minor),
        num_cores=cpu.usable_cores(),
        memory_total_bytes=total_bytes,
        memory_free_bytes=free_bytes,
        versions=_versions(),
    )


def synchronize() -> None:
    """Returns when all streams of the current device are done."""
    import torch

    torch.cuda.synchronize()


def set_precision(precision: Precision) -> None:
    """TF32 for matmuls and convolutions with ``tf32``, off otherwise (torch's default leaves it on in cuDNN).

    Written through the older flags first and the newer ones second: torch >= 2.9 raises when the older are *read*,
    as inductor does, while the two disagree (pytorch/pytorch#166387, #179445; tried on 2.13).
    """
    import torch

    is_tf32 = precision == "tf32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 announces the older flags' end
        torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = is_tf32
    for operator in ("conv", "rnn"):
        flags: Any = getattr(torch.backends.cudnn, operator, None)
        if hasattr(flags, "fp32_precision"):
            flags.fp32_precision = "tf32" if is_tf32 else "ieee"


def set_allocator(allocator: Allocator) -> None:
    """Raises RuntimeError for anything but the default: torch's caching allocator retains memory by itself."""
    if allocator != "default":
        raise RuntimeError(f"allocator {allocator} is for CPUs; torch retains this device's memory by itself")


def limit_kernel_caches() -> None:
    """Does nothing: matmul kernels are not cached by shape here, and cuDNN keeps its plans in host memory."""


def start_memory_window() -> None:
    """Peak memory counts from here. Blocks that torch keeps for reuse are handed back first."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak memory that torch's allocator held on the device, in bytes.

    Reserved, not allocated: it is what the device really gave away and what has to fit. The context (some 500 MB) and
    what NCCL or cuBLAS allocate by themselves are not in it.
    """
    import torch

    return torch.cuda.max_memory_reserved()


def random_state() -> dict[str, torch.Tensor]:
    """The state of the random numbers that training draws from: the card's, and the host's."""
    import torch

    return {**cpu.random_state(), "cuda": torch.cuda.get_rng_state()}


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Puts back what ``random_state`` gave."""
    import torch

    cpu.set_random_state(state)
    torch.cuda.set_rng_state(state["cuda"])


def energy_j() -> float | None:
    """NVML's total energy counter, Volta and later, which moves some fifty times a second."""
    with contextlib.suppress(ImportError):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError, AttributeError):  # torch < 2.3 does not say which card it is
            pynvml.nvmlInit()
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(_nvml_handle())) / 1000
    return None


@functools.cache
def _nvml_handle() -> Any:
    """By the card's own number: NVML counts all cards, torch those that CUDA_VISIBLE_DEVICES names."""
    import pynvml
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")


def limit_memory(limit_bytes: int) -> None:
    """Makes torch's allocator refuse what goes above the limit. Creates a context."""
    import torch

    _, total_bytes = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, a CUDA library or the host's memory (pinned buffers, the loader) gave out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS):
        return True
    return cpu.is_out_of_memory(error)


def _architecture(major: int, minor: int) -> str:
    generation = _GENERATIONS.get((major, minor)) or _GENERATIONS_BY_MAJOR.get(major)
    return f"sm_{major}{minor}" + (f" {generation}" if generation else "")


def _versions() -> dict[str, str]:
    import torch

    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    for package in ("torchao", "flash-attn", "flash-attn-3", "flash-attn-4"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    with contextlib.suppress(ImportError):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            driver = pynvml.nvmlSystemGetDriverVersion()
            cuda = pynvml.nvmlSystemGetCudaDriverVersion()
            versions["driver"] = driver.decode() if isinstance(driver, bytes) else driver
            versions["driver_cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
    return versions
