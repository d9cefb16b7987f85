"""What compiling does: graphs are captured, shared, cached, and the model stays the user's."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from autotune import backends
from autotune.apply import Run, apply
from autotune.compiler import check_compiled, num_compiled
from autotune.errors import AutotuneError
from autotune.models.encoder import EncoderClassifier
from autotune.strategy import Padding, Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests.applied import reviews, run_of, small_model


@pytest.fixture(scope="module")
def workload(tiny_reviews: Path) -> Workload:
    return reviews(tiny_reviews)


@pytest.fixture
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and counted as ever, but run as they are: C++ is not compiled."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("graphs_only")
def test_compiling_by_block_compiles_the_blocks_and_not_the_model(workload: Workload) -> None:
    run = run_of(workload, compile="default", compile_scope="blocks")
    assert run.model._compiled_call_impl is None
    assert all(block._compiled_call_impl is not None for block in run.model.get_submodule("blocks").children())
    batch = next(iter(run.loader))
    assert float(run.step(batch)) == pytest.approx(float(run_of(workload).step(batch)), rel=1e-5)


@pytest.mark.usefixtures("graphs_only")
def test_compiled_blocks_drop_in_training_alone(workload: Workload) -> None:
    """Evaluation calls the blocks, which are compiled, though the model is not."""
    model = EncoderClassifier(width=32, num_heads=2, ffn_width=32, num_layers=2, dropout=0.5)
    strategy = Strategy(micro_batch=32, compile="default", compile_scope="blocks")
    run = apply(strategy, workload, backends.get("cpu"), model=model)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.step.scheduler = None
    batch = next(iter(run.loader))
    losses, found = set(), []
    for _ in range(3):
        losses.add(float(run.step(batch)))
        found.append(run.evaluate())
    for block in run.model.get_submodule("blocks").children():
        block._compiled_call_impl = None
    assert len(losses) == 3
    assert found == [pytest.approx(run.evaluate())] * 3


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(("scope", "num_graphs"), [("model", 1), ("blocks", 2)])
def test_torchs_own_layers_are_compiled_too(scope: str, num_graphs: int) -> None:
    """Blocks share their graphs: one for the first, whose input needs no gradient, one for all others."""

    def make() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        layers = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4)))
        return nn.Sequential(layers, nn.Flatten(), nn.Linear(64, 2)), (torch.randn(4, 4, 16), torch.arange(4) % 2)

    knobs = {"micro_batch": 4, "attention": "sdpa", "compile": "default", "compile_scope": scope}
    run = apply(msgspec.convert(knobs, Strategy), workload_of("layers", make), backends.get("cpu"))
    before = counters["stats"]["unique_graphs"]
    run.step(next(iter(run.loader)))
    assert counters["stats"]["unique_graphs"] - before == num_graphs


@pytest.mark.usefixtures("graphs_only")
def test_a_model_that_the_compiler_passes_over_is_told_from_its_loss(workload: Workload) -> None:
    """Whose graphs may be two: the epoch's last batch is short."""
    counters.clear()
    run = run_of(workload, compile="default")
    run.model._compiled_call_impl = None
    for batch in run.loader:
        run.step(batch)
    assert num_compiled() > 1
    with pytest.raises(RuntimeError, match="compiled nothing of this model"):
        check_compiled(run.strategy, run.step)
    run = run_of(workload, compile="default")
    run.step(next(iter(run.loader)))
    check_compiled(run.strategy, run.step)


def kept_bytes(run: Run) -> int:
    """What the compiled forward pass keeps for the backward pass, the parameters not counted."""
    own = {parameter.data_ptr() for parameter in run.model.parameters()}
    micro = next(iter(run.loader))[0]
    node: Any = run.model(**micro.inputs).grad_fn
    return sum(t.numel() * t.element_size() for t in node.saved_tensors if t.data_ptr() not in own)


def test_under_a_memory_budget_the_compiler_keeps_less(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is chosen before C++ is made of it, which is left out here."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    whole = kept_bytes(run_of(workload, compile="default"))
    torch.compiler.reset()
    assert kept_bytes(run_of(workload, compile="default", checkpoint="memory_budget")) < 0.8 * whole
    with pytest.raises(AutotuneError, match="memory_budget is the compiler's"):
        run_of(workload, checkpoint="memory_budget")


COMPILED = """
import torch
from autotune import backends
from autotune.apply import apply
from autotune.strategy import Strategy
from autotune.timing import Timer
from autotune.workloads.custom import workload_of

workload = workload_of("small", lambda: (torch.nn.Linear(4, 2), (torch.ones(8, 4), torch.arange(8) % 2)))
run = apply(Strategy(micro_batch=8, compile="default"), workload, backends.get("cpu"))
timer = Timer(run)
timer.lap()
print(timer.measurement().is_from_cache)
"""


def test_another_process_starts_with_what_is_compiled(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("TORCHINDUCTOR_CACHE_DIR",)}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILED],
            env=kept | {"AUTOTUNE_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(done.stdout.split()[-1])
    assert found == ["False", "True"]
    assert any((tmp_path / "compiled" / "inductor").rglob("*"))


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(("padding", "is_dynamic"), [("max", False), ("longest", True)])
def test_shapes_that_vary_are_compiled_as_varying(workload: Workload, padding: Padding, is_dynamic: bool) -> None:
    run = run_of(workload, compile="default", padding=padding, micro_batch=8, accumulation=4)
    before = counters["stats"]["unique_graphs"]
    plan = run.loader.plan(0)
    for batch in run.loader.over(plan[:3]):
        run.step(batch)
    widths = {width for batch in plan[:3] for width in batch.widths}
    assert (len(widths) > 2) == is_dynamic
    assert counters["stats"]["unique_graphs"] - before == 2, "the model's and the loss's"


@pytest.mark.usefixtures("graphs_only")
def test_compiling_leaves_the_users_model_object_and_its_state_dict_alone(workload: Workload) -> None:
    model = small_model()
    keys = list(model.state_dict())
    run = apply(
        Strategy(micro_batch=32, padding="longest", compile="default"), workload, backends.get("cpu"), model=model
    )
    assert run.model is model
    assert list(model.state_dict()) == keys
    assert model._compiled_call_impl is not None
    eager = run_of(workload, padding="longest")
    batch = next(iter(eager.loader))
    assert float(run.step(batch)) == pytest.approx(float(eager.step(batch)), rel=1e-5)
