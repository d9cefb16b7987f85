"""Models by their library's name, built with random weights and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotune import backends, workloads
from autotune.apply import apply
from autotune.errors import UsageError
from autotune.models.attention import KernelsSeen
from autotune.strategy import Attention, Strategy
from autotune.workloads import named
from autotune.workloads.base import Workload
from tests.commands import autotune

CONFIG = {
    "model_type": "distilbert",
    "dim": 32,
    "hidden_dim": 64,
    "n_heads": 2,
    "n_layers": 3,
    "vocab_size": 100,
    "max_position_embeddings": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}


def opened(name: str) -> Workload:
    module = workloads.get(name)
    return module.open_workload(module.prepare(None, limit=None, on_progress=lambda _: None))


def losses(workload: Workload, **knobs: Any) -> list[float]:
    strategy = Strategy(**{"micro_batch": workload.recipe.global_batch, **knobs})
    run = apply(strategy, workload, backends.get("cpu"))
    batches = iter(run.loader)
    return [float(run.step(next(batches))) for _ in range(3)]


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return opened(f"hf:{path}")


def test_a_hugging_face_configuration_is_a_workload(distilbert: Workload) -> None:
    assert distilbert.num_blocks == 3
    assert distilbert.max_tokens == 48
    assert {"eager", "sdpa", "sdpa_flash"} <= set(distilbert.attentions)
    assert not distilbert.has_convolutions


@pytest.mark.parametrize(
    "knobs",
    [
        {"attention": "sdpa"},
        {"attention": "sdpa_math"},
        {"micro_batch": 8, "accumulation": 4, "padding": "longest"},
        {"checkpoint": "every_block"},
        {"checkpoint": "selective", "optimizer": "fused"},
    ],
)
def test_it_trains_along_the_same_losses_whatever_the_knobs(distilbert: Workload, knobs: dict[str, Any]) -> None:
    assert losses(distilbert, **knobs) == pytest.approx(losses(distilbert), rel=1e-4)


def test_a_timm_model_is_a_workload() -> None:
    pytest.importorskip("timm")
    workload = opened("timm:vit_tiny_patch16_224")
    assert workload.num_blocks == 12
    assert workload.has_convolutions
    assert {"eager", "sdpa"} <= set(workload.attentions)


@pytest.mark.parametrize(("attention", "has_kernel"), [("eager", False), ("sdpa", True)])
def test_the_switch_of_hugging_face_changes_what_runs(
    distilbert: Workload, attention: Attention, has_kernel: bool
) -> None:
    run = apply(Strategy(attention=attention, micro_batch=32), distilbert, backends.get("cpu"))
    with KernelsSeen() as kernels:
        run.step(next(iter(run.loader)))
    assert bool(kernels.counts) == has_kernel


def test_a_model_whose_sizes_are_not_known_is_not_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the hub bert-large is not taken for bert-base; distilbert-base-uncased is what its class says."""
    transformers = pytest.importorskip("transformers")

    def offline(name: str) -> object:
        raise OSError("no network")

    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(UsageError, match=r"no configuration for hf:bert-large-uncased can be had \(no network\)"):
        named._config("bert-large-uncased")
    assert named._config("distilbert-base-uncased").dim == 768
    assert [path.name for path in (tmp_path / "hugging-face").iterdir()] == ["distilbert-base-uncased.json"]


@pytest.mark.parametrize("library", ["hf", "timm"])
def test_a_model_that_cannot_be_had_is_refused_in_a_line(library: str) -> None:
    pytest.importorskip({"hf": "transformers", "timm": "timm"}[library])
    with pytest.raises(UsageError, match="no-such-model"):
        opened(f"{library}:no-such-model")


def test_a_missing_library_is_refused_with_the_extra_to_install(tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text("raise ImportError('not here')\n")
    done = autotune("search", "--model", "timm:vit_tiny_patch16_224", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last == "autotune: timm: models need timm: pip install 'autotune-torch[vision]'"
