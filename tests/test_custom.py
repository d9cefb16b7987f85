"""Workloads of the user's own: scripts and functions that know nothing of autotune, in real files and processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune import backends, workloads
from autotune.apply import apply
from autotune.errors import AutotuneError
from autotune.strategy import Attention, Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests.commands import autotune, briefly, heard

SCRIPT = """
import torch
import torch.nn.functional as F
from torch import nn

import beside


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, beside.CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def workload():
    torch.manual_seed(0)
    return Model(), (torch.randn(8, 12, 16), torch.randint(0, beside.CLASSES, (8,)))


def broken():
    raise KeyError("the data is not there")


if __name__ == "__main__":
    raise SystemExit("the script's own training must not run")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A training script of somebody's, which imports a module beside it."""
    (tmp_path / "beside.py").write_text("CLASSES = 3\n")
    path = tmp_path / "my_train.py"
    path.write_text(SCRIPT)
    for name in ("my_train", "beside"):
        sys.modules.pop(name, None)
    return path


def opened(name: str) -> Workload:
    module = workloads.get(name)
    return module.open_workload(module.prepare(None, limit=None, on_progress=lambda _: None))


def test_a_scripts_function_is_a_workload(script: Path) -> None:
    workload = opened(f"{script}:workload")
    assert workload.name == "my_train.py:workload"
    assert workload.recipe.global_batch == 8
    assert workload.num_blocks == 3
    assert workload.attentions == ("sdpa", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn")
    assert workload.baseline == Strategy(attention="sdpa", micro_batch=8)


@pytest.mark.parametrize(
    "knobs", [{"attention": "sdpa_math", "micro_batch": 2, "accumulation": 4}, {"checkpoint": "every_block"}]
)
def test_it_trains_along_the_same_losses_whatever_the_knobs(script: Path, knobs: dict[str, Any]) -> None:
    workload = opened(f"{script}:workload")

    def losses(**changed: Any) -> list[float]:
        strategy = Strategy(**{"attention": "sdpa", "micro_batch": 8, **changed})
        run = apply(strategy, workload, backends.get("cpu"))
        batches = iter(run.loader)
        return [float(run.step(next(batches))) for _ in range(5)]

    assert losses(**knobs) == pytest.approx(losses(), rel=1e-5)


@pytest.mark.parametrize(
    ("attention", "kernel"), [("sdpa_math", "attention_math"), ("sdpa_flash", "flash_attention_for_cpu")]
)
def test_the_kernel_that_is_pinned_is_the_one_that_runs(script: Path, attention: Attention, kernel: str) -> None:
    run = apply(Strategy(attention=attention, micro_batch=8), opened(f"{script}:workload"), backends.get("cpu"))
    with torch.profiler.profile() as profile:
        run.step(next(iter(run.loader)))
    keys = {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}
    ran = {key for key in keys if not key.endswith("_backward")}
    assert ran == {"aten::scaled_dot_product_attention", f"aten::_scaled_dot_product_{kernel}"}


def test_an_attention_that_the_model_has_not_is_refused(script: Path) -> None:
    with pytest.raises(AutotuneError, match=r"attention=eager .* set attention to sdpa"):
        apply(Strategy(micro_batch=8), opened(f"{script}:workload"), backends.get("cpu"))


def test_a_search_and_a_training_of_a_script_from_the_command_line(script: Path, probed: None) -> None:
    profiles = script.parent / "found"
    where = ("--model", f"{script}:workload", "--profiles", str(profiles))
    done = briefly("search", *where, "--trials", "2", "--epochs", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["workload"]["name"] == "my_train.py:workload"
    assert found["baseline"]["strategy"]["attention"] == "sdpa"
    assert [path.name for path in profiles.glob("*/*.toml")] == ["my_train.py-workload.toml"]
    done = autotune("train", *where, "--limit", "64", "--run", str(script.parent))
    assert done.returncode == 0, done.stderr
    assert "safe defaults" not in done.stderr
    metrics = json.loads((script.parent / "metrics.json").read_text())
    assert metrics["num_train"] == 64
    assert 0 <= metrics["epochs"][0]["test_accuracy"] <= 1


def test_the_space_is_explained(script: Path, probed: None) -> None:
    done = autotune("search", "--model", f"{script}:workload", "--explain-space")
    assert done.returncode == 0, done.stderr
    assert "the model has no switch for it" in done.stdout
    for knob in ("micro_batch", "attention", "precision", "checkpoint", "optimizer", "padding"):
        assert knob in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}:worklaod", "did you mean 'workload'?"),
        ("{}", ".py:FUNCTION"),
        ("{}:broken", "KeyError: 'the data is not there' (my_train.py:38)"),
        ("{}:Model", "should give (model, DataLoader)"),
        ("missing.py:workload", "there is no file"),
        ("no_such_package:workload", "No module named"),
    ],
)
def test_what_is_no_workload_is_refused_in_a_line(script: Path, name: str, words: str) -> None:
    done = heard("search", "--model", name.format(script))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr.strip().splitlines()[-1]


