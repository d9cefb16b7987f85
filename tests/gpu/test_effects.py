"""That every value which only CUDA runs really takes effect there. Needs a CUDA device: ``pytest -m gpu``."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from autotune import backends
from autotune.apply import Run, apply
from autotune.checks import RefusalError, kernels
from autotune.evaluation import Evaluation
from autotune.models import flash
from autotune.models.attention import KernelsSeen, attend
from autotune.models.encoder import EncoderClassifier
from autotune.strategy import SPARSE, Attention, CompileScope, Precision, Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests.applied import reviews
from tests.marks import on_a_card
from tests.observing import matmul_dtypes

pytestmark = [
    *on_a_card,
    pytest.mark.filterwarnings("default"),  # torch's compiler warns of itself, and where that is an error it stops
]


@pytest.fixture(scope="module")
def workload(tiny_reviews: Path) -> Workload:
    return reviews(tiny_reviews)


def run_of(workload: Workload, **knobs: object) -> Run:
    torch.manual_seed(1)
    model = EncoderClassifier(width=64, num_heads=2, ffn_width=64, num_layers=2, dropout=0.0)
    strategy = msgspec.convert({"micro_batch": 32, **knobs}, Strategy)
    return apply(strategy, workload, backends.get("cuda"), model=model)


def events(run: Run) -> set[str]:
    """What runs in a step, after two to warm up."""
    batch = next(iter(run.loader))
    for _ in range(2):
        run.step(batch)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        run.step(batch)
        torch.cuda.synchronize()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("kernel", ["math", "flash", "efficient", "cudnn"])
def test_a_pinned_kernel_is_the_one_that_runs(kernel: str) -> None:
    attention = msgspec.convert(f"sdpa_{kernel}", Attention)
    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.profiler.profile() as profile:
        attend(q, k, v, None, attention)
        torch.cuda.synchronize()
    name = "_scaled_dot_product_attention_math" if kernel == "math" else f"_scaled_dot_product_{kernel}_attention"
    assert f"aten::{name}" in {event.key for event in profile.key_averages()}


def foreign_run(**knobs: object) -> Run:
    """Of torch's own encoder layers, which have no padding: two blocks."""

    def make() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        torch.manual_seed(1)
        layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0, batch_first=True) for _ in range(2))
        )
        return nn.Sequential(layers, nn.Flatten(), nn.Linear(64 * 64, 2)), (torch.randn(8, 64, 64), torch.arange(8) % 2)

    strategy = msgspec.convert({"micro_batch": 8, "precision": "bf16", **knobs}, Strategy)
    return apply(strategy, workload_of("layers", make), backends.get("cuda"))


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_a_pinned_kernel_runs_forward_and_backward_in_a_training_step(kernel: str) -> None:
    seen = events(foreign_run(attention=f"sdpa_{kernel}"))
    assert f"aten::_scaled_dot_product_{kernel}_attention" in seen
    assert f"aten::_scaled_dot_product_{kernel}_attention_backward" in seen


@pytest.mark.parametrize(("checkpoint", "times"), [("none", 1), ("selective", 1), ("every_block", 2)])
def test_selective_recomputation_keeps_what_attention_gave(checkpoint: str, times: int) -> None:
    run = foreign_run(attention="sdpa_flash", checkpoint=checkpoint)
    with KernelsSeen() as called:
        run.step(next(iter(run.loader)))
    assert called.counts == {"_scaled_dot_product_flash_attention": 2 * times}


def test_the_flash_kernel_is_kept_for_models_without_a_mask() -> None:
    """It takes none, and is refused to those that have one."""
    with pytest.raises(RefusalError, match="runs without a mask") as refused:
        kernels.attention(backends.get("cuda"), "sdpa_flash", "bf16")
    assert refused.value.figures[kernels.UNMASKED_MS] > 0


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_rounds_and_fp32_does_not(workload: Workload, precision: Precision) -> None:
    run_of(workload, precision=precision)
    a, b = (torch.randn(512, 512, device="cuda") for _ in range(2))
    error = ((a @ b).double() - a.double() @ b.double()).abs().max().item()
    assert (error > 1e-3) == (precision == "tf32")  # ten bits against 23


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("bf16_weights", torch.bfloat16)]
)
def test_precision_is_the_dtype_that_the_matmuls_see(
    workload: Workload, precision: Precision, dtype: torch.dtype
) -> None:
    run = run_of(workload, precision=precision)
    seen = matmul_dtypes(run)
    run.step(next(iter(run.loader)))
    assert set(seen) == {dtype}


