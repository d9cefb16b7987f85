"""The CPU as a training device: its ISA, the cores and memory this process may use, and what the process took.

Cores and memory are the container's where a cgroup (v1 or v2) sets less than the machine has.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from autotune.backends.base import Device
from autotune.strategy import SPARSE, Allocator, Attention, Compile, Graphs, Precision

if TYPE_CHECKING:
    import torch

name: str = "cpu"
device_type: str = "cpu"
attention: tuple[Attention, ...] = ("eager", "sdpa", "sdpa_math", "sdpa_flash", *SPARSE)
# torch's own choice is its flash kernel wherever that runs (aten/native/transformers/sdp_utils_cpp.cpp)
same_kernel: Mapping[Attention, Attention] = {"sdpa_flash": "sdpa"}
precisions: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16", "bf16_weights")
# reduce-overhead is CUDA graphs: on a CPU it is `default` by another name
compile_modes: tuple[Compile, ...] = ("none", "default")
graphs: tuple[Graphs, ...] = ("none",)
allocators: tuple[Allocator, ...] = ("default", "retain")
is_host_memory = True
pins_memory = False
matmul_multiple = 1
# Where the caches hold the activations of a micro batch; measured on imdb, docs/LOG.md 2026-11-21.
guess_micro_batch: int | None = 8
guess_compile: Compile = "none"

KERNELS_KEPT = 64
"""Three padded widths' worth for an encoder, whose layers share their shapes; 32 were as fast."""

_OUT_OF_MEMORY_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "std::bad_alloc")

# Units beyond the plain vector width that decide how fast bf16 and fp16 matmuls run: /proc/cpuinfo's words, ours
_UNITS_BY_FLAG = {
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_fp16": "AMX-FP16",
    "asimdhp": "NEON-FP16",
    "bf16": "NEON-BF16",
    "sve": "SVE",
    "sve2": "SVE2",
    "sme": "SME",
}

_window_start_bytes = 0


def unavailable() -> str | None:
    """None: there is always a CPU."""
    return None


def device() -> Device:
    """The CPU with the cores and the memory that this process may use."""
    import torch

    memory = psutil.virtual_memory()
    limit = cgroup_memory()
    total_bytes, free_bytes, limit_bytes = memory.total, memory.available, None
    if limit is not None and limit.limit_bytes < memory.total:
        total_bytes = limit_bytes = limit.limit_bytes
        free_bytes = min(memory.available, limit.free_bytes)
    return Device(
        kind=name,
        name=_model_name(),
        architecture=_architecture(),
        num_cores=usable_cores(),
        memory_total_bytes=total_bytes,
        memory_free_bytes=free_bytes,
        memory_limit_bytes=limit_bytes,
        versions={"torch": str(torch.__version__), "python": platform.python_version()},
    )


def synchronize() -> None:
    """Returns at once: CPU work is done when its call returns."""


def set_precision(precision: Precision) -> None:
    """Asks oneDNN for TF32 matmuls, or for full fp32. No CPU known to us gains by it; the probe says."""
    import torch

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def set_allocator(allocator: Allocator) -> None:
    """``retain`` makes glibc serve every size from its heap and never shrink that (mallopt(3)).

    By default a tensor above 32 MiB is mapped anew each time, and the kernel clears its pages at first touch: nine
    million page faults in twelve imdb steps at 512 tokens, docs/LOG.md 2026-11-21. It cannot be undone in a process.
    Raises RuntimeError where the C library is not glibc, or refuses.
    """
    if allocator == "default":
        return
    import ctypes

    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError) as exc:
        raise RuntimeError("the C library has no mallopt; only glibc's allocator can be told to retain") from exc
    for parameter, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 64 * 2**20)):
        if mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}) was refused by the C library")


def limit_kernel_caches() -> None:
    """Lets oneDNN, and torch's layer over it, keep 64 kernels each, not 1024, unless the user set another number.

    A kernel made for one shape takes about a quarter of a MiB, and an encoder's step some twenty a padded width: the
    caches grew by 8 MiB a step through an imdb epoch, which in turn fragmented the heap to twice its size
    (docs/LOG.md 2026-11-22; the growth is pytorch#32037's). Has no effect in a process that has used oneDNN before.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KERNELS_KEPT))


def start_memory_window() -> None:
    """Peak memory counts from here, above what the process has now: the interpreter and torch do not count."""
    global _window_start_bytes
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see man 5 proc_pid_clear_refs
    _window_start_bytes = psutil.Process().memory_info().rss


def peak_memory_bytes() -> int:
    """Peak resident memory above the window's start, plus what live child processes have to themselves, in bytes.

    Where VmHWM cannot be reset (not Linux, or a locked /proc) the peak is the process's of all time: an upper bound.
    """
    own_bytes = max(0, _peak_resident_bytes() - _window_start_bytes)
    children_bytes = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            children_bytes += child.memory_full_info().uss
    return own_bytes + children_bytes


def random_state() -> dict[str, torch.Tensor]:
    """The state of the random numbers that training draws from."""
    import torch

    return {"cpu": torch.get_rng_state()}


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Puts back what ``random_state`` gave."""
    import torch

    torch.set_rng_state(state["cpu"])


