"""The applied run: what every knob does to the real step, and that it does not change the training."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autotune import backends
from autotune.apply import Run, apply
from autotune.data.batching import FINE
from autotune.errors import AutotuneError
from autotune.models.attention import KernelsSeen
from autotune.strategy import SPARSE, Attention, Checkpoint, MemoryFormat, Padding, Precision, Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests.applied import reviews, run_of, small_model
from tests.observing import matmul_dtypes


@pytest.fixture(scope="module")
def workload(tiny_reviews: Path) -> Workload:
    return reviews(tiny_reviews)


def gradients(run: Run, num_samples: int = 32) -> list[torch.Tensor]:
    """Of one global batch in fp64, whatever the split; the update is kept out."""
    run.model.double()
    run.step.scheduler = None
    collected: list[torch.Tensor] = []
    run.step._update = lambda: collected.extend(  # type: ignore[method-assign]
        p.grad.clone() for p in run.model.parameters() if p.grad is not None
    )
    batch = next(b for b in run.loader.plan(0) if b.num_samples == num_samples)
    run.step(next(run.loader.over([batch])))
    return collected


@pytest.mark.parametrize("padding", ["max", "longest", "packed"])
@pytest.mark.parametrize("micro_batch", [1, 4, 16])
def test_every_split_gives_the_gradient_of_the_whole_batch(
    workload: Workload, micro_batch: int, padding: Padding
) -> None:
    whole = gradients(run_of(workload))
    split = gradients(run_of(workload, micro_batch=micro_batch, accumulation=32 // micro_batch, padding=padding))
    torch.testing.assert_close(split, whole, atol=1e-12, rtol=1e-5)


def test_the_short_last_batch_is_scaled_by_its_real_samples(workload: Workload) -> None:
    last = workload.num_train % 32
    assert last % 4, "the last micro batch must be short as well"
    whole = gradients(run_of(workload), num_samples=last)
    split = gradients(run_of(workload, micro_batch=4, accumulation=8), num_samples=last)
    torch.testing.assert_close(split, whole, atol=1e-12, rtol=1e-5)


def test_a_step_returns_the_mean_loss_and_updates_the_weights(workload: Workload) -> None:
    run = run_of(workload, micro_batch=8, accumulation=4)
    before = [parameter.clone() for parameter in run.model.parameters()]
    loss = run.step(next(iter(run.loader)))
    assert loss.shape == ()
    assert not loss.requires_grad
    assert 0.3 < float(loss) < 2
    assert any(not torch.equal(b, p) for b, p in zip(before, run.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_is_the_dtype_that_the_matmuls_see(
    workload: Workload, precision: Precision, dtype: torch.dtype
) -> None:
    run = run_of(workload, precision=precision)
    seen = matmul_dtypes(run)
    losses = [float(run.step(batch)) for batch in run.loader]
    assert set(seen) == {dtype}
    assert np.isfinite(losses).all()
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_optimizers_arithmetic_is_run_as_chosen(workload: Workload, precision: Precision) -> None:
    kernels = {"default": set(), "foreach": {"_foreach_addcdiv_"}, "fused": {"_fused_adamw_"}}
    losses: dict[str, list[float]] = {}
    for optimizer, expected in kernels.items():
        run = run_of(workload, optimizer=optimizer, precision=precision)
        batch = next(iter(run.loader))
        losses[optimizer] = [float(run.step(batch)) for _ in range(19)]
        with torch.profiler.profile() as profile:
            losses[optimizer].append(float(run.step(batch)))
        ran = {event.key.removeprefix("aten::") for event in profile.key_averages()}
        assert ran & {"_foreach_addcdiv_", "_fused_adamw_"} == expected
        assert losses[optimizer] == pytest.approx(losses["default"], rel=1e-3)
    assert losses["default"][-1] < losses["default"][0]


class Pictures(nn.Module):
    """A convolution, and what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        output: Tensor = self.head(self.conv(x).mean((2, 3)))
        return output


