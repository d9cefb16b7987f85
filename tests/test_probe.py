"""The probe's children, verdicts and cache, on checks of the test's own; and each standard check but the compiler's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import msgspec
import pytest
import torch

from autotune import backends, checks
from autotune.backends.base import Backend, Capability
from autotune.backends.cpu import thread_counts
from autotune.checks import Check, Figures, RefusalError, compute, kernels
from autotune.contention import Load
from autotune.errors import AutotuneError
from autotune.probe import Hardware, _judge, probe
from autotune.strategy import Attention

CPU = backends.get("cpu")
MEASURED_BUSY_CORES = Load.busy_cores


@pytest.fixture(autouse=True)
def _machine_is_otherwise_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run beside others; whether results are kept must not hang on that."""
    monkeypatch.setattr(Load, "busy_cores", lambda self, num_cores, children_s: 0.0)


def works(backend: Backend) -> Figures:
    return {"step_ms": 1.0}


def segfaults(backend: Backend) -> Figures:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hangs(backend: Backend) -> Figures:
    time.sleep(600)
    return {}


def exits(backend: Backend) -> Figures:
    os._exit(3)


def raises(backend: Backend) -> Figures:
    raise RuntimeError("no kernel for this\nTraceback: of no use to anybody")


def counts(backend: Backend) -> Figures:
    return {"pid": float(os.getpid()), "time": time.time()}


def probe_these(cache_dir: Path, *wanted: Check, refresh: bool = False) -> Hardware:
    return probe(CPU, cache_dir=cache_dir, only=wanted, refresh=refresh)


def test_a_check_that_works_is_ok_with_its_figures(tmp_path: Path) -> None:
    hardware = probe_these(tmp_path, Check(name="it", run=works))
    assert hardware.capability("it") == Capability(name="it", value=True, reason="ok", measured={"step_ms": 1.0})


def test_a_check_that_segfaults_is_refused_and_the_next_one_runs(tmp_path: Path) -> None:
    hardware = probe_these(tmp_path, Check(name="bad", run=segfaults), Check(name="good", run=works))
    assert hardware.capability("bad").reason == "refused: killed by SIGSEGV"
    assert not hardware.allows("bad")
    assert hardware.allows("good")


def test_a_check_that_exits_is_refused_and_the_next_one_runs(tmp_path: Path) -> None:
    hardware = probe_these(tmp_path, Check(name="bad", run=exits), Check(name="good", run=works))
    assert hardware.capability("bad").reason == "refused: exited with status 3"
    assert hardware.allows("good")


def test_a_check_that_hangs_is_refused_and_the_next_one_runs(tmp_path: Path) -> None:
    hardware = probe_these(tmp_path, Check(name="slow", run=hangs, time_limit_s=0.3), Check(name="good", run=works))
    assert hardware.capability("slow").reason.startswith("refused: no answer within")
    assert hardware.allows("good")


def test_a_refusal_is_the_errors_first_line(tmp_path: Path) -> None:
    hardware = probe_these(tmp_path, Check(name="no", run=raises))
    assert hardware.capability("no").reason == "refused: no kernel for this"


def test_checks_run_outside_of_this_process(tmp_path: Path) -> None:
    assert probe_these(tmp_path, Check(name="it", run=counts)).capability("it").measured["pid"] != os.getpid()


def test_a_mode_that_differs_in_tuning_follows_its_leader(tmp_path: Path) -> None:
    hardware = probe_these(
        tmp_path,
        Check(name="compile.default", run=works),
        Check(name="compile.max-autotune", follows="compile.default"),
    )
    assert hardware.allows("compile.max-autotune")
    assert hardware.capability("compile.max-autotune").reason == "ok: as compile.default"


def test_a_follower_of_a_refused_leader_is_refused_for_the_same_reason(tmp_path: Path) -> None:
    hardware = probe_these(
        tmp_path,
        Check(name="compile.default", run=raises),
        Check(name="compile.max-autotune", follows="compile.default"),
    )
    assert hardware.capability("compile.max-autotune").reason == "refused: no kernel for this"


def test_the_second_probe_reads_the_first_ones_results_and_reports_them(tmp_path: Path) -> None:
    first = probe_these(tmp_path, Check(name="it", run=counts))
    told: list[Capability] = []
    second = probe(CPU, cache_dir=tmp_path, only=[Check(name="it", run=counts)], on_capability=told.append)
    assert second.capabilities == first.capabilities == tuple(told)
    assert second.probed_at == first.probed_at


def test_refresh_measures_again(tmp_path: Path) -> None:
    first = probe_these(tmp_path, Check(name="it", run=counts))
    second = probe_these(tmp_path, Check(name="it", run=counts), refresh=True)
    assert second.capability("it").measured["time"] > first.capability("it").measured["time"]


