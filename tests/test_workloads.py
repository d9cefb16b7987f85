"""The language models and the image classifier: sizes, what they compute, and that every knob trains the same."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from autotune import backends, workloads
from autotune.apply import apply
from autotune.errors import UsageError
from autotune.models.decoder import DecoderLM
from autotune.models.vision import VisionBDH, rotated, rotations
from autotune.strategy import Strategy
from autotune.workloads.base import CrossEntropy, Workload
from autotune.workloads.lm import LanguageModel
from autotune.workloads.seen import without_dropout


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("\n".join(f"the quick fox {n} jumps over the lazy dog {n % 7}" for n in range(1500)))
    return path


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images = rng.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(300) % 10)
    return folder


def opened(name: str, data: Path, limit: int | None = None) -> Workload:
    module = workloads.get(name)
    return module.open_workload(module.prepare(data, limit=limit, on_progress=lambda _: None))


def test_the_small_language_model_has_the_parameters_that_were_counted_elsewhere() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in DecoderLM().parameters()) == 28_941_393


def test_another_global_batch_is_another_workload_on_the_same_data(image_folder: Path) -> None:
    plain, other = (opened(name, image_folder, limit=64) for name in ("cifar10", "cifar10@16"))
    assert (other.name, other.recipe.global_batch, other.baseline.micro_batch) == ("cifar10@16", 16, 16)
    assert msgspec.structs.replace(other.recipe, global_batch=128) == plain.recipe
    assert workloads.wanted("cifar10@16").global_batch == 16
    assert workloads.wanted("cifar10@128") == workloads.wanted("cifar10")._replace(name="cifar10@128")
    assert opened("cifar10@128", image_folder).name == "cifar10"
    run = apply(other.baseline, other, backends.get("cpu"))
    assert [sum(micro.num_samples for micro in batch) for batch in run.loader] == [16] * 4


@pytest.mark.parametrize("name", ["imdb@", "imdb@0", "imdb@x", "imdb@-4", "imdb@064", "imdb@" + 9 * "9", "imdb@٦٤"])
def test_a_global_batch_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="samples from 1 to 99,999"):
        workloads.get(name)


def test_the_decoder_does_not_see_what_comes_after() -> None:
    torch.manual_seed(0)
    model = DecoderLM(vocabulary_size=50, max_tokens=16, width=32, num_layers=2, num_heads=2, ffn_width=64).eval()
    ids = torch.randint(0, 50, (2, 16))
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_rotary_positions_make_products_depend_on_the_distance_alone() -> None:
    cos, sin = rotations(12, 16)
    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = rotated(q.expand(12, 16), cos, sin), rotated(k.expand(12, 16), cos, sin)
    products = turned_q @ turned_k.T
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


def test_the_image_model_shares_its_synapses_and_has_positions_as_buffers() -> None:
    model = VisionBDH(num_layers=3)
    deeper = VisionBDH(num_layers=6)
    per_block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    count = [sum(parameter.numel() for parameter in m.parameters()) for m in (model, deeper)]
    assert count[1] - count[0] == 3 * per_block == 3 * 6 * 192
    assert "cos_TN" not in model.state_dict()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def losses(workload: Workload, seed: int = 0, **knobs: Any) -> list[float]:
    strategy = msgspec.convert({"micro_batch": 8, **knobs}, Strategy)
    run = apply(strategy, workload, backends.get("cpu"), total_steps=100, seed=seed)
    with without_dropout(run.model):
        batches = iter(run.loader)
        return [float(run.step(next(batches))) for _ in range(3)]


KNOBS: tuple[dict[str, Any], ...] = (
    {"attention": "sdpa"},
    {"attention": "sdpa_flash"},
    {"checkpoint": "every_block"},
    {"checkpoint": "selective"},
    {"micro_batch": 2, "accumulation": 4},
    {"workers": 1},
    {"optimizer": "fused"},
)


@pytest.fixture(scope="module")
def small_lm(text_file: Path) -> Workload:
    """The real one's code, small enough to be quick."""
    made = LanguageModel(
        name="small", vocabulary_size=2000, max_tokens=64, width=32, num_layers=2, num_heads=2, ffn_width=64
    )
    return made.open_workload(made.prepare(text_file, limit=None, on_progress=lambda _: None))


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_every_knob_trains_the_language_model_the_same(small_lm: Workload, knobs: dict[str, Any]) -> None:
    assert losses(small_lm, **knobs) == pytest.approx(losses(small_lm), rel=1e-5)