@pytest.mark.parametrize(
    ("mode", "uses_graphs"),
    [("default", False), ("reduce-overhead", True), ("max-autotune-no-cudagraphs", False), ("max-autotune", True)],
)
def test_each_mode_compiles_and_replays_cuda_graphs_where_it_says_so(
    workload: Workload, mode: str, uses_graphs: bool
) -> None:
    """Of max-autotune's hundreds of Triton kernels none is compiled, which would take minutes."""
    before = counters["stats"]["unique_graphs"]
    with torch._inductor.config.patch(max_autotune_gemm_backends="ATEN", max_autotune_conv_backends="ATEN"):
        assert ("cudaGraphLaunch" in events(run_of(workload, compile=mode))) == uses_graphs
    assert counters["stats"]["unique_graphs"] > before


@pytest.mark.parametrize(("optimizer", "kernel"), [("foreach", "_foreach_addcdiv_"), ("fused", "_fused_adamw_")])
def test_the_optimizers_arithmetic_is_run_as_chosen(workload: Workload, optimizer: str, kernel: str) -> None:
    assert f"aten::{kernel}" in events(run_of(workload, optimizer=optimizer, precision="fp16"))


def test_flash_attn_runs_where_it_is_installed_and_computes_the_same(workload: Workload) -> None:
    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = (torch.arange(128, device="cuda") < torch.tensor([[128], [70]], device="cuda"))[:, None, None]
    try:
        flash.packaged("cuda", torch.bfloat16)
    except RuntimeError as exc:
        pytest.skip(str(exc))
    found = attend(q, k, v, mask, "flash_attn")
    expected = attend(q, k, v, mask, "eager")
    counts = mask[:, 0, 0]
    torch.testing.assert_close(found.transpose(1, 2)[counts], expected.transpose(1, 2)[counts], atol=2e-2, rtol=2e-2)


def test_packed_sequences_run_in_one_kernel(workload: Workload) -> None:
    if flash.native("cuda", torch.bfloat16) is None:
        pytest.skip("this torch has no kernel for sequences of different lengths")
    for checkpoint in ("none", "every_block"):
        seen = events(run_of(workload, padding="packed", attention="sdpa", precision="bf16", checkpoint=checkpoint))
        assert any("varlen_attn" in event for event in seen)


@pytest.mark.parametrize(("mode", "uses_graphs"), [("default", False), ("reduce-overhead", True)])
def test_packed_rows_of_any_length_are_compiled_once(workload: Workload, mode: str, uses_graphs: bool) -> None:
    if flash.native("cuda", torch.bfloat16) is None:
        pytest.skip("this torch has no kernel for sequences of different lengths")
    knobs = {"padding": "packed", "attention": "sdpa", "precision": "bf16", "optimizer": "fused"}
    expected = [float(loss) for loss in some_losses(run_of(workload, **knobs))]
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    run = run_of(workload, **knobs, compile=mode)
    assert [float(loss) for loss in some_losses(run)] == pytest.approx(expected, rel=1e-2)
    assert counters["stats"]["unique_graphs"] - before == 2, "the model's and the loss's"
    assert ("cudaGraphLaunch" in events(run)) == uses_graphs


def some_losses(run: Run, count: int = 6) -> list[Tensor]:
    epochs = itertools.chain.from_iterable(itertools.repeat(run.loader))
    return [run.step(batch) for batch in itertools.islice(epochs, count)]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"padding": "buckets", "workers": 2},
        {"padding": "buckets", "compile": "default"},
        {"padding": "buckets", "compile": "default", "compile_scope": "blocks"},
        {"accumulation": 4, "micro_batch": 8},
        {"optimizer": "fused", "precision": "bf16", "padding": "packed"},
    ],
    ids=str,
)
def test_a_recorded_step_trains_as_a_launched_one(workload: Workload, knobs: dict[str, object]) -> None:
    launched, recorded = (run_of(workload, attention="sdpa", **knobs, graphs=graphs) for graphs in ("none", "step"))
    pairs = list(zip(some_losses(launched, 24), some_losses(recorded, 24), strict=True))
    tolerance = 1e-2 if knobs.get("precision") == "bf16" else 1e-4
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert recorded.step.graphs is not None
    assert 0 < recorded.step.graphs.num_recorded < 12
    assert launched.optimizer.param_groups[0]["lr"] == pytest.approx(recorded.optimizer.param_groups[0]["lr"])
    assert isinstance(recorded.optimizer.param_groups[0]["lr"], float)
    torch.testing.assert_close(launched.step.grad_norm, recorded.step.grad_norm, rtol=0.05, atol=0.05)
    assert "cudaGraphLaunch" in events(recorded)