@pytest.mark.parametrize("size", [0, 40])
def test_a_torn_cache_file_is_measured_again(tmp_path: Path, size: int) -> None:
    first = probe_these(tmp_path, Check(name="it", run=counts))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    second = probe_these(tmp_path, Check(name="it", run=counts))
    assert second.capability("it").measured["time"] > first.capability("it").measured["time"]
    assert msgspec.json.decode(path.read_bytes(), type=Hardware) == second


def test_device_facts_are_fresh_when_the_capabilities_are_cached(tmp_path: Path) -> None:
    first = probe_these(tmp_path, Check(name="it", run=works))
    (path,) = tmp_path.iterdir()
    old = msgspec.structs.replace(first, device=msgspec.structs.replace(first.device, memory_free_bytes=1))
    path.write_bytes(msgspec.json.encode(old))
    assert probe_these(tmp_path, Check(name="it", run=works)).device.memory_free_bytes > 1


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert probe_these(tmp_path / "file", Check(name="it", run=works)).allows("it")


def test_results_taken_on_a_busy_machine_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Load, "busy_cores", lambda self, num_cores, children_s: float(num_cores))
    hardware = probe_these(tmp_path, Check(name="it", run=works))
    assert hardware.allows("it")
    assert hardware.busy_cores == hardware.device.num_cores
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("num_cores", "machine_cores", "others_s", "expected"),
    [(2, 2, 0.0, 0), (2, 2, 10.0, 1), (2, 64, 400.0, 0), (8, 16, 120.0, 4), (2, 2, 900.0, 2)],
)
def test_only_cores_that_were_really_missing_count_as_busy(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, machine_cores: int, others_s: float, expected: float
) -> None:
    clock = {"machine": 0.0, "now": 0.0}
    monkeypatch.setattr("autotune.contention.machine_cpu_s", lambda: clock["machine"])
    monkeypatch.setattr("autotune.contention.cpu_s", lambda pid: 0.0)
    monkeypatch.setattr("autotune.contention.time.perf_counter", lambda: clock["now"])
    monkeypatch.setattr("autotune.contention.psutil.cpu_count", lambda: machine_cores)
    load = Load()
    clock.update(machine=others_s + 15.0, now=10.0)
    assert MEASURED_BUSY_CORES(load, num_cores, 15.0) == pytest.approx(expected)


def test_progress_names_what_is_under_way(tmp_path: Path) -> None:
    started: list[str] = []
    probe(CPU, cache_dir=tmp_path, only=[Check(name="it", run=works)], on_start=started.append)
    assert started == ["device", "it"]


def test_a_device_that_is_not_there_is_the_users_error(tmp_path: Path) -> None:
    absent = next((b for b in map(backends.get, backends.names()) if b.unavailable()), None)
    if absent is None:
        pytest.skip("this machine has every device")
    with pytest.raises(AutotuneError, match="cannot be probed"):
        probe(absent, cache_dir=tmp_path, only=[])


def test_what_was_not_probed_is_unknown_and_not_allowed(tmp_path: Path) -> None:
    hardware = probe_these(tmp_path)
    assert hardware.capability("matmul.fp8").reason == "unknown: not probed"
    assert not hardware.allows("matmul.fp8")


def _matmul(precision: str, gflop_per_s: float) -> Capability:
    return Capability(name=f"matmul.{precision}", value=True, measured={"gflop_per_s": gflop_per_s})


def _attention(name: str, forward_ms: float, backward_ms: float) -> Capability:
    measured = {"forward_ms": forward_ms, "backward_ms": backward_ms}
    return Capability(name=f"attention.{name}", value=True, measured=measured)


def test_every_precision_that_is_probed_can_be_judged() -> None:
    figures = [_matmul(p, 100.0 + place) for place, p in enumerate(("fp32", "tf32", "bf16", "fp16", "fp8"))]
    assert all(capability.value for capability in _judge(figures))


def test_fp16_three_times_behind_fp32_is_too_slow() -> None:
    fp32, fp16 = _judge([_matmul("fp32", 181.0), _matmul("fp16", 0.98)])
    assert fp32.value
    assert (fp16.value, fp16.reason) == (False, "too slow: 0.98 GFLOP/s against 181 in fp32")


def test_fp32_is_never_too_slow() -> None:
    assert all(capability.value for capability in _judge([_matmul("fp32", 60.0), _matmul("bf16", 900.0)]))


def test_bf16_is_not_compared_with_fp16() -> None:
    verdicts = {c.name: c.value for c in _judge([_matmul("fp32", 60), _matmul("bf16", 90), _matmul("fp16", 900)])}
    assert verdicts["matmul.bf16"]


def test_a_refused_precision_is_nobodys_rival() -> None:
    refused = Capability(name="matmul.fp32", value=False, reason="refused: no")
    assert list(_judge([refused, _matmul("bf16", 1.0)])) == [refused, _matmul("bf16", 1.0)]


def test_a_kernel_three_times_behind_another_of_its_precision_is_too_slow() -> None:
    slow, _ = _judge([_attention("sdpa_math.bf16", 3.0, 6.0), _attention("sdpa_flash.bf16", 1.0, 2.0)])
    assert slow.reason == "too slow: 9 ms against 3 in sdpa_flash.bf16"


