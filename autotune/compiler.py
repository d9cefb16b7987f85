"""torch.compile: what of a run is compiled and how, where that is kept, and what the compiler has done so far."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autotune.models.blocks import find_blocks
from autotune.step import Loss, Step
from autotune.store import cache_dir
from autotune.strategy import Strategy
from autotune.workloads.base import CrossEntropy

KEPT_SHARE = 0.5
"""Of the activations' memory, what ``checkpoint = memory_budget`` has the compiler keep."""


def compile_model(model: nn.Module, strategy: Strategy) -> None:
    """Has the whole model compiled, or each of its repeated blocks, when it first runs; nothing without ``compile``."""
    blocks = find_blocks(model)
    for module in (model, *blocks):
        module._compiled_call_impl = None  # as of an earlier strategy
    if strategy.compile != "none":
        for module in [model] if strategy.compile_scope == "model" else blocks:
            _compile(module, **_options(strategy))


class CompiledLoss:
    """The built-in loss, compiled beside the model or its blocks: written out, the cross-entropy of a language model's
    logits takes several copies of them in fp32."""

    def __init__(self, loss: Loss, strategy: Strategy) -> None:
        self._loss = torch.compile(loss, **_options(strategy))
        self.num_graphs = 0
        """That were compiled of it so far."""

    def __call__(self, output: Any, targets: Any) -> Tensor:
        before = num_compiled()
        found: Tensor = self._loss(output, targets)
        self.num_graphs += num_compiled() - before
        return found


def loss_compiler(strategy: Strategy, loss: Loss) -> Callable[[Loss], Loss] | None:
    """Compiles what is made of the built-in loss; a loss of the user's own is left as it is."""
    if strategy.compile == "none" or not isinstance(loss, CrossEntropy):
        return None
    return functools.partial(CompiledLoss, strategy=strategy)


def prepare_compiler(strategy: Strategy) -> None:
    """What is compiled is kept in autotune's cache folder, unless the user names another: training starts with what the
    search has compiled.

    Inductor compiles a test program for every CPU instruction set before its first kernel, 8 s on two cores; that the
    kernels themselves compile and run is test enough.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # importing the compiler has named its own folder already, where the user has named none
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir() / "compiled" / "inductor")
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "compiled" / "triton"))
    if hasattr(inductor.cpp, "vec_isa_ok"):
        inductor.cpp.vec_isa_ok = True
    functorch.activation_memory_budget = KEPT_SHARE if strategy.checkpoint == "memory_budget" else 1.0


def check_compiled(strategy: Strategy, step: Step) -> None:
    """Raises RuntimeError where steps were taken and nothing was compiled of a model that should have been."""
    of_loss = step.loss.num_graphs if isinstance(step.loss, CompiledLoss) else 0
    if strategy.compile != "none" and num_compiled() <= of_loss:
        raise RuntimeError("torch.compile has compiled nothing of this model")


def num_compiled() -> int:
    """Graphs that torch.compile has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def is_from_cache() -> bool:
    """Whether the compiler's cache had all that this process has compiled so far, and that was something."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    compiled = found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"]
    return bool(found["fxgraph_cache_hit"]) and not compiled


def graph_breaks() -> tuple[int, str]:
    """For how many reasons torch.compile has left graphs in this process so far, and the first one's first line."""
    from torch._dynamo.utils import counters

    found = counters["graph_break"]
    return len(found), next((str(reason).strip().splitlines()[0] for reason in found), "")


def _options(strategy: Strategy) -> dict[str, Any]:
    mode = {} if strategy.compile == "default" else {"mode": strategy.compile}
    return {"dynamic": strategy.padding != "max", **mode}


def compiled(function: Callable[..., Any], strategy: Strategy) -> Callable[..., Any]:
    """A function of a trainer's, compiled as the whole model would be."""
    prepare_compiler(strategy)
    found: Callable[..., Any] = torch.compile(function, **_options(strategy))
    return found


def _compile(module: nn.Module, **options: Any) -> None:
    """What ``module.compile`` does, from a frame of our own: the one in torch is passed over by the compiler where the
    module's class is torch's own, and nothing would be compiled (torch 2.13)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    module._compiled_call_impl = torch.compile(call, **options)