@pytest.mark.parametrize("memory_format", get_args(MemoryFormat))
def test_images_and_convolutions_lie_in_memory_as_chosen(memory_format: MemoryFormat) -> None:
    def losses(chosen: MemoryFormat) -> tuple[Pictures, list[float]]:
        torch.manual_seed(0)
        images = workload_of("images", lambda: (Pictures(), (torch.randn(4, 3, 8, 8), torch.arange(4) % 2)))
        assert images.has_convolutions
        torch.manual_seed(0)
        run = apply(Strategy(micro_batch=2, accumulation=2, memory_format=chosen), images, backends.get("cpu"))
        batch = next(iter(run.loader))
        found = [float(run.step(batch)) for _ in range(3)]
        assert isinstance(run.model, Pictures)
        return run.model, found

    model, found = losses(memory_format)
    is_last = memory_format == "channels_last"
    for tensor in (model.conv.weight, *model.seen[-2:]):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == is_last
    assert found == pytest.approx(losses("contiguous")[1], rel=1e-5)


def test_pure_bf16_keeps_weights_gradients_and_state_in_bf16_and_the_loss_in_fp32(workload: Workload) -> None:
    run = run_of(workload, precision="bf16_weights")
    seen = matmul_dtypes(run)
    losses = [run.step(batch) for batch in run.loader]
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.bfloat16}
    state = [value for entry in run.optimizer.state.values() for value in entry.values() if value.dim()]
    assert {value.dtype for value in state} == {torch.bfloat16}
    assert losses[0].dtype == torch.float32
    assert run.strategy.is_approximate


