"""What the probe runs on a device: one small function per capability, each timed. Runs in the probe's child process.

A check returns its figures, or raises: the error's first line is the refusal. What is too slow to be worth a search is
judged afterwards, from the figures (autotune.probe).

Shapes: B batch, H heads, T tokens, K features a head, N matrix side.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from autotune.backends.base import Backend, torch_device
from autotune.strategy import Allocator, Attention, Precision

if TYPE_CHECKING:
    import torch

Figures = dict[str, float]
Attend = Callable[..., "torch.Tensor"]
"""Takes q, k, v [B, H, T, K] and the mask of real tokens [B, T] or None; gives [B, H, T, K]."""

B, H, T, K = 4, 8, 256, 32
LENGTHS = (256, 200, 140, 90)
"""Real tokens of the attention check's four sequences; the rest is padding."""

ATTENTION_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest error allowed against written-out fp32 attention, as a part of its largest value. Kernels that are right came
to at most 1e-6 in fp32, 1.4e-2 in bf16 and 2e-3 in fp16 (all kernels of an x86 CPU, torch 2.13)."""

_MATMUL_S = 0.25
_ATTENTION_S = 0.1
_COPY_BYTES = 128 * 2**20
_FRESH_BYTES = 64 * 2**20


class RefusalError(Exception):
    """The device ran it and the result says that it must not be used; the text is the whole reason."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One capability and how to find out about it."""

    name: str
    run: Callable[[Backend], Figures] | None = None
    """Importable by name, so that a child process can be told to run it. None: see ``follows``."""
    follows: str | None = None
    """The capability whose value this one takes over: the two differ in tuning only."""
    time_limit_s: float = 20.0
    """After this long without an answer the child is killed and the capability refused."""


def standard(backend: Backend) -> tuple[Check, ...]:
    """Every capability worth knowing of a device, quick ones first and torch.compile last."""
    checks = [Check(name=f"matmul.{p}", run=functools.partial(matmul, precision=p)) for p in get_args(Precision)]
    checks += [Check(name=f"autocast.{p}", run=functools.partial(autocast, precision=p)) for p in ("bf16", "fp16")]
    checks += [
        Check(name="grad_scaler", run=grad_scaler),
        Check(name="optimizer.foreach", run=functools.partial(optimizer, option="foreach")),
        Check(name="optimizer.fused", run=functools.partial(optimizer, option="fused")),
        Check(name="channels_last", run=channels_last),
        Check(name="memory_copy", run=memory_copy),
    ]
    checks += [
        Check(name=f"attention.{kernel}.{p}", run=functools.partial(attention, kernel=kernel, precision=p))
        for kernel in get_args(Attention)
        for p in ATTENTION_PRECISIONS
    ]
    checks += [
        Check(name=f"attention.flash_attn.{p}", run=functools.partial(flash_attn, precision=p), time_limit_s=60.0)
        for p in ("bf16", "fp16")
    ]
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


def matmul(backend: Backend, precision: Precision) -> Figures:
    """GFLOP/s of one square matmul, the largest that a quarter of a second allows, and its side.

    TF32 that computes what fp32 does, and no faster, is refused.
    """
    import torch

    side_limit = 1024 if backend.device_type == "cpu" else 8192
    dtype = _dtype(precision)
    with _precision(backend, precision):
        side = 256
        while True:
            a_NN, b_NN = (_random(backend, (side, side), seed).to(dtype) for seed in (1, 2))
            multiply = functools.partial(torch.matmul, a_NN, b_NN)
            best_s = _best_s(backend, multiply, 0.0)
            if side >= side_limit or best_s * 8 > _MATMUL_S / 4:
                break
            side *= 2
        best_s = min(best_s, _best_s(backend, multiply, _MATMUL_S))
    if precision == "tf32":
        _refuse_tf32_without_effect(backend, side)
    return {"gflop_per_s": 2 * side**3 / best_s / 1e9, "side_elements": float(side)}


