"""One contract, every backend. A device that this machine lacks skips with its reason.

CUDA and MPS have no hardware here: what the last part tests of them runs without any (flags, error texts), or on a
scripted torch.cuda, which says nothing about a real card.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch

from autotune import backends
from autotune.backends import cpu, cuda, fake, mps
from autotune.backends.base import Backend, Device, torch_device
from autotune.errors import UsageError
from autotune.strategy import Attention, Compile, Precision

BACKENDS: Any = torch.backends
"""Untyped: torch gives these flags to the module at run time."""


@pytest.fixture(autouse=True)
def _precision_flags_as_before() -> Iterator[None]:
    yield
    cuda.set_precision("fp32")
    BACKENDS.fp32_precision = "none"


@pytest.mark.parametrize("name", backends.names())
class TestContract:
    @pytest.fixture
    def backend(self, name: str) -> Backend:
        backend = backends.get(name)
        if reason := backend.unavailable():
            pytest.skip(reason)
        return backend

    def test_absence_comes_with_a_reason(self, name: str) -> None:
        reason = backends.get(name).unavailable()
        assert reason is None or len(reason) > 10

    def test_the_name_finds_the_backend(self, name: str) -> None:
        assert backends.get(name).name == name

    def test_settings_are_words_of_a_strategy(self, name: str) -> None:
        backend = backends.get(name)
        assert set(backend.attention) <= set(get_args(Attention))
        assert set(backend.precisions) <= set(get_args(Precision))
        assert set(backend.compile_modes) <= set(get_args(Compile))

    def test_the_baseline_is_worth_trying(self, name: str) -> None:
        backend = backends.get(name)
        assert "eager" in backend.attention
        assert "fp32" in backend.precisions
        assert "none" in backend.compile_modes

    def test_an_error_of_another_kind_is_not_out_of_memory(self, name: str) -> None:
        backend = backends.get(name)
        assert not backend.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
        assert not backend.is_out_of_memory(ValueError("not enough memory"))

    def test_the_hosts_memory_error_is_out_of_memory(self, name: str) -> None:
        assert backends.get(name).is_out_of_memory(MemoryError())

    def test_the_device_is_described(self, backend: Backend, name: str) -> None:
        device = backend.device()
        assert device.kind == name
        assert device.name
        assert device.architecture
        assert device.num_cores >= 1
        assert 0 < device.memory_free_bytes <= device.memory_total_bytes
        assert device.versions["torch"] == torch.__version__
        assert "python" in device.versions

    def test_the_fingerprint_stays_the_same(self, backend: Backend, name: str) -> None:
        assert backend.device().fingerprint == backend.device().fingerprint

    def test_tensors_live_on_the_torch_device(self, backend: Backend, name: str) -> None:
        backend.start_memory_window()
        doubled = torch.ones(3, device=torch_device(backend)) * 2
        backend.synchronize()
        assert doubled.cpu().tolist() == [2, 2, 2]

    def test_a_large_tensor_shows_in_the_peak_after_it_is_gone(self, backend: Backend, name: str) -> None:
        backend.start_memory_window()
        tensor = torch.ones(2**26, dtype=torch.uint8, device=torch_device(backend))
        backend.synchronize()
        del tensor
        peak_bytes = backend.peak_memory_bytes()
        assert 0.9 * 2**26 < peak_bytes < 2**29

    def test_every_precision_can_be_set_and_taken_back(self, backend: Backend, name: str) -> None:
        for precision in get_args(Precision):
            backend.set_precision(precision)
        backend.set_precision("fp32")
        assert torch.get_float32_matmul_precision() == "highest"

    def test_random_numbers_come_again_where_their_state_is_put_back(self, backend: Backend, name: str) -> None:
        state = backend.random_state()
        first = torch.rand(4, device=torch_device(backend)), torch.rand(4)
        backend.set_random_state(state)
        assert torch.equal(first[0], torch.rand(4, device=torch_device(backend)))
        assert torch.equal(first[1], torch.rand(4))

    def test_energy_only_grows_where_it_is_counted(self, backend: Backend, name: str) -> None:
        before_j = backend.energy_j()
        if before_j is None:
            assert backend.energy_j() is None
            return
        time.sleep(0.1)
        after_j = backend.energy_j()
        assert after_j is not None
        assert 0 < after_j - before_j < 1000

    def test_an_impossible_allocation_is_out_of_memory(self, backend: Backend, name: str) -> None:
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            torch.empty(2**60, dtype=torch.uint8, device=torch_device(backend))
        assert backend.is_out_of_memory(caught.value)


class TestRegistry:
    def test_unknown_name_says_the_nearest(self) -> None:
        with pytest.raises(UsageError, match=r"'cdua'; did you mean 'cuda'\?"):
            backends.get("cdua")

    def test_name_near_nothing_says_what_there_is(self) -> None:
        with pytest.raises(UsageError, match="cuda, mps, cpu"):
            backends.get("xyzzy")

    def test_find_gives_a_device_that_is_there_and_real(self) -> None:
        found = backends.find()
        assert found.unavailable() is None
        assert found.name != "fake"


def _cgroup(root: Path, version: int, path: str, files: dict[str, dict[str, str]], mount_root: str = "/") -> Path:
    """A /proc/self folder and a cgroup mount below ``root`` with files per folder (relative to the mount)."""
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    proc, mount = root / "proc", root / "cgroup"
    proc.mkdir()
    (proc / "mountinfo").write_text(f"31 23 0:28 {mount_root} {mount} rw,relatime shared:1 - {kind}\n")
    (proc / "cgroup").write_text(f"0::{path}\n" if version == 2 else f"4:memory:{path}\n0::/\n")
    for folder, contents in files.items():
        (mount / folder).mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (mount / folder / name).write_text(text + "\n")
    return proc


class TestCgroup:
    def test_v2_parents_limit_counts(self, tmp_path: Path) -> None:
        proc = _cgroup(
            tmp_path,
            2,
            "/jobs/mine",
            {
                "jobs": {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 1\ninactive_file 100"},
                "jobs/mine": {"memory.max": "max", "memory.current": "10"},
            },
        )
        assert cpu.cgroup_memory(proc) == (1000, 400)

    def test_v1_number_near_2_to_the_63_is_no_limit(self, tmp_path: Path) -> None:
        proc = _cgroup(tmp_path, 1, "/mine", {"mine": {"memory.limit_in_bytes": "9223372036854771712"}})
        assert cpu.cgroup_memory(proc) is None

    def test_v1_limit_and_use(self, tmp_path: Path) -> None:
        files = {
            "memory.limit_in_bytes": "500",
            "memory.usage_in_bytes": "200",
            "memory.stat": "total_inactive_file 50",
        }
        assert cpu.cgroup_memory(_cgroup(tmp_path, 1, "/mine", {"mine": files})) == (500, 350)

    def test_container_that_sees_its_own_cgroup_as_the_root(self, tmp_path: Path) -> None:
        files = {".": {"memory.max": "800", "memory.current": "0"}}
        assert cpu.cgroup_memory(_cgroup(tmp_path, 2, "/docker/abc", files, mount_root="/docker/abc")) == (800, 800)

    def test_v2_cpu_quota(self, tmp_path: Path) -> None:
        proc = _cgroup(tmp_path, 2, "/mine", {".": {"cpu.max": "max 100000"}, "mine": {"cpu.max": "150000 100000"}})
        assert cpu.cgroup_cores(proc) == 1.5

    def test_no_cgroup_is_no_limit(self, tmp_path: Path) -> None:
        assert cpu.cgroup_memory(tmp_path) is None
        assert cpu.cgroup_cores(tmp_path) is None


class TestFake:
    def test_memory_is_as_scripted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AUTOTUNE_FAKE_MEMORY", "512MiB")
        assert fake.device().memory_total_bytes == 2**29

    def test_out_of_memory_comes_at_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fake, "_limit_bytes", None)
        fake.start_memory_window()
        held = torch.ones(2**26, dtype=torch.uint8)
        fake.synchronize()
        fake.limit_memory(2**25)
        with pytest.raises(MemoryError, match="out of memory") as caught:
            fake.synchronize()
        assert fake.is_out_of_memory(caught.value)
        del held


class TestWithoutTheHardware:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ],
    )
    def test_cuda_ways_to_be_out_of_memory(self, error: Exception) -> None:
        assert cuda.is_out_of_memory(error)

    def test_mps_out_of_memory_is_a_plain_runtime_error(self) -> None:
        assert mps.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"))

    @pytest.mark.parametrize(("precision", "is_tf32"), [("tf32", True), ("fp32", False), ("bf16", False)])
    @pytest.mark.parametrize("users_setting", ["none", "tf32", "ieee"])
    def test_cuda_precision_can_be_read_by_either_of_torchs_interfaces(
        self, precision: Precision, is_tf32: bool, users_setting: str
    ) -> None:
        BACKENDS.fp32_precision = users_setting
        BACKENDS.cudnn.conv.fp32_precision = users_setting
        cuda.set_precision(precision)
        assert torch.get_float32_matmul_precision() == ("high" if is_tf32 else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 is is_tf32
        assert torch.backends.cudnn.allow_tf32 is is_tf32
        assert BACKENDS.cudnn.conv.fp32_precision == ("tf32" if is_tf32 else "ieee")

    def test_cuda_device_is_read_from_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = types.SimpleNamespace(name="Scripted H100", major=9, minor=0)
        scripted: dict[str, Any] = {
            "mem_get_info": lambda: (70 * 2**30, 80 * 2**30),
            "current_device": lambda: 0,
            "get_device_properties": lambda index: properties,
        }
        for function, answer in scripted.items():
            monkeypatch.setattr(torch.cuda, function, answer)
        device = cuda.device()
        assert (device.name, device.architecture) == ("Scripted H100", "sm_90 Hopper")
        assert (device.memory_free_bytes, device.memory_total_bytes) == (70 * 2**30, 80 * 2**30)

    def test_cuda_energy_is_that_of_torchs_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml = types.SimpleNamespace(
            NVMLError=KeyError,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
            nvmlDeviceGetTotalEnergyConsumption={"GPU-1234": 5_250}.__getitem__,
        )
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1234"))
        cuda._nvml_handle.cache_clear()
        assert cuda.energy_j() == 5.25
        cuda._nvml_handle.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="another"))
        assert cuda.energy_j() is None, "no counter, no figure"
        cuda._nvml_handle.cache_clear()

    def test_mps_peak_is_the_highest_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        allocated = [100, 900, 300]
        monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)
        monkeypatch.setattr(
            torch.mps, "driver_allocated_memory", lambda: allocated.pop(0) if len(allocated) > 1 else allocated[0]
        )
        mps.start_memory_window()
        mps.peak_memory_bytes()
        mps.peak_memory_bytes()
        assert mps.peak_memory_bytes() == 900
        assert mps._sampler is not None
        mps._sampler.stop()


class TestFingerprint:
    def test_software_and_free_memory_do_not_count(self) -> None:
        device = cpu.device()
        later = msgspec.structs.replace(device, memory_free_bytes=1, versions={"torch": "9"})
        assert later.fingerprint == device.fingerprint

    @pytest.mark.parametrize("change", [{"name": "x"}, {"architecture": "x"}, {"num_cores": 999}, {"kind": "cuda"}])
    def test_the_hardware_counts(self, change: dict[str, Any]) -> None:
        device: Device = cpu.device()
        assert msgspec.structs.replace(device, **change).fingerprint != device.fingerprint
