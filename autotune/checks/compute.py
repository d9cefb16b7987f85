"""Checks of arithmetic, memory, optimizers and the compiler. Shapes: N matrix side, R rows that are compared."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
import time
import warnings
from typing import TYPE_CHECKING

from autotune.backends.base import Backend, torch_device
from autotune.checks.tools import (
    Figures,
    RefusalError,
    best_s_of,
    dtype_of,
    mean_s_of,
    precision_set,
    random_tensor,
    require_finite,
)
from autotune.strategy import Allocator, Precision

if TYPE_CHECKING:
    import torch

_MATMUL_S = 0.25
_THREADS_SIDE = 1024
_DRAWN_SIDE = 1024
_COMPARED_ROWS = 64
"""Of a product that the host computes in fp64: all rows of a large one would take it longer than the whole probe."""
THREADS_SPEED = "speed_ratio"
_COPY_BYTES = 128 * 2**20
_FRESH_BYTES = 64 * 2**20


def matmul(backend: Backend, precision: Precision) -> Figures:
    """GFLOP/s of one square matmul, the largest that a quarter of a second allows, and its side.

    TF32 that computes what fp32 does, and no faster, is refused; fp8 where torchao, which trains in it, is missing.
    """
    import torch

    if precision == "fp8" and importlib.util.find_spec("torchao") is None:
        raise RefusalError("torchao is not installed")
    side_limit = 1024 if backend.device_type == "cpu" else 8192
    dtype = dtype_of(precision)
    with precision_set(backend, precision):
        side = 256
        while True:
            a_NN, b_NN = (_square(backend, side, seed).to(dtype) for seed in (1, 2))
            multiply = functools.partial(_scaled_matmul if precision == "fp8" else torch.matmul, a_NN, b_NN)
            best_s = best_s_of(backend, multiply, 0.0)
            if side >= side_limit or best_s * 8 > _MATMUL_S / 4:
                break
            side *= 2
        best_s = min(best_s, best_s_of(backend, multiply, _MATMUL_S))
    if precision == "tf32":
        _refuse_tf32_without_effect(backend, side)
    return {"gflop_per_s": 2 * side**3 / best_s / 1e9, "side_elements": float(side)}


def _square(backend: Backend, side: int, seed: int) -> torch.Tensor:
    """Random numbers, the same on every device; a large matrix repeats them, as drawing each would take seconds."""
    block = min(side, _DRAWN_SIDE)
    return random_tensor(backend, (block, block), seed).repeat(side // block, side // block)


def _scaled_matmul(a_NN: torch.Tensor, b_NN: torch.Tensor) -> torch.Tensor:
    """Of 8-bit numbers; the kernel wants the second by columns."""
    import torch

    one = torch.ones((), device=a_NN.device)
    product_NN: torch.Tensor = torch._scaled_mm(a_NN, b_NN.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return product_NN


def autocast(backend: Backend, precision: Precision) -> Figures:
    """Runs a linear layer forward and backward under autocast; no figures."""
    import torch

    layer = torch.nn.Linear(64, 64).to(torch_device(backend))
    with torch.autocast(backend.device_type, dtype=dtype_of(precision)):
        output = layer(random_tensor(backend, (16, 64), 1))
    if output.dtype != dtype_of(precision):
        raise RefusalError(f"a linear layer under autocast gives {output.dtype}")
    output.float().sum().backward()
    require_finite(output, layer.weight.grad)
    return {}


def grad_scaler(backend: Backend) -> Figures:
    """Scales, unscales and steps once in fp16: gradients must be finite and not zero, and the weight must move.

    On MPS they were zero once, without an error (pytorch/pytorch#184286).
    """
    import torch

    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).to(torch_device(backend))
    before = layer.weight.detach().clone()
    scaler = torch.amp.GradScaler(backend.device_type, init_scale=2.0**10)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.autocast(backend.device_type, dtype=torch.float16):
        loss = layer(random_tensor(backend, (16, 64), 1)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(sgd)
    require_finite(layer.weight.grad)
    scaler.step(sgd)
    scaler.update()
    if torch.equal(before, layer.weight):
        raise RefusalError("the weights do not move under a GradScaler")
    return {}


def optimizer(backend: Backend, option: str) -> Figures:
    """Milliseconds of one AdamW step over a million parameters in 16 tensors."""
    import torch

    parameters = [torch.nn.Parameter(random_tensor(backend, (256, 256), seed)) for seed in range(16)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adamw = torch.optim.AdamW(parameters, lr=1e-3, **{option: True})  # type: ignore[arg-type]
    before = parameters[0].detach().clone()
    adamw.step()
    require_finite(parameters[0])
    if torch.equal(before, parameters[0]):
        raise RefusalError("the weights do not move")
    return {"step_ms": 1e3 * best_s_of(backend, adamw.step, 0.05)}


def channels_last(backend: Backend) -> Figures:
    """Milliseconds of a 3x3 convolution, forward and backward, in either memory format."""
    import torch

    figures = {}
    for key, memory_format in (("contiguous_ms", torch.contiguous_format), ("channels_last_ms", torch.channels_last)):
        layer = torch.nn.Conv2d(32, 64, 3, padding=1, device=torch_device(backend))
        layer.to(memory_format=memory_format)  # type: ignore[call-overload]
        images = random_tensor(backend, (8, 32, 32, 32), 1).to(memory_format=memory_format).requires_grad_()

        def step(layer: torch.nn.Conv2d = layer, images: torch.Tensor = images) -> None:
            layer.zero_grad()
            layer(images).square().mean().backward()

        step()
        require_finite(layer.weight.grad)
        figures[key] = 1e3 * best_s_of(backend, step, 0.1)
    return figures


def memory_copy(backend: Backend) -> Figures:
    """GiB copied per second, from one 128 MiB buffer to another: each byte is read once and written once."""
    import torch

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=torch_device(backend))
    target = torch.empty_like(source)
    return {"gib_per_s": _COPY_BYTES / 2**30 / best_s_of(backend, lambda: target.copy_(source), 0.2)}


def energy_counter(backend: Backend) -> Figures:
    """Refused where nobody counts the joules that the device draws."""
    if backend.energy_j() is None:
        raise RefusalError("there is none that can be read")
    return {}


def threads(backend: Backend, count: int) -> Figures:
    """How many times as fast as with torch's own choice a matmul is on so many threads, the two timed in turns.

    That choice itself is refused. A run's seconds are the mean of several periods of the kernel's scheduler: under a
    cgroup's quota the shortest run is one that began a period, before its threads were stopped.
    """
    import torch

    own = torch.get_num_threads()
    if count == own:
        raise RefusalError("torch's own choice")
    a_NN, b_NN = (random_tensor(backend, (_THREADS_SIDE, _THREADS_SIDE), seed) for seed in (1, 2))
    multiply = functools.partial(torch.matmul, a_NN, b_NN)
    bests_s = {own: float("inf"), count: float("inf")}
    try:
        for num_threads in (own, count) * 2:
            torch.set_num_threads(num_threads)
            bests_s[num_threads] = min(bests_s[num_threads], mean_s_of(backend, multiply, _MATMUL_S))
    finally:
        torch.set_num_threads(own)
    return {THREADS_SPEED: bests_s[own] / bests_s[count]}


def allocator(backend: Backend, setting: Allocator) -> Figures:
    """Milliseconds to make and fill a 64 MiB tensor, as the activations of a step are: by default, then as set."""
    import torch

    def fresh() -> None:
        torch.zeros(_FRESH_BYTES, dtype=torch.uint8, device=torch_device(backend)).add_(1)

    default_ms = 1000 * best_s_of(backend, fresh, 0.2)
    backend.set_allocator(setting)
    fresh()
    return {"default_ms": default_ms, f"{setting}_ms": 1000 * best_s_of(backend, fresh, 0.2)}


def step_graph(backend: Backend) -> Figures:
    """Milliseconds of a small model's optimizer step, launched kernel by kernel and replayed as one CUDA graph. Both
    must train the same weights.
    """
    import torch

    layers = [part for _ in range(8) for part in (torch.nn.Linear(64, 64), torch.nn.GELU())]
    plain = torch.nn.Sequential(*layers).to(torch_device(backend))
    models = (plain, copy.deepcopy(plain))
    inputs_BN, targets_BN = (random_tensor(backend, (16, 64), seed) for seed in (1, 2))
    launched, recorded = (
        functools.partial(
            _trained, model, torch.optim.AdamW(model.parameters(), capturable=True), inputs_BN, targets_BN
        )
        for model in models
    )
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with warnings.catch_warnings(), torch.cuda.stream(stream):
        warnings.simplefilter("ignore")  # that a capturable optimizer runs unrecorded, which it does at first
        recorded()
        launched()
    backend.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        recorded()
    for _ in range(5):
        launched()
        graph.replay()
    backend.synchronize()
    if not all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*map(_weights, models), strict=True)):
        raise RefusalError("a replayed step trains other weights than a launched one")
    return {
        "launched_ms": 1e3 * best_s_of(backend, launched, 0.1),
        "replayed_ms": 1e3 * best_s_of(backend, graph.replay, 0.1),
    }


def _weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.parameters())


def _trained(
    model: torch.nn.Module, adamw: torch.optim.Optimizer, inputs_BN: torch.Tensor, targets_BN: torch.Tensor
) -> None:
    (model(inputs_BN) - targets_BN).square().mean().backward()
    adamw.step()
    adamw.zero_grad(set_to_none=True)


def compiled(backend: Backend, mode: str) -> Figures:
    """Seconds until a compiled two-line function has answered, the compiler's caches empty. It must agree with eager.

    On a CPU inductor first compiles and loads a program for each instruction set (9 s on two cores, torch 2.13); what
    /proc/cpuinfo says is trusted instead, and only where that fails is inductor left to find out.
    """
    import torch
    import torch._inductor.config as inductor

    lacking = _missing_toolchain(backend)
    inputs_NN = random_tensor(backend, (64, 64), 1)
    with tempfile.TemporaryDirectory(prefix="compile-") as folder:
        # the compilers read these when they first run
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        os.environ["TRITON_CACHE_DIR"] = folder
        start_s = time.perf_counter()
        try:
            with inductor.patch({"compile_threads": 1, "cpp.vec_isa_ok": True}):
                output_N = torch.compile(_two_lines, mode=mode)(inputs_NN)
        except Exception as exc:
            if lacking:
                raise RefusalError(lacking) from exc
            torch.compiler.reset()
            start_s = time.perf_counter()
            with inductor.patch({"compile_threads": 1}):
                output_N = torch.compile(_two_lines, mode=mode)(inputs_NN)
        backend.synchronize()
        first_call_s = time.perf_counter() - start_s
        if not torch.allclose(output_N, _two_lines(inputs_NN), atol=1e-4):
            raise RefusalError("the compiled function's result differs from eager's")
        torch.compiler.reset()
    return {"first_call_s": first_call_s}


def _refuse_tf32_without_effect(backend: Backend, side: int) -> None:
    """Refuses TF32 where a matmul is as exact as in fp32 (to a factor of 4: another kernel rounds otherwise) and not
    a tenth faster, the two timed in turns.
    """
    import torch

    a_NN, b_NN = (_square(backend, side, seed) for seed in (1, 2))
    exact_RN = a_NN[:_COMPARED_ROWS].cpu().double() @ b_NN.cpu().double()
    precisions: tuple[Precision, ...] = ("fp32", "tf32")
    errors, bests_s = {}, dict.fromkeys(precisions, float("inf"))
    for precision in precisions * 3:
        with precision_set(backend, precision):
            product_RN = (a_NN @ b_NN)[:_COMPARED_ROWS]
            errors[precision] = (product_RN.cpu().double() - exact_RN).abs().max().item()
            run_s = best_s_of(backend, functools.partial(torch.matmul, a_NN, b_NN), _MATMUL_S / 10)
            bests_s[precision] = min(bests_s[precision], run_s)
    if errors["tf32"] <= 4 * errors["fp32"] and bests_s["tf32"] > 0.9 * bests_s["fp32"]:
        own, fp32 = (2 * side**3 / bests_s[precision] / 1e9 for precision in ("tf32", "fp32"))
        raise RefusalError(f"computes the same as fp32 here: {own:.3g} GFLOP/s against {fp32:.3g}")


def _missing_toolchain(backend: Backend) -> str | None:
    """What torch.compile needs on this device and does not find; None where it finds it."""
    if backend.device_type == "cpu":
        compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl" if sys.platform == "win32" else "c++")
        if not any(compiler and shutil.which(compiler) for compiler in compilers):
            return "no C++ compiler on the PATH (g++ or clang++)"
    elif backend.device_type == "cuda":
        try:
            importlib.import_module("triton")
        except ImportError:
            return "triton is not installed"
    return None


def _two_lines(inputs_NN: torch.Tensor) -> torch.Tensor:
    hidden_NN = inputs_NN.sin() * 2 + 1
    return hidden_NN.relu().sum(-1)
