"""The trainer: what it records, and that a run that was cut off ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from autotune import backends
from autotune.apply import Run, apply
from autotune.checkpoint import Identity, Told, difference, newest_checkpoint, read_checkpoint, write_checkpoint
from autotune.cli.changes import changed_recipe, changed_strategy, refuse_idle
from autotune.errors import AutotuneError, UsageError
from autotune.strategy import Strategy, baseline
from autotune.training import Epoch, Training
from autotune.workloads.base import Workload
from tests import own_script
from tests.applied import small_model
from tests.commands import autotune, called

NUM_EPOCHS = 2
TOLD = Told(data=None, limit=96, profile=None)


@pytest.fixture
def workload(prepared: tuple[object, Workload]) -> Workload:
    return prepared[1]


def run_of(workload: Workload, **knobs: Any) -> Run:
    strategy = msgspec.convert({"micro_batch": 8, "padding": "longest", **knobs}, Strategy)
    torch.manual_seed(7)
    model = small_model()
    return apply(strategy, workload, backends.get("cpu"), model=model, total_steps=40, seed=3)


def trained(workload: Workload, **knobs: Any) -> Training:
    training = Training(run_of(workload, **knobs))
    training.train(NUM_EPOCHS)
    return training


def save_and_load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize("knobs", [{}, {"precision": "fp16"}, {"workers": 1}, {"accumulation": 2}], ids=str)
def test_a_run_gone_on_with_at_any_step_has_the_same_losses(
    workload: Workload, knobs: dict[str, Any], tmp_path: Path
) -> None:
    whole = trained(workload, **knobs)
    num_steps = len(whole.steps.losses)
    for stop_after in (1, num_steps // 2, num_steps // 2 + 1, num_steps - 1):
        first = stopped(run_of(workload, **knobs), stop_after)
        assert len(first.steps.losses) == stop_after
        second = Training(run_of(workload, **knobs))
        second.restore(save_and_load(first.state(), tmp_path / "state.pt"))
        second.train(NUM_EPOCHS)
        assert second.steps == whole.steps
        assert [epoch.test_loss for epoch in second.epochs] == [epoch.test_loss for epoch in whole.epochs]
        for one, other in zip(
            second.run.model.state_dict().values(), whole.run.model.state_dict().values(), strict=True
        ):
            assert torch.equal(one, other)


def stopped(run: Run, after: int) -> Training:
    """Trained until so many steps were done."""
    training = Training(run)

    def on_step(*_: int) -> None:
        if len(training.steps.losses) == after:
            training.stop()

    training.train(NUM_EPOCHS, on_step=on_step)
    return training


def test_a_run_stopped_in_its_evaluation_evaluates_again(workload: Workload, tmp_path: Path) -> None:
    whole = trained(workload)
    first = Training(run_of(workload))
    first.train(NUM_EPOCHS, on_evaluation=lambda _: first.stop())
    assert not first.epochs
    second = Training(run_of(workload))
    second.restore(save_and_load(first.state(), tmp_path / "state.pt"))
    second.train(NUM_EPOCHS)
    assert second.steps == whole.steps
    assert second.epochs[-1].test_loss == whole.epochs[-1].test_loss


@pytest.mark.parametrize("schedule", ["cosine", "linear", "restarts", "onecycle", "constant"])
def test_every_schedule_goes_on_where_it_was(workload: Workload, schedule: str, tmp_path: Path) -> None:
    recipe = changed_recipe(workload.recipe, (f"schedule={schedule}", "warmup_steps=3"))
    own = workload.with_recipe(recipe)
    whole = trained(own)
    first = stopped(run_of(own), 4)
    second = Training(run_of(own))
    second.restore(save_and_load(first.state(), tmp_path / "state.pt"))
    second.train(NUM_EPOCHS)
    assert second.steps.learning_rates == whole.steps.learning_rates


def test_every_step_has_its_loss_rate_and_gradient_norm(workload: Workload) -> None:
    training = trained(workload)
    steps = training.steps
    count = NUM_EPOCHS * len(training.run.loader)
    assert len(steps.losses) == len(steps.learning_rates) == len(steps.grad_norms) == count
    assert training.epochs[-1].grad_norm == pytest.approx(sum(steps.grad_norms[-count // 2 :]) / (count // 2))
    assert steps.learning_rates[0] < max(steps.learning_rates)


def test_training_ends_when_the_test_loss_no_longer_falls(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    test_losses = iter([0.7, 0.6, 0.65, 0.61, 0.5])
    monkeypatch.setattr(Run, "evaluate", lambda self, batches: (next(test_losses), 0.5))
    training = Training(run_of(workload), patience=2)
    best: list[int] = []

    def on_epoch(epoch: Epoch) -> None:
        if training.is_best:
            best.append(epoch.epoch)

    training.train(5, on_epoch=on_epoch)
    assert len(training.epochs) == 4
    assert best == [1, 2]


def test_a_loss_that_is_no_number_ends_the_training(workload: Workload) -> None:
    import dataclasses

    broken = dataclasses.replace(workload, loss=lambda output, targets: output.sum() * float("nan"))
    with pytest.raises(AutotuneError, match="the loss is nan at step 1 of epoch 1"):
        Training(run_of(broken)).train(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("speed=1", "there is no 'speed'"),
        ("schedul=linear", "did you mean"),
        ("epochs=3", "use --epochs"),
        ("schedule=square", "it is one of cosine, "),
        ("global_batch=64", "imdb@64"),
        ("learning_rate=-1", "> 0"),
        ("least_rate=0.1", "least_rate, 0.1, is above learning_rate"),
        ("learning_rate=fast", "--recipe"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(workload: Workload, change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed_recipe(workload.recipe, (change,))


def test_a_recipe_s_fields_can_be_changed(workload: Workload) -> None:
    found = changed_recipe(workload.recipe, ("clip_norm=none", "learning_rate=3e-4", "label_smoothing=0.1"))
    assert (found.clip_norm, found.learning_rate, found.label_smoothing) == (None, 3e-4, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("speed=1", "there is no 'speed'"),
        ("precison=bf16", "did you mean 'precision'"),
        ("precision=bf15", "it is one of fp32, "),
        ("micro_batch=3", "micro_batch x accumulation is 3 x 1, and the global batch 32"),
        ("micro_batch=0", "--knob"),
        ("workers=two", "--knob workers=two"),
        ("workers", "NAME=VALUE is wanted"),
        ("deterministic=true", "use --deterministic"),
    ],
)
def test_a_knob_that_makes_no_sense_is_refused(change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed_strategy(baseline(32), (change,))


def test_a_knob_that_does_nothing_beside_the_others_is_refused(workload: Workload) -> None:
    for knob in (
        "memory_format=channels_last",
        "prefetch=8",
        "compile_scope=blocks",
        "checkpoint=memory_budget",
        "window=32",
    ):
        with pytest.raises(UsageError, match=f"--knob {knob} does nothing here"):
            refuse_idle(changed_strategy(baseline(32), (knob,)), (knob,), workload)
    does_something = ("prefetch=8", "workers=1", "compile=default", "compile_scope=blocks", "attention=window")
    refuse_idle(changed_strategy(baseline(32), does_something), does_something, workload)
    of_the_profile = msgspec.structs.replace(baseline(32), prefetch=8)
    refuse_idle(changed_strategy(of_the_profile, ("workers=0",)), ("workers=0",), workload)  # not the user's doing


def test_a_knob_that_the_device_refuses_is_named(
    tiny_reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", str(tiny_reviews), "--limit", "4", "--run", str(tmp_path / "run"))
    for knob in ("attention=sdpa_cudnn", "attention=flash_attn"):  # one fails in the first step, one before it
        assert called("train", "--model", "imdb", *data, "--profile", "none", "--knob", knob) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("autotune: ")]
        assert f"--knob {knob} does not run here: RuntimeError" in line


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        (("micro_batch=8",), (8, 4)),
        (("accumulation=2",), (16, 2)),
        (("micro_batch=16", "accumulation=2"), (16, 2)),
        (("checkpoint=none", "graphs=none", "precision=bf16"), (32, 1)),
    ],
)
def test_knobs_set_by_hand_keep_the_global_batch(changes: tuple[str, ...], sizes: tuple[int, int]) -> None:
    found = changed_strategy(baseline(32), changes)
    assert (found.micro_batch, found.accumulation) == sizes


def identity(workload: Workload, **changes: Any) -> Identity:
    plain = Identity(
        workload="imdb",
        num_parameters=5,
        source="somewhere",
        content="reviews-1",
        num_train=10,
        recipe=workload.recipe,
        epochs=2,
        strategy=Strategy(micro_batch=32),
        seed=0,
    )
    return msgspec.structs.replace(plain, **changes)


def test_a_checkpoint_says_whose_it_is_and_a_torn_one_is_refused(workload: Workload, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    own = identity(workload)
    write_checkpoint(path, own, TOLD, {"step": 3})
    assert read_checkpoint(tmp_path) == (own, TOLD, {"step": 3})
    assert difference(own, identity(workload)) is None
    assert difference(own, identity(workload, seed=1)) == "seed was 0, and is 1"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(AutotuneError, match="cannot be read"):
        read_checkpoint(path)
    with pytest.raises(AutotuneError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(workload: Workload, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, identity(workload), TOLD, {"step": 3})
    with pytest.raises(AttributeError):
        write_checkpoint(path, identity(workload), TOLD, {"step": lambda: 4})
    assert read_checkpoint(path)[2] == {"step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


# --- the command, in processes that are killed


NUM_STEPS = 60
"""Of both epochs."""
NUM_KILLS = 2
NUM_KILLED = int(os.environ.get("AUTOTUNE_TEST_KILLED", "1"))
"""Runs that are killed so often each; a run costs some ten seconds."""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    return own_script.write(tmp_path_factory.mktemp("script"))


def train(folder: Path, script: str, *more: str) -> list[str]:
    return [
        *("train", "--model", script, "--limit", str(8 * NUM_STEPS // 2), "--epochs", "2", "--profile", "none"),
        *("--run", str(folder), "--checkpoint-every", "0", *more),
    ]


def resume(folder: Path, script: str, *more: str) -> list[str]:
    """As the interrupted command says: all else is in the checkpoint."""
    return ["train", "--model", script, "--resume", str(folder), "--checkpoint-every", "0", *more]


@pytest.fixture(scope="module")
def whole_run(script: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    done = autotune(*train(folder, script))
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    assert len(record["steps"]["losses"]) == NUM_STEPS
    assert (folder / "best.pt").is_file()
    return record


def num_saved(folder: Path) -> int:
    """Steps in the checkpoint there; none where there is none yet."""
    try:
        return len(read_checkpoint(folder)[2]["steps"]["losses"])
    except AutotuneError:
        return 0


@pytest.mark.parametrize("seed", range(NUM_KILLED))
def test_a_run_that_is_killed_at_random_steps_ends_with_the_same_losses(
    seed: int, whole_run: dict[str, Any], script: str, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    for at_step in sorted(generator.sample(range(1, NUM_STEPS), NUM_KILLS)):
        command = resume(tmp_path, script) if num_saved(tmp_path) else train(tmp_path, script)
        process = subprocess.Popen(
            [sys.executable, "-m", "autotune", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while num_saved(tmp_path) < at_step and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert num_saved(tmp_path) >= at_step
    done = autotune(*resume(tmp_path, script))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["steps"] == whole_run["steps"]
    assert [e["test_loss"] for e in record["epochs"]] == [e["test_loss"] for e in whole_run["epochs"]]


def test_ctrl_c_keeps_the_step_and_says_how_to_go_on(whole_run: dict[str, Any], script: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "autotune", *train(tmp_path, script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not num_saved(tmp_path):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"to go on: autotune train --model {script} --resume {tmp_path}" in said
    assert "Traceback" not in said
    assert 0 < num_saved(tmp_path) < NUM_STEPS
    done = autotune(*resume(tmp_path, script))
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == whole_run["steps"]


def test_another_training_s_checkpoint_is_refused_with_what_differs(
    whole_run: dict[str, Any], script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*train(tmp_path, script)) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "own_script.py").write_text(
        own_script.SCRIPT.replace("(16, 32)", "(16, 48)").replace("(32, 16)", "(48, 16)")
    )
    for status, command, message in (
        (2, resume(tmp_path, script, "--recipe", "schedule=linear"), "its recipe's schedule was cosine, and is linear"),
        (2, resume(tmp_path, script, "--seed", "7"), "seed was 0, and is 7"),
        (1, resume(tmp_path / "none", script), "there is no checkpoint"),
        (2, resume(tmp_path, script, "--knob", "workers=1"), "leave --profile, --pick and --knob out"),
        (2, train(tmp_path, script), "has a run's checkpoint already"),
        (2, resume(tmp_path, f"{other / 'own_script.py'}:workload"), "num_parameters was"),
    ):
        capsys.readouterr()
        assert called(*command) == status
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_run_saved_last_is_of_this_workload_and_no_other(workload: Workload, tmp_path: Path) -> None:
    for number, (name, of) in enumerate((("a", "lm"), ("own name", "lm"), ("b", "lm-base"))):
        path = tmp_path / name / "checkpoint.pt"
        write_checkpoint(path, msgspec.structs.replace(identity(workload), workload=of), TOLD, {"step": 3})
        os.utime(path, (number, number))
    assert newest_checkpoint(tmp_path, "lm").parent.name == "own name"
    with pytest.raises(AutotuneError, match="no run of cifar10"):
        newest_checkpoint(tmp_path, "cifar10")


def test_tensorboard_s_logs_have_every_step(script: str, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    clipped = ("--recipe", "clip_norm=1.0", "--tensorboard")
    assert called(*train(tmp_path, script, *clipped)) == 0
    log = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    log.Reload()
    record = json.loads((tmp_path / "metrics.json").read_text())
    found = [event.value for event in log.Scalars("train/loss")]
    assert found == pytest.approx(record["steps"]["losses"], rel=1e-6)
    assert [event.step for event in log.Scalars("train/gradient_norm")] == list(range(1, NUM_STEPS + 1))
    assert len(log.Scalars("test/loss")) == 2