@pytest.mark.parametrize("knobs", [{}, {"compile": "default", "compile_scope": "blocks", "precision": "bf16"}], ids=str)
def test_a_recorded_evaluation_finds_what_a_launched_one_does(workload: Workload, knobs: dict[str, object]) -> None:
    run = run_of(workload, attention="sdpa", padding="buckets", **knobs, graphs="step")
    launched = Evaluation(run.step, workload)
    launched._graphs = None
    found = []
    for _ in range(3):
        found.append((run.evaluate(), launched(run.evaluation_batches(run.evaluation_plan()))))
        some_losses(run, 4)
    assert run.evaluation.launched_because == ""
    assert run.evaluation.num_recorded > 0
    for by_graphs, by_launches in found:
        assert by_graphs == pytest.approx(by_launches, rel=1e-3)
    assert len({loss for (loss, _), _ in found}) == 3, "by the weights as they are"


def test_a_model_that_waits_in_evaluation_is_launched_and_trains_on(workload: Workload) -> None:
    """With new shapes and dropout, as if nothing had been tried."""

    def wait(module: nn.Module, _: object, output: Tensor) -> None:
        if not module.training:
            output.sum().item()

    torch.manual_seed(1)
    model = EncoderClassifier(width=64, num_heads=2, ffn_width=64, num_layers=2, dropout=0.5)
    next(model.get_submodule("blocks").children()).register_forward_hook(wait)
    strategy = Strategy(micro_batch=32, padding="buckets", graphs="step")
    run = apply(strategy, workload, backends.get("cuda"), model=model)
    for _ in range(3):
        run.evaluate()
        assert all(torch.isfinite(loss) for loss in some_losses(run, 8))
    assert "synchroniz" in run.evaluation.launched_because
    assert run.evaluation.num_recorded == 0
    assert run.step.graphs is not None
    assert run.step.graphs.num_recorded > 0


@pytest.mark.parametrize("scope", [None, "model", "blocks"])
def test_a_recorded_step_draws_new_random_numbers_each_time(workload: Workload, scope: CompileScope | None) -> None:
    torch.manual_seed(1)
    model = EncoderClassifier(width=64, num_heads=2, ffn_width=64, num_layers=2, dropout=0.5)
    compiled = Strategy(micro_batch=32, compile="default", compile_scope=scope or "model", graphs="step")
    strategy = compiled if scope else Strategy(micro_batch=32, graphs="step")
    run = apply(strategy, workload, backends.get("cuda"), model=model)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.step.scheduler = None
    batch = next(iter(run.loader))
    assert len({float(run.step(batch)) for _ in range(6)}) == 6


@pytest.mark.parametrize("kind", SPARSE)
def test_attention_to_part_of_the_keys_is_flex_attentions(kind: Attention) -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(2, 2, 300, 32, device="cuda", requires_grad=True) for _ in range(3)]
    mask = (torch.arange(300, device="cuda") < torch.tensor([[300], [100]], device="cuda"))[:, None, None]
    counts = mask[:, 0, 0]
    on_cpu = [tensor.detach().cpu().requires_grad_() for tensor in qkv]
    found = attend(qkv[0], qkv[1], qkv[2], mask, kind).transpose(1, 2)[counts]
    expected = attend(on_cpu[0], on_cpu[1], on_cpu[2], mask.cpu(), kind).transpose(1, 2)[counts.cpu()]
    torch.testing.assert_close(found.cpu(), expected, atol=5e-3, rtol=5e-3)
    grads = torch.autograd.grad(found.square().sum(), qkv)
    expected_grads = torch.autograd.grad(expected.square().sum(), on_cpu)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=2e-2, rtol=2e-2)


def test_fp8_linear_layers_run_in_eight_bits(workload: Workload) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    assert "aten::_scaled_mm" in events(run_of(workload, precision="fp8"))


def test_energy_is_counted(workload: Workload) -> None:
    before_j = backends.get("cuda").energy_j()
    if before_j is None:
        pytest.skip("no energy counter")
    run = run_of(workload)
    for batch, _ in zip(run.loader, range(20), strict=False):
        run.step(batch)
    torch.cuda.synchronize()
    after_j = backends.get("cuda").energy_j()
    assert after_j is not None
    assert after_j > before_j


def test_batches_come_pinned_and_are_copied_without_waiting(workload: Workload) -> None:
    run = run_of(workload, workers=1)
    batch = next(iter(run.loader))
    assert all(tensor.is_pinned() for micro in batch for tensor in micro.inputs.values())
    assert run.step(batch).device.type == "cuda"
