"""The applied run: what every knob does to the real step, and that it does not change the training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from autotune import backends, workloads
from autotune.apply import Run, apply, warmup_cosine
from autotune.data.batching import collate
from autotune.errors import AutotuneError
from autotune.models.encoder import EncoderClassifier
from autotune.strategy import Padding, Precision, Strategy
from autotune.workloads.base import Workload


@pytest.fixture(scope="module")
def workload(tiny_reviews: Path) -> Workload:
    module = workloads.get("imdb")
    prepared = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    return dataclasses.replace(prepared, max_tokens=64)


def small_model() -> EncoderClassifier:
    torch.manual_seed(1)
    return EncoderClassifier(width=32, num_heads=2, ffn_width=32, num_layers=2, dropout=0.0)


def run_of(workload: Workload, **knobs: object) -> Run:
    strategy = msgspec.convert({"micro_batch": 32, **knobs}, Strategy)
    return apply(strategy, workload, backends.get("cpu"), model=small_model())


def gradients(run: Run, num_samples: int = 32) -> list[torch.Tensor]:
    """Of one global batch in fp64, whatever the split; the update is kept out."""
    run.model.double()
    collected: list[torch.Tensor] = []
    run.step._update = lambda: collected.extend(  # type: ignore[method-assign]
        p.grad.clone() for p in run.model.parameters() if p.grad is not None
    )
    batch = next(b for b in run.loader.plan(0) if b.num_samples == num_samples)
    run.step([collate(run.workload.train, i, w) for i, w in zip(batch.micro_batches, batch.widths, strict=True)])
    return collected


@pytest.mark.parametrize("padding", ["max", "longest"])
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
    seen: list[torch.dtype] = []
    first = run.model.get_submodule("blocks.0.attention.qkv")
    first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses = [float(run.step(batch)) for batch in run.loader]
    assert set(seen) == {dtype}
    assert np.isfinite(losses).all()
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


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


def test_evaluation_counts_every_test_sample_and_leaves_training_mode(workload: Workload) -> None:
    run = run_of(workload, padding="buckets", micro_batch=8, accumulation=4)
    loss, accuracy = run.evaluate()
    plain_loss, plain_accuracy = run_of(workload).evaluate()
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert accuracy == plain_accuracy
    assert run.model.training


def test_the_schedule_warms_up_and_then_falls_to_zero(workload: Workload) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warmup_cosine(optimizer, workload.recipe, 1000)
    rates = []
    for _ in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.01)
    assert rates[99] == pytest.approx(1.0)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] < 1e-4


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