@pytest.mark.parametrize("knobs", [*KNOBS, {"memory_format": "channels_last"}], ids=str)
def test_every_knob_trains_the_image_model_the_same(image_folder: Path, knobs: dict[str, Any]) -> None:
    build = functools.partial(VisionBDH, width=48, num_layers=2, num_heads=3, neurons_per_head=32)
    workload = dataclasses.replace(opened("cifar10", image_folder), build_model=build)
    assert losses(workload, **knobs) == pytest.approx(losses(workload), rel=1e-5)


def test_shared_weights_are_recomputed_selectively_in_bf16(image_folder: Path) -> None:
    workload = opened("cifar10", image_folder)
    found = losses(workload, precision="bf16", checkpoint="selective")
    assert found == pytest.approx(losses(workload, precision="bf16"), rel=2e-3)


def test_windowed_attention_of_another_size_is_another_function(small_lm: Workload) -> None:
    found = [losses(small_lm, attention="window", window=size) for size in (16, 32)]
    assert found[0] != pytest.approx(found[1], rel=1e-6)
    assert losses(small_lm, attention="window", window=256) == pytest.approx(losses(small_lm), rel=1e-5)


def test_the_language_model_s_loss_is_a_token_s_and_untrained_a_uniform_guess(small_lm: Workload) -> None:
    run = apply(Strategy(micro_batch=8), small_lm, backends.get("cpu"))
    loss, accuracy = run.evaluate()
    assert loss == pytest.approx(np.log(2000), rel=0.01)
    assert np.isnan(accuracy)


def test_label_smoothing_is_for_training_alone(image_folder: Path) -> None:
    workload = opened("cifar10", image_folder)
    assert workload.recipe.label_smoothing == 0.1
    plain = workload.with_recipe(msgspec.structs.replace(workload.recipe, label_smoothing=0.0))
    logits, targets = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([0])
    assert workload.loss(logits, targets) > 10 * plain.loss(logits, targets)
    smoothed, sharp = (apply(one.baseline, one, backends.get("cpu")) for one in (workload, plain))
    batches = list(sharp.evaluation_batches(sharp.evaluation_plan(8)))
    assert smoothed.evaluate(batches)[0] == pytest.approx(sharp.evaluate(batches)[0], rel=1e-6)


def test_a_loss_of_the_user_s_own_is_not_smoothed(small_lm: Workload) -> None:
    own = dataclasses.replace(small_lm, loss=lambda output, targets: output.sum())
    with pytest.raises(UsageError, match="brings its own"):
        own.with_recipe(msgspec.structs.replace(own.recipe, label_smoothing=0.1))


def test_summed_cross_entropy_counts_a_sample_of_tokens_as_their_mean() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    expected = sum(torch.nn.functional.cross_entropy(logits[n], targets[n]) for n in range(3))
    torch.testing.assert_close(CrossEntropy()(logits, targets), torch.as_tensor(expected))


def test_images_are_augmented_in_training_and_not_in_evaluation(image_folder: Path) -> None:
    workload = opened("cifar10", image_folder)
    run = apply(Strategy(micro_batch=128), workload, backends.get("cpu"))
    (batch,) = next(run.loader.over(run.loader.plan_of([np.arange(128)])))
    plain = workload.collate(workload.train, np.arange(128), 1)
    assert not torch.equal(batch.inputs["images_BCHW"], plain.inputs["images_BCHW"])
    first = next(iter(run.evaluation_batches(run.evaluation_plan())))[0]
    torch.testing.assert_close(
        first.inputs["images_BCHW"],
        workload.collate(workload.test, np.arange(128), 1).inputs["images_BCHW"],
    )