def test_written_out_fp32_attention_is_the_baseline_and_stays() -> None:
    baseline, _ = _judge([_attention("eager.fp32", 30.0, 60.0), _attention("sdpa_flash.fp32", 1.0, 2.0)])
    assert baseline.value


def test_fp32_kernels_are_not_measured_against_bf16() -> None:
    fp32, _ = _judge([_attention("sdpa.fp32", 30.0, 60.0), _attention("sdpa.bf16", 1.0, 2.0)])
    assert fp32.value


@pytest.fixture(scope="module")
def on_this_cpu(tmp_path_factory: pytest.TempPathFactory) -> Hardware:
    """Every standard check but torch.compile, really run."""
    wanted = [check for check in checks.standard(CPU) if not check.name.startswith("compile.")]
    return probe(CPU, cache_dir=tmp_path_factory.mktemp("cache"), only=wanted)


def test_the_baseline_runs_on_every_cpu(on_this_cpu: Hardware) -> None:
    for name in ("matmul.fp32", "attention.eager.fp32", "attention.sdpa.fp32", "optimizer.foreach", "channels_last"):
        assert on_this_cpu.capability(name).reason == "ok", name
    assert on_this_cpu.capability("matmul.fp32").measured["gflop_per_s"] > 0


def test_every_result_has_a_reason_of_a_known_kind(on_this_cpu: Hardware) -> None:
    for capability in on_this_cpu.capabilities:
        kinds = ("ok",) if capability.value else ("refused: ", "too slow: ")
        assert capability.reason.startswith(kinds), capability
        assert "\n" not in capability.reason
        assert len(capability.reason) <= 130


def test_kernels_that_a_cpu_lacks_are_refused(on_this_cpu: Hardware) -> None:
    assert "No viable backend" in on_this_cpu.capability("attention.sdpa_cudnn.fp32").reason
    assert on_this_cpu.capability("attention.flash_attn.bf16").reason == "refused: needs a CUDA device"


def test_attention_is_timed_forward_and_backward(on_this_cpu: Hardware) -> None:
    measured = on_this_cpu.capability("attention.eager.fp32").measured
    assert set(measured) == {"forward_ms", "backward_ms"}
    assert min(measured.values()) > 0


def test_the_standard_checks_cover_every_compile_mode_and_end_with_them() -> None:
    names = [check.name for check in checks.standard(CPU)]
    assert names[-2:] == ["compile.default", "allocator.retain"]
    assert len(names) == len(set(names))


def test_other_threads_are_timed_against_torchs_own_choice_which_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(compute, "mean_s_of", lambda *_: 6.0 / torch.get_num_threads())
            assert compute.threads(CPU, 1) == {"speed_ratio": 0.5}
            assert compute.threads(CPU, 3) == {"speed_ratio": 1.5}
        assert 0.1 < compute.threads(CPU, 1)["speed_ratio"] < 10, "really timed"
        with pytest.raises(RefusalError, match="torch's own choice"):
            compute.threads(CPU, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_are_halved_down_to_one_and_are_a_cpus() -> None:
    assert [thread_counts(cores) for cores in (1, 2, 6)] == [(1,), (2, 1), (6, 3, 1)]
    assert any(check.name == "threads.1" for check in checks.standard(CPU))
    assert not any(check.name.startswith("threads.") for check in checks.standard(backends.get("cuda")))


def test_a_probe_is_kept_for_the_threads_that_the_environment_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for told in ("1", "2", "1"):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        found.append(probe(CPU, cache_dir=tmp_path, only=[Check(name="works", run=works)]))
    assert len(list(tmp_path.iterdir())) == 2
    assert found[0].probe_s == found[2].probe_s


def test_attention_that_is_off_from_fp32_is_refused() -> None:
    def without_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    with pytest.raises(RefusalError, match="off from fp32"):
        kernels._attention_figures(CPU, without_scale, "fp32", None)


def test_a_kernel_that_takes_no_mask_is_refused_with_its_time_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = kernels._attend

    def maskless(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None, *, kernel: Attention
    ) -> torch.Tensor:
        if kernel != "eager" and keep is not None:
            raise RuntimeError("No available kernel. Aborting execution.")
        return exact(q, k, v, keep, kernel="eager")

    monkeypatch.setattr(kernels, "_attend", maskless)
    with pytest.raises(RefusalError, match=r"No available kernel.*; runs without a mask$") as refused:
        kernels.attention(CPU, "sdpa_flash", "fp32")
    assert refused.value.figures[kernels.UNMASKED_MS] > 0


def test_a_missing_compiler_is_the_reason_when_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> object:
        raise RuntimeError("CppCompileError: [Errno 2] No such file or directory")

    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(RefusalError, match=r"no C\+\+ compiler on the PATH"):
        compute.compiled(CPU, "default")