def energy_j() -> None:
    """None: what processors count is readable by root only, and not in virtual machines."""
    return None


def limit_memory(limit_bytes: int) -> None:
    """Does nothing: an address-space limit would also count what is mapped and never touched, so the process that
    started this one watches its resident memory instead.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the allocator refused: MemoryError, or the RuntimeError that torch raises in its place."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity mask, or its cgroup's quota where that is less."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = cgroup_cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def thread_counts(cores: int) -> tuple[int, ...]:
    """All of so many cores, half of them, a quarter, ... down to one."""
    return (cores, *thread_counts(cores // 2)) if cores else ()


class CgroupMemory(NamedTuple):
    """What the cgroups over this process allow."""

    limit_bytes: int
    free_bytes: int


def cgroup_memory(proc: Path = Path("/proc/self")) -> CgroupMemory | None:
    """The least limit and the least left under one, over this process's cgroup and its parents; None without a limit.

    Page cache that the kernel would give back first (inactive_file) does not count as used.
    """
    limits: list[int] = []
    frees: list[int] = []
    for folder, version in _cgroup_folders(proc, "memory"):
        limit = _read(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        if not limit.isdigit() or int(limit) >= 2**60:  # v2 says max, v1 some number near 2^63
            continue
        used = _read(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        key = "inactive_file" if version == 2 else "total_inactive_file"
        cache = re.search(rf"^{key} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        used_bytes = (int(used) if used.isdigit() else 0) - (int(cache[1]) if cache else 0)
        limits.append(int(limit))
        frees.append(max(0, int(limit) - max(0, used_bytes)))
    return CgroupMemory(min(limits), min(frees)) if limits else None


def cgroup_cores(proc: Path = Path("/proc/self")) -> float | None:
    """The least CPU quota among this process's cgroup and its parents, in cores; None where there is none."""
    found = []
    for folder, version in _cgroup_folders(proc, "cpu"):
        if version == 2:
            words = _read(folder / "cpu.max").split()
        else:
            words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _cgroup_folders(proc: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """This process's cgroup folders for a controller, innermost first, each with its cgroup version.

    A container often sees its own cgroup mounted as the root while /proc still names the host's path: the part of the
    path that the mount leaves out is taken off, and folders that do not exist are passed over.
    """
    mounts: list[tuple[Path, str, int]] = []
    for line in _read(proc / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        root, mount_point = left.split()[3:5]
        fields = right.split()
        if fields[0] == "cgroup2":
            mounts.append((Path(mount_point), root, 2))
        elif fields[0] == "cgroup" and controller in fields[-1].split(","):
            mounts.append((Path(mount_point), root, 1))
    for line in _read(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for mount, root, version in mounts:
            if (version == 2) != (controllers == "") or (version == 1 and controller not in controllers.split(",")):
                continue
            inside = path.removeprefix(root) if root != "/" else path
            folder = mount / inside.strip("/")
            while folder.is_relative_to(mount):
                if folder.is_dir():
                    yield folder, version
                folder = folder.parent


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _peak_resident_bytes() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB$", _read(Path("/proc/self/status")), re.MULTILINE)
    if match:
        return int(match[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpuinfo(*keys: str) -> str:
    for key in keys:
        match = re.search(rf"^{key}\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
        if match:
            return match[1].strip()
    return ""


def sysctl(key: str) -> str:
    """A macOS sysctl's value; empty where there is none."""
    try:
        ran = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip()


def _model_name() -> str:
    if sys.platform == "darwin":
        return sysctl("machdep.cpu.brand_string") or platform.machine()
    return _cpuinfo("model name", "Model", "Hardware") or platform.processor() or platform.machine()


def _architecture() -> str:
    """Machine, the ISA that torch's kernels were chosen for, and the matrix units, each as the CPU reports it."""
    import torch

    flags = set(_cpuinfo("flags", "Features").split())
    units = [unit for flag, unit in _UNITS_BY_FLAG.items() if flag in flags]
    isa = str(torch.backends.cpu.get_cpu_capability())
    return ", ".join([f"{platform.machine()} {isa}", *units])