def test_a_loop_of_ones_own_trains_the_same(script: Path) -> None:
    """The user's model, optimizer and loader; only the step is autotune's."""
    workload = opened(f"{script}:workload")
    model = workload.build_model()
    own = workload.build_model()
    own.load_state_dict(model.state_dict())
    x, y = torch.randn(8, 12, 16), torch.randint(0, 3, (8,))
    sgd = torch.optim.SGD(own.parameters(), lr=0.1)
    strategy = Strategy(attention="sdpa_math", micro_batch=2, accumulation=4, checkpoint="every_2nd")
    run = apply(strategy, workload, backends.get("cpu"), model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert run.model is model
    for _ in range(5):
        sgd.zero_grad()
        loss = F.cross_entropy(own(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        assert float(run.step(run.split((x, y)))) == pytest.approx(loss.item(), rel=1e-5)


def test_what_is_handed_over_in_the_wrong_form_is_refused(script: Path) -> None:
    workload = opened(f"{script}:workload")
    made: Any = torch.optim.SGD(workload.build_model().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"lambda parameters: torch.optim.SGD\(parameters"):
        apply(Strategy(attention="sdpa", micro_batch=8), workload, backends.get("cpu"), optimizer=made)
    run = apply(Strategy(attention="sdpa", micro_batch=8), workload, backends.get("cpu"))
    raw: Any = (torch.randn(8, 12, 16), torch.zeros(8, dtype=torch.long))
    wrong: list[Any] = [raw, raw[0], {"x": raw[0]}]
    for batch in wrong:
        with pytest.raises(TypeError, match=r"step\(split\(batch\)\)"):
            run.step(batch)


def test_a_model_that_lies_on_its_device_already_is_looked_at_there() -> None:
    """The meta device stands for an accelerator that is not there."""
    seen: list[str] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.device.type)
            return super().forward(x)

    workload = workload_of("watched", lambda: (Watched(2, 2), (torch.zeros(4, 2), torch.zeros(4))))
    workload.attentions_of(workload.build_model().to("meta"))
    assert seen == ["meta"]


def test_a_profile_is_for_the_model_that_it_was_made_with(script: Path) -> None:
    wanted = workloads.wanted(f"{script}:workload")
    assert wanted.label == "my_train.py:workload"
    assert wanted.num_parameters == 3 * (16 * 48 + 48 + 16 * 16 + 16) + 16 * 3 + 3


def test_a_dataset_of_ones_own_is_loaded_and_collated(script: Path) -> None:
    workload = opened(f"{script}:workload")
    dataset = torch.utils.data.TensorDataset(torch.randn(20, 12, 16), torch.arange(20) % 3)
    run = apply(
        Strategy(attention="sdpa", micro_batch=4, accumulation=2), workload, backends.get("cpu"), dataset=dataset
    )
    batches = list(run.loader)
    assert [[micro.num_samples for micro in batch] for batch in batches] == [[4, 4], [4, 4], [4]]
    assert sorted(int(t) for batch in batches for micro in batch for t in micro.targets) == sorted(
        int(t) for t in dataset.tensors[1]
    )


def test_a_package_in_the_working_folder_is_found_and_imports_late(tmp_path: Path, probed: None) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "late.py").write_text("WIDTH = 4\n")
    (package / "training.py").write_text(
        "import torch\n\n\ndef workload():\n    from mine.late import WIDTH\n\n"
        "    return torch.nn.Linear(WIDTH, 2), (torch.zeros(8, WIDTH), torch.arange(8) % 2)\n"
    )
    script = Path(sys.executable).with_name("autotune")
    if not script.is_file():
        pytest.skip("autotune is not installed as a command here")
    done = subprocess.run(
        [script, "search", "--model", "mine.training:workload", "--explain-space"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "micro_batch" in done.stdout


def test_parts_that_are_not_to_be_trained_stay_in_evaluation_mode(script: Path) -> None:
    workload = opened(f"{script}:workload")
    model = workload.build_model().train()
    frozen = model.get_submodule("blocks.0").eval()
    run = apply(Strategy(attention="sdpa", micro_batch=8), workload, backends.get("cpu"), model=model)
    run.evaluate()
    assert not frozen.training
    assert model.training
    assert model.get_submodule("blocks.1").training


def test_a_loop_without_step_has_its_precision_and_its_clipping(script: Path) -> None:
    workload = opened(f"{script}:workload")
    strategy = Strategy(attention="sdpa", micro_batch=8, precision="bf16")
    run = apply(strategy, workload, backends.get("cpu"), clip_norm=1e-3)
    with run.forward_context():
        assert run.model(torch.randn(8, 12, 16)).dtype == torch.bfloat16
    assert run.model(torch.randn(8, 12, 16)).dtype == torch.float32
    batch = next(iter(run.loader))
    clipped: list[float] = []
    run.optimizer.register_step_pre_hook(
        lambda optimizer, *_: clipped.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None]))
        )
    )
    run.step(batch)
    assert clipped[0] == pytest.approx(1e-3, rel=1e-2)