def test_deterministic_refuses_what_cannot_be(workload: Workload) -> None:
    run_of(workload)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        run_of(workload, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("prefetch", [2, 5])
def test_loader_processes_have_as_many_batches_ready(workload: Workload, prefetch: int) -> None:
    batches: Any = iter(run_of(workload, micro_batch=2, accumulation=2, workers=1, prefetch=prefetch).loader)
    assert batches._send_idx == prefetch, "asked for before the first is taken"


@pytest.mark.parametrize(("attention", "has_kernel"), [("eager", False), ("sdpa", True)])
def test_attention_is_written_out_or_a_kernel_as_chosen(
    workload: Workload, attention: Attention, has_kernel: bool
) -> None:
    run = run_of(workload, attention=attention)
    with KernelsSeen() as kernels:
        run.step(next(iter(run.loader)))
    assert bool(kernels.counts) == has_kernel


@pytest.mark.parametrize(("checkpoint", "times"), [("none", 1), ("selective", 1), ("every_block", 2)])
def test_selective_recomputation_keeps_what_attention_gave(
    workload: Workload, checkpoint: Checkpoint, times: int
) -> None:
    run = run_of(workload, attention="sdpa", checkpoint=checkpoint)
    with KernelsSeen() as kernels:
        run.step(next(iter(run.loader)))
    assert kernels.counts == {"_scaled_dot_product_flash_attention_for_cpu": 2 * times}


def test_the_approximate_attentions_see_what_they_name(workload: Workload) -> None:
    """Sixty-four tokens in windows of eight: full, window, global and random tokens besides are four functions."""
    batch = None
    found = {}
    for attention in ("sdpa", *sorted(SPARSE)):
        run = run_of(workload, attention=attention, window=8)
        batch = batch or next(iter(run.loader))
        found[attention] = run.step.forward_only(batch[0])[0]
    for one, other in itertools.combinations(found.values(), 2):
        assert not torch.allclose(one, other, atol=1e-4)


def test_gradients_are_unscaled_before_they_are_clipped(workload: Workload) -> None:
    norms = []
    for precision in ("fp32", "fp16"):
        run = run_of(workload, precision=precision)
        run.step(next(iter(run.loader)))
        assert run.step.grad_norm is not None
        norms.append(float(run.step.grad_norm))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


FREED = """
import resource, sys, torch
from autotune import backends

backends.get("cpu").set_allocator(sys.argv[1])
torch.empty(16 << 20).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(16 << 20).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_or_given_back_as_chosen() -> None:
    """A page that was given back faults when it is touched again: 64 MiB are 16,384 pages of 4 KiB."""
    faults = {}
    for allocator in ("default", "retain"):
        done = subprocess.run(
            [sys.executable, "-c", FREED, allocator], capture_output=True, text=True, check=True, timeout=60
        )
        faults[allocator] = int(done.stdout)
    if faults["default"] < 1000:
        pytest.skip("pages are huge here, or memory is not given back")
    assert faults["retain"] < 0.5 * faults["default"]


def test_threads_are_what_torch_then_has(workload: Workload) -> None:
    before = torch.get_num_threads()
    try:
        run_of(workload, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_optimizer_that_has_no_such_way_is_refused_by_name(workload: Workload) -> None:
    with pytest.raises(AutotuneError, match="LBFGS has not"):
        apply(
            Strategy(micro_batch=32, optimizer="fused"),
            workload,
            backends.get("cpu"),
            model=small_model(),
            optimizer=torch.optim.LBFGS,
        )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_workers_give_the_same_batches_in_the_same_order(workload: Workload, workers: int) -> None:
    expected = [micro.inputs["ids_BT"] for batch in run_of(workload).loader for micro in batch]
    found = [micro.inputs["ids_BT"] for batch in run_of(workload, workers=workers).loader for micro in batch]
    torch.testing.assert_close(found, expected)


def test_workers_are_processes_that_live_while_the_loader_is_read(workload: Workload) -> None:
    import psutil

    def children() -> int:
        return len(psutil.Process().children(recursive=True))

    before = children()
    batches = iter(run_of(workload, workers=2).loader)
    next(batches)
    assert children() == before + 2


def test_each_iteration_of_the_loader_is_the_next_epoch(workload: Workload) -> None:
    loader = run_of(workload).loader
    first, second = (torch.cat([micro.targets for batch in loader for micro in batch]) for _ in range(2))
    assert first.tolist() != second.tolist()
    assert first.sum() == second.sum()


def test_strategies_train_along_the_same_losses(workload: Workload) -> None:
    def losses(**knobs: object) -> list[float]:
        run = run_of(workload, **knobs)
        return [float(run.step(batch)) for _ in range(3) for batch in run.loader]

    plain = losses()
    exact = losses(attention="sdpa_flash", micro_batch=8, accumulation=4, padding="longest", checkpoint="every_block")
    assert exact == pytest.approx(plain, rel=1e-4)
    # bf16 keeps 8 bits: 2^-8 an operation; the loss is a mean over many.
    assert losses(precision="bf16", micro_batch=8, accumulation=4) == pytest.approx(plain, rel=2e-2)


def test_packed_batches_are_computed_in_one_row(workload: Workload) -> None:
    run = run_of(workload, padding="packed", micro_batch=8, accumulation=4)
    shapes: list[tuple[int, ...]] = []
    first = run.model.get_submodule("blocks.0.attention.qkv")
    first.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    (planned,) = run.loader.plan(0)[:1]
    run.step(next(run.loader.over([planned])))
    tokens = [int(run.loader.lengths[indices].sum()) for indices in planned.micro_batches]
    assert shapes == [(1, -(-count // FINE.row) * FINE.row) for count in tokens]
    assert sum(rows for _, rows in shapes) == planned.padded_tokens


def test_a_model_that_does_not_take_packed_batches_is_refused() -> None:
    other = workload_of("other", lambda: (nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4))))
    with pytest.raises(AutotuneError, match=r"padding=packed .* set padding to longest"):
        apply(Strategy(micro_batch=4, padding="packed"), other, backends.get("cpu"))


@pytest.mark.parametrize("padding", ["buckets", "packed"])
def test_evaluation_counts_every_test_sample_and_leaves_training_mode(workload: Workload, padding: Padding) -> None:
    run = run_of(workload, padding=padding, micro_batch=8, accumulation=4)
    loss, accuracy = run.evaluate()
    plain_loss, plain_accuracy = run_of(workload).evaluate()
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert accuracy == plain_accuracy
    assert run.model.training


def test_an_optimizer_of_ones_own_is_taken_and_gets_no_schedule(workload: Workload) -> None:
    run = apply(
        Strategy(micro_batch=32),
        workload,
        backends.get("cpu"),
        model=small_model(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )
    assert isinstance(run.optimizer, torch.optim.SGD)
    assert run.scheduler is None
    run.step(next(iter(run.loader)))


@pytest.mark.parametrize("knobs", [{"attention": "sdpa"}, {"checkpoint": "every_block"}])
def test_a_model_that_cannot_take_a_knob_is_refused_by_name(workload: Workload, knobs: dict[str, str]) -> None:
    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 2)

    with pytest.raises(AutotuneError, match="Bag has none"):
        apply(msgspec.convert({"micro_batch": 32, **knobs}, Strategy), workload, backends.get("cpu"), model=Bag())
