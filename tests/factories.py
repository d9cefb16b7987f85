"""Records made up for tests."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.backends.base import Capability, Device
from autotune.measurement import Interval, Lap, Measurement, Trial
from autotune.probe import Hardware
from autotune.profile import SCHEMA, Evidence, Figures, Profile, ProfiledDevice, ProfiledWorkload
from autotune.strategy import Strategy, baseline


def device(**changes: Any) -> Device:
    plain = Device(
        kind="cpu",
        name="Intel(R) Xeon(R) Processor",
        architecture="x86_64 AVX512",
        num_cores=2,
        memory_total_bytes=24 * 2**30,
        memory_free_bytes=20 * 2**30,
        versions={"torch": "2.13.0"},
    )
    return msgspec.structs.replace(plain, **changes)


def hardware(**refused: str) -> Hardware:
    """Everything runs but what is refused: ``matmul_fp16="too slow"`` (an underscore for the dot)."""
    reasons = {name.replace("__", "."): reason for name, reason in refused.items()}
    names = [f"matmul.{p}" for p in ("fp32", "tf32", "bf16", "fp16")]
    names += [
        "autocast.bf16",
        "autocast.fp16",
        "grad_scaler",
        "energy_counter",
        "compile.default",
        "compile.max-autotune",
        "allocator.retain",
        "threads.1",
    ]
    names += [
        f"attention.{a}.{p}" for a in ("eager", "sdpa", "sdpa_math", "sdpa_flash") for p in ("fp32", "bf16", "fp16")
    ]
    rate = {"matmul.fp32": 200.0, "matmul.bf16": 900.0, "matmul.fp16": 950.0, "matmul.tf32": 200.0}
    slow = {"eager": 4.0, "sdpa": 3.0, "sdpa_math": 5.0, "sdpa_flash": 2.0}

    def measured(name: str) -> dict[str, float]:
        if name in rate:
            return {"gflop_per_s": rate[name]}
        if name.startswith("attention."):
            return {"forward_ms": slow[name.split(".")[1]], "backward_ms": 1.0}
        if name == "threads.1":
            return {"speed_ratio": 0.5}
        return {}

    return Hardware(
        device=device(),
        capabilities=tuple(
            Capability(name=name, value=name not in reasons, reason=reasons.get(name, "ok"), measured=measured(name))
            for name in names
        ),
        probed_at="2026-11-21T00:00:00+00:00",
        probe_s=1.0,
    )


def plain_hardware() -> Hardware:
    """A device that runs nothing but the plain baseline's kernels, on one core."""
    plain = hardware()
    refused = tuple(
        msgspec.structs.replace(capability, value=False, reason="refused: scripted")
        for capability in plain.capabilities
        if capability.name not in ("matmul.fp32", "attention.eager.fp32")
    )
    kept = tuple(
        capability for capability in plain.capabilities if capability.name in ("matmul.fp32", "attention.eager.fp32")
    )
    return Hardware(
        device=device(num_cores=1), capabilities=kept + refused, probed_at=plain.probed_at, probe_s=plain.probe_s
    )


def measurement(samples_per_s: float = 10.0, **changes: Any) -> Measurement:
    plain = Measurement(
        samples_per_s=samples_per_s,
        tokens_per_s=samples_per_s * 270,
        step_ms=32_000 / samples_per_s,
        eval_samples_per_s=3 * samples_per_s,
        warm_up_s=0.1,
        loader_wait=0.0,
        peak_memory_bytes=2**30,
        epoch_s=(100 / samples_per_s,) * 4,
        losses=(0.7,) * 5,
    )
    return msgspec.structs.replace(plain, **changes)


def lap(seconds: float, padded_tokens: int = 100) -> Lap:
    return Lap(
        seconds=seconds,
        wait_s=0.0,
        num_steps=1,
        num_samples=8,
        num_tokens=50,
        padded_tokens=padded_tokens,
        padded_squares=padded_tokens,
        losses=(0.7,),
    )


def trial(number: int = 0, strategy: Strategy | None = None, **changes: Any) -> Trial:
    found = changes.pop("measurement", measurement())
    plain = Trial(
        number=number,
        strategy=strategy or baseline(32),
        outcome="ok",
        measurement=found,
        samples_per_s=found.samples_per_s if found else None,
        wall_s=5.0,
    )
    return msgspec.structs.replace(plain, **changes)


def profile(**changes: Any) -> Profile:
    own = device()
    figures = Figures(
        samples_per_s=50.0,
        tokens_per_s=13_500.0,
        step_ms=640.0,
        eval_samples_per_s=150.0,
        warm_up_s=0.2,
        loader_wait=0.001,
        peak_memory_bytes=600 * 2**20,
        projected_s=3333.0,
    )
    plain = Profile(
        schema=SCHEMA,
        created="2026-11-21T00:00:00+00:00",
        autotune="0.1.0",
        device=ProfiledDevice(
            fingerprint=own.fingerprint,
            kind=own.kind,
            name=own.name,
            architecture=own.architecture,
            num_cores=own.num_cores,
            memory_total_bytes=own.memory_total_bytes,
        ),
        workload=ProfiledWorkload(
            name="imdb", source="synthetic", global_batch=32, epochs=5, num_train=25_000, num_test=25_000
        ),
        strategy=Strategy(precision="bf16", micro_batch=8, accumulation=4, padding="buckets"),
        evidence=Evidence(
            objective="time",
            search_s=300.0,
            num_trials=20,
            versions={"torch": "2.13.0"},
            speedup=Interval(ratio=8.0, low=7.8, high=8.2),
            baseline_strategy=baseline(32),
            baseline=msgspec.structs.replace(figures, samples_per_s=6.0),
            best=figures,
        ),
    )
    return msgspec.structs.replace(plain, **changes)