def test_a_workload_of_ones_own_making_is_taken_as_it_is(tiny_reviews: Path) -> None:
    module = workloads.get("imdb")
    mine = module.open_workload(module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None))
    assert workload_of("mine", lambda: mine) is mine
    assert mine.attentions == get_args(Attention)


def test_torchs_own_encoder_layers_are_seen_to_call_the_kernel() -> None:
    def make() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.Sequential(
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64, 2)
        )
        return model, (torch.randn(4, 4, 16), torch.arange(4) % 2)

    assert workload_of("encoder", make).attentions[0] == "sdpa"


def test_a_script_that_reads_arguments_or_ends_when_it_is_imported_is_told_apart(tmp_path: Path) -> None:
    reads = (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr', {})\nparser.parse_args()\n"
    )
    rest = SCRIPT.replace("import beside", "class beside: CLASSES = 3")
    (tmp_path / "reads.py").write_text(reads.format("default=1.0") + rest)
    assert workloads.get(f"{tmp_path / 'reads.py'}:workload").RECIPE.global_batch == 8
    (tmp_path / "wants.py").write_text(reads.format("required=True") + rest)
    done = heard("search", "--model", f"{tmp_path / 'wants.py'}:workload")
    assert done.returncode == 2
    assert 'under if __name__ == "__main__"' in done.stderr.splitlines()[-1]


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(
        "import torch\n"
        "class Model(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        raise RuntimeError('no such luck')\n"
        "def workload():\n"
        "    return Model(4, 2), (torch.ones(8, 4), torch.zeros(8, dtype=torch.long))\n"
    )
    done = heard("train", "--model", f"{script}:workload", "--profile", "none", "--run", tmp_path / "runs" / "failing")
    assert done.returncode == 1
    assert "no such luck" in done.stderr
    assert not (tmp_path / "runs" / "failing").exists()


def test_a_script_that_leaves_the_working_folder_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "leaving.py").write_text(
        "import os, torch\nos.chdir(os.path.dirname(os.path.abspath(__file__)))\n"
        "def workload():\n    return torch.nn.Linear(4, 2), (torch.ones(8, 4), torch.zeros(8, dtype=torch.long))\n"
    )
    (tmp_path / "sub" / "sub").mkdir()
    (tmp_path / "sub" / "sub" / "leaving.py").write_text("another")
    monkeypatch.chdir(tmp_path)
    module = workloads.get("sub/leaving.py:workload")
    assert Path.cwd() == tmp_path / "sub"
    assert workloads.get("sub/leaving.py:workload") is module
