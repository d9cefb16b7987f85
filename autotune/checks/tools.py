"""What the checks share: results, refusals, the same numbers on every device, and a stopwatch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from autotune.backends.base import Backend, torch_device
from autotune.strategy import Precision

if TYPE_CHECKING:
    import torch

Figures = dict[str, float]


class RefusalError(Exception):
    """The device ran it and the result says that it must not be used; the text is the whole reason."""

    def __init__(self, reason: str, figures: Figures | None = None) -> None:
        """``figures`` are of what runs all the same."""
        super().__init__(reason)
        self.figures = figures or {}


def first_line(error: BaseException, limit: int = 108) -> str:
    """An error's first line that says something, cut to a whole sentence or else to ``limit`` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if len(text) <= limit:
        return text
    sentence, stop, _ = text[:limit].rpartition(". ")
    return sentence if stop else text[: limit - 1].rstrip() + "…"


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype that tensors of a precision have."""
    import torch

    return {
        "fp32": torch.float32,
        "tf32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp8": torch.float8_e4m3fn,
    }[precision]


def random_tensor(backend: Backend, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The same normal values on every device."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch_device(backend))


@contextlib.contextmanager
def precision_set(backend: Backend, precision: Precision) -> Iterator[None]:
    """fp32 matmuls computed as the precision says, inside."""
    backend.set_precision(precision)
    try:
        yield
    finally:
        backend.set_precision("fp32")


def require_finite(*tensors: torch.Tensor | None) -> None:
    """Raises RefusalError for a result that is missing, not finite or all zero."""
    for tensor in tensors:
        if tensor is None or not tensor.isfinite().all() or not tensor.any():
            raise RefusalError("the result is not finite, or all zero")


def mean_s_of(backend: Backend, call: Callable[[], object], budget_s: float) -> float:
    """The mean of all runs that the budget takes, after one to warm up. Seconds."""
    call()
    backend.synchronize()
    start_s, num_runs = time.perf_counter(), 0
    while num_runs == 0 or time.perf_counter() - start_s < budget_s:
        call()
        backend.synchronize()
        num_runs += 1
    return (time.perf_counter() - start_s) / num_runs


def best_s_of(backend: Backend, call: Callable[[], object], budget_s: float) -> float:
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