def autocast(backend: Backend, precision: Precision) -> Figures:
    """Runs a linear layer forward and backward under autocast; no figures."""
    import torch

    layer = torch.nn.Linear(64, 64).to(torch_device(backend))
    with torch.autocast(backend.device_type, dtype=_dtype(precision)):
        output = layer(_random(backend, (16, 64), 1))
    if output.dtype != _dtype(precision):
        raise RefusalError(f"a linear layer under autocast gives {output.dtype}")
    output.float().sum().backward()
    _require_finite(output, layer.weight.grad)
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
        loss = layer(_random(backend, (16, 64), 1)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(sgd)
    _require_finite(layer.weight.grad)
    scaler.step(sgd)
    scaler.update()
    if torch.equal(before, layer.weight):
        raise RefusalError("the weights do not move under a GradScaler")
    return {}


def optimizer(backend: Backend, option: str) -> Figures:
    """Milliseconds of one AdamW step over a million parameters in 16 tensors."""
    import torch

    parameters = [torch.nn.Parameter(_random(backend, (256, 256), seed)) for seed in range(16)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adamw = torch.optim.AdamW(parameters, lr=1e-3, **{option: True})  # type: ignore[arg-type]
    before = parameters[0].detach().clone()
    adamw.step()
    _require_finite(parameters[0])
    if torch.equal(before, parameters[0]):
        raise RefusalError("the weights do not move")
    return {"step_ms": 1e3 * _best_s(backend, adamw.step, 0.05)}


def channels_last(backend: Backend) -> Figures:
    """Milliseconds of a 3x3 convolution, forward and backward, in either memory format."""
    import torch

    figures = {}
    for key, memory_format in (("contiguous_ms", torch.contiguous_format), ("channels_last_ms", torch.channels_last)):
        layer = torch.nn.Conv2d(32, 64, 3, padding=1, device=torch_device(backend))
        layer.to(memory_format=memory_format)  # type: ignore[call-overload]
        images = _random(backend, (8, 32, 32, 32), 1).to(memory_format=memory_format).requires_grad_()

        def step(layer: torch.nn.Conv2d = layer, images: torch.Tensor = images) -> None:
            layer.zero_grad()
            layer(images).square().mean().backward()

        step()
        _require_finite(layer.weight.grad)
        figures[key] = 1e3 * _best_s(backend, step, 0.1)
    return figures


def memory_copy(backend: Backend) -> Figures:
    """GiB copied per second, from one 128 MiB buffer to another: each byte is read once and written once."""
    import torch

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=torch_device(backend))
    target = torch.empty_like(source)
    return {"gib_per_s": _COPY_BYTES / 2**30 / _best_s(backend, lambda: target.copy_(source), 0.2)}


def allocator(backend: Backend, setting: Allocator) -> Figures:
    """Milliseconds to make and fill a 64 MiB tensor, as the activations of a step are: by default, then as set."""
    import torch

    def fresh() -> None:
        torch.zeros(_FRESH_BYTES, dtype=torch.uint8, device=torch_device(backend)).add_(1)

    default_ms = 1000 * _best_s(backend, fresh, 0.2)
    backend.set_allocator(setting)
    fresh()
    return {"default_ms": default_ms, f"{setting}_ms": 1000 * _best_s(backend, fresh, 0.2)}


def attention(backend: Backend, kernel: Attention, precision: Precision) -> Figures:
    """Milliseconds forward and backward of one kernel with a padding mask, as padded batches call it.

    Output and gradients must agree with written-out fp32 attention within TOLERANCES. A kernel that refuses the mask
    is refused, and the reason says whether it runs without one.
    """
    keep_BT = _padding_mask(backend)
    try:
        return _attention_figures(backend, functools.partial(_attend, kernel=kernel), precision, keep_BT)
    except RefusalError:
        raise
    except Exception as exc:
        if not kernel.startswith("sdpa"):
            raise
        try:
            figures = _attention_figures(backend, functools.partial(_attend, kernel=kernel), precision, None)
        except Exception:  # noqa: BLE001 - the first error is the reason
            raise exc from None
        raise RefusalError(
            f"{first_line(exc, 80)}; runs without a mask, {figures['forward_ms']:.2g} ms forward"
        ) from exc


def flash_attn(backend: Backend, precision: Precision) -> Figures:
    """Milliseconds forward and backward, without a mask, of the first that runs of FA3, FA2, torch's FA4 and FA3."""
    if backend.device_type != "cuda":
        raise RefusalError("needs a CUDA device")
    errors = []
    for attempt in (_flash_attn_interface, _flash_attn_package, _torch_fa4, _torch_fa3):
        try:
            with attempt() as attend:
                return _attention_figures(backend, attend, precision, None)
        except ImportError as exc:
            package = (exc.name or "flash_attn").partition(".")[0]
            errors.append(f"{package} is not installed")
        except Exception as exc:  # noqa: BLE001 - any way to fail is a refusal, recorded below
            errors.append(first_line(exc, 60))
    raise RefusalError("; ".join(dict.fromkeys(errors)))


def compiled(backend: Backend, mode: str) -> Figures:
    """Seconds until a compiled two-line function has answered, the compiler's caches empty. It must agree with eager.

    On a CPU inductor first compiles and loads a program for each instruction set (9 s on two cores, torch 2.13); what
    /proc/cpuinfo says is trusted instead, and only where that fails is inductor left to find out.
    """
    import torch
    import torch._inductor.config as inductor

    lacking = _missing_toolchain(backend)
    inputs_NN = _random(backend, (64, 64), 1)
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


def first_line(error: BaseException, limit: int = 108) -> str:
    """An error's first line that says something, cut to a whole sentence or else to ``limit`` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if len(text) <= limit:
        return text
    sentence, stop, _ = text[:limit].rpartition(". ")
    return sentence if stop else text[: limit - 1].rstrip() + "…"


def _attention_figures(backend: Backend, attend: Attend, precision: Precision, keep_BT: torch.Tensor | None) -> Figures:
    """Checks once against written-out fp32, then times."""
    import torch

    dtype = _dtype(precision)
    written_out: Attend = functools.partial(_attend, kernel="eager")
    qkv = [_random(backend, (B, H, T, K), seed).to(dtype).requires_grad_() for seed in (1, 2, 3)]
    gradient_BHTK = _random(backend, (B, H, T, K), 4).to(dtype)
    if keep_BT is not None:
        gradient_BHTK = gradient_BHTK * keep_BT[:, None, :, None]  # no loss comes from padding
    with _precision(backend, "fp32"):
        output_BHTK = attend(*qkv, keep_BT)
        results = (output_BHTK, *torch.autograd.grad(output_BHTK, qkv, gradient_BHTK))
        exact_qkv = [tensor.detach().float().requires_grad_() for tensor in qkv]
        exact_BHTK = written_out(*exact_qkv, keep_BT)
        exacts = (exact_BHTK, *torch.autograd.grad(exact_BHTK, exact_qkv, gradient_BHTK.float()))
        _require_finite(*results)
        for what, result, exact in zip(("output", "dq", "dk", "dv"), results, exacts, strict=True):
            error = ((result.float() - exact).abs().max() / exact.abs().max()).item()
            if error > TOLERANCES[precision]:
                raise RefusalError(f"{what} is {error:.1g} off from fp32, more than {TOLERANCES[precision]:g}")
        forward_s = backward_s = float("inf")
        spent_s, num_runs = 0.0, 0
        while num_runs < 1 or spent_s < _ATTENTION_S:
            backend.synchronize()
            start_s = time.perf_counter()
            output_BHTK = attend(*qkv, keep_BT)
            backend.synchronize()
            middle_s = time.perf_counter()
            torch.autograd.grad(output_BHTK, qkv, gradient_BHTK)
            backend.synchronize()
            end_s = time.perf_counter()
            forward_s, backward_s = min(forward_s, middle_s - start_s), min(backward_s, end_s - middle_s)
            spent_s, num_runs = spent_s + end_s - start_s, num_runs + 1
    return {"forward_ms": 1e3 * forward_s, "backward_ms": 1e3 * backward_s}


def _attend(
    q_BHTK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor, keep_BT: torch.Tensor | None, *, kernel: Attention
) -> torch.Tensor:
    """The very function that the models call."""
    from autotune.models.attention import attend

    return attend(q_BHTK, k_BHTK, v_BHTK, None if keep_BT is None else keep_BT[:, None, None, :], kernel)


@contextlib.contextmanager
def _flash_attn_interface() -> Iterator[Attend]:
    yield functools.partial(_attend_packaged, importlib.import_module("flash_attn_interface").flash_attn_func)


@contextlib.contextmanager
def _flash_attn_package() -> Iterator[Attend]:
    yield functools.partial(_attend_packaged, importlib.import_module("flash_attn").flash_attn_func)


def _attend_packaged(
    function: Callable[..., Any], q_BHTK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor, _: None
) -> torch.Tensor:
    """The packages take [B, T, H, K]; FA3's early releases return the softmax's statistics as well."""
    output = function(*(tensor.transpose(1, 2) for tensor in (q_BHTK, k_BHTK, v_BHTK)))
    output_BTHK: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return output_BTHK.transpose(1, 2)


@contextlib.contextmanager
def _torch_flash(implementation: str) -> Iterator[Attend]:
    import torch.nn.attention

    activate: Callable[[str], None] = torch.nn.attention.activate_flash_attention_impl
    activate(implementation)
    try:
        yield functools.partial(_attend, kernel="sdpa_flash")
    finally:
        torch.nn.attention.restore_flash_attention_impl()


_torch_fa3 = functools.partial(_torch_flash, "FA3")
_torch_fa4 = functools.partial(_torch_flash, "FA4")


def _refuse_tf32_without_effect(backend: Backend, side: int) -> None:
    """Refuses TF32 where a matmul is as exact as in fp32 (to a factor of 4: another kernel rounds otherwise) and not
    a tenth faster, the two timed in turns.
    """
    import torch

    a_NN, b_NN = (_random(backend, (side, side), seed) for seed in (1, 2))
    exact_NN = a_NN.cpu().double() @ b_NN.cpu().double()
    precisions: tuple[Precision, ...] = ("fp32", "tf32")
    errors, bests_s = {}, dict.fromkeys(precisions, float("inf"))
    for precision in precisions * 3:
        with _precision(backend, precision):
            errors[precision] = ((a_NN @ b_NN).cpu().double() - exact_NN).abs().max().item()
            run_s = _best_s(backend, functools.partial(torch.matmul, a_NN, b_NN), _MATMUL_S / 10)
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


def _padding_mask(backend: Backend) -> torch.Tensor:
    import torch

    lengths_B = torch.tensor(LENGTHS, device=torch_device(backend))
    return torch.arange(T, device=torch_device(backend))[None, :] < lengths_B[:, None]


def _dtype(precision: Precision) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _random(backend: Backend, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The same normal values on every device."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch_device(backend))


@contextlib.contextmanager
def _precision(backend: Backend, precision: Precision) -> Iterator[None]:
    backend.set_precision(precision)
    try:
        yield
    finally:
        backend.set_precision("fp32")


def _require_finite(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is None or not tensor.isfinite().all() or not tensor.any():
            raise RefusalError("the result is not finite, or all zero")


def _best_s(backend: Backend, call: Callable[[], object], budget_s: float) -> float:
    """The shortest of at least two runs, after one to warm up, repeated until the budget is spent. Seconds."""
    call()
    backend.synchronize()
    best_s, spent_s, num_runs = float("inf"), 0.0, 0
    while num_runs < 2 or spent_s < budget_s:
        start_s = time.perf_counter()
        call()
        backend.synchronize()
        run_s = time.perf_counter() - start_s
        best_s, spent_s, num_runs = min(best_s, run_s), spent_s + run_s, num_runs + 1
    return best_s
