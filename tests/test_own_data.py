"""A user's own data: what a loader gives is what trains, in whatever parts, processes and trials."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import default_data_collator

from autotune import backends, workloads
from autotune.apply import Run, apply
from autotune.errors import UsageError
from autotune.search.space import build_space
from autotune.strategy import Strategy
from autotune.workloads.base import Workload, WorkloadRef
from tests import factories, own_datasets, own_trainers
from tests.commands import autotune, briefly, heard

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def run_of(workload: Workload, **knobs: Any) -> Run:
    strategy = Strategy(**{"micro_batch": workload.recipe.global_batch, "attention": workload.attentions[0], **knobs})
    return apply(strategy, workload, backends.get("cpu"))


def looked_at(name: str) -> tuple[WorkloadRef, Workload]:
    """As a search opens it, and its trials."""
    module = workloads.get(f"tests.own_datasets:{name}")
    ref = workloads.look(module.prepare(None, limit=None, on_progress=lambda _: None), lambda _: None)
    return ref, module.open_workload(ref)


def test_a_loaders_samples_are_trained_on_once_an_epoch() -> None:
    workload = own_datasets.workload("pictures")
    assert workload.source == "22 samples, Pictures"
    assert (workload.recipe.global_batch, workload.num_train, workload.loop) == (4, 22, "loader")
    run = run_of(workload, micro_batch=2, accumulation=2)
    first, second = ([[own_datasets.numbers_of(micro) for micro in batch] for batch in run.loader] for _ in range(2))
    assert [[len(micro) for micro in batch] for batch in first] == [[2, 2]] * 5 + [[2]]
    for epoch in (first, second):
        assert sorted(itertools.chain(*itertools.chain(*epoch))) == list(range(22))
    assert first != second


def test_an_epochs_rest_is_left_out_where_the_loader_drops_it() -> None:
    workload = workloads.custom.workload_of("mine", lambda: own_datasets.pictures(drop_last=True))
    run = run_of(workload)
    assert workload.steps_per_epoch == len(run.loader) == 5
    left_out = set()
    for _ in range(6):
        batches = list(run.loader)
        assert [micro.num_samples for (micro,) in batches] == [4] * 5
        left_out |= set(range(22)) - set(itertools.chain(*(own_datasets.numbers_of(micro) for (micro,) in batches)))
    assert len(left_out) > 2  # others in each epoch


def test_what_is_drawn_in_reading_depends_on_the_batch_alone() -> None:
    """On whichever process reads it, in whatever parts it is trained, and whatever was drawn before; and other epochs
    draw anew."""
    workload = own_datasets.workload("pictures")

    def epochs(**knobs: Any) -> list[dict[int, list[float]]]:
        run = run_of(workload, **knobs)
        found = []
        for _ in range(2):
            rows = [row for batch in run.loader for micro in batch for row in micro.inputs["input"].tolist()]
            found.append({int(number): drawn for number, *drawn in rows})
        return found

    plain = epochs()
    assert plain == epochs(workers=2, micro_batch=1, accumulation=4)
    torch.rand(7), random.random(), np.random.rand()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert plain == epochs()
    assert all(plain[0][number] != plain[1][number] for number in range(22))
    torch.set_rng_state(before[0])
    workload.train.fetch(np.arange(4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]


@pytest.mark.parametrize("name", ["texts", "texts_of_one_width"])
def test_padding_is_cut_off_and_the_same_is_trained(name: str) -> None:
    workload = own_datasets.workload(name)

    def losses(**knobs: Any) -> tuple[list[float], int]:
        run = run_of(workload, **knobs)
        batches = list(run.loader)
        tokens = sum(micro.inputs["input_ids"].numel() for batch in batches for micro in batch)
        return [float(run.step(batch)) for batch in batches], tokens

    plain, most = losses()
    for knobs in ({"padding": "longest"}, {"padding": "longest", "micro_batch": 1, "accumulation": 4}):
        found, tokens = losses(**knobs)
        assert found == pytest.approx(plain, rel=1e-4)
        assert tokens < most or (name, len(knobs)) == ("texts", 1)


def test_buckets_are_of_samples_of_like_length() -> None:
    workload = own_datasets.workload("texts")
    lengths = own_datasets.Texts().reviews.lengths

    def spread(**options: Any) -> float:
        strategy = Strategy(micro_batch=4, attention=workload.attentions[0], padding="buckets")
        run = apply(strategy, workload, backends.get("cpu"), **options)
        assert run.loader.lengths.tolist() == lengths.tolist()
        found = [micro.inputs["attention_mask"].sum(1).float() for (micro,) in run.loader]
        assert sum(map(len, found)) == 60
        return float(torch.stack([length.std() for length in found]).mean())

    assert spread() < 1
    told = own_datasets.Texts()
    assert spread(dataset=told, lengths=lengths.tolist()) < 1
    assert told.num_read == 60  # by the epoch alone
    with pytest.raises(UsageError, match="7 lengths for 60 samples"):
        spread(dataset=told, lengths=[1] * 7)


def test_trials_take_samples_that_were_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.workloads.own_data.MOST_KNOWN", 16)
    ref, workload = looked_at("texts")
    assert len(ref.known[0].positions) == 16
    assert (workload.num_train, workload.num_test) == (60, 4)
    lengths = own_datasets.Texts().reviews.lengths[list(ref.known[0].positions)]
    assert set(workload.train.lengths.tolist()) == set(lengths.tolist())
    assert workload.max_tokens == lengths.max()
    run = run_of(workload, padding="buckets")
    for planned, (micro,) in zip(run.loader.plan(0), run.loader, strict=True):
        width = micro.inputs["input_ids"].shape[1]
        assert width <= planned.widths[0] < width + 8  # what the search expects is what it gets
        assert int(micro.inputs["attention_mask"].sum(1).max()) == width
    whole = workloads.get("tests.own_datasets:texts").open_workload(WorkloadRef(name="", folder="", source=""))
    assert len(set(whole.train.samples.tolist())) == 60


def test_what_is_padded_by_the_loader_is_compared_with_that() -> None:
    _, workload = looked_at("texts")
    assert workload.baseline.padding == "longest"
    space = build_space(factories.hardware(), backends.get("cpu"), workload)
    assert space.values["padding"] == ("longest", "buckets")
    assert "pads to the longest" in space.left_out["padding=max"]
    assert 0 in space.values["workers"]
    assert len(space.values["workers"]) > 1
    assert looked_at("texts_of_one_width")[1].baseline.padding == "max"


def test_a_loader_that_does_not_shuffle_keeps_its_order() -> None:
    workload = own_datasets.workload("texts_in_order")
    run = run_of(workload, micro_batch=2, accumulation=2, padding="longest")
    for _ in range(2):
        classes = torch.cat([torch.cat([micro.targets for micro in batch]).sort().values for batch in run.loader])
        expected = torch.tensor([own_datasets.Texts()[index]["labels"] for index in range(60)])
        assert torch.equal(classes, expected.view(-1, 4).sort(1).values.flatten())
    space = build_space(factories.hardware(), backends.get("cpu"), looked_at("texts_in_order")[1])
    assert "in their order" in space.left_out["padding=buckets"]
    assert "longest" in space.values["padding"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("with_own_sampler", "chooses samples in a way of its own"),
        ("with_own_batches", "puts batches together in a way of its own"),
        ("of_a_stream", "samples come one by one"),
    ],
)
def test_of_other_loaders_the_first_batch_is_the_example(name: str, words: str) -> None:
    workload = own_datasets.workload(name)
    assert workload.source == f"an example batch of 4, 1,000 times an epoch (its loader's {words})".replace(
        "loader's ", "loader's " if "come" in words else "loader "
    )
    assert (workload.num_train, workload.loop) == (4000, "own")


def test_a_trainers_data_and_epochs_are_those_that_it_has() -> None:
    workload = own_datasets.workload("of_a_trainer")
    assert (workload.num_train, workload.num_test, workload.recipe.epochs) == (64, 24, 3)
    ref, opened = looked_at("of_a_trainer")
    assert [len(known.positions) for known in ref.known] == [64, 24]
    assert opened.num_test == 24
    loss, _ = run_of(opened, padding="longest", micro_batch=4, accumulation=2).evaluate()
    batch = default_data_collator([own_trainers.Reviews(24)[index] for index in range(24)])
    assert loss == pytest.approx(float(own_trainers.classifier()(**batch).loss), rel=1e-4)


def test_a_trainers_loss_is_a_mean_over_the_tokens_of_each_batch() -> None:
    workload = own_datasets.workload("of_a_trainer_of_tokens")
    for knobs in ({}, {"micro_batch": 2, "accumulation": 4, "padding": "longest"}):
        run, plain = run_of(workload, **knobs), own_trainers.decoder()
        plain.load_state_dict(run.model.state_dict())
        sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
        for batch in itertools.islice(run.loader, 4):
            for micro in batch:
                assert micro.num_tokens < micro.inputs["input_ids"].numel() or knobs
            numbers = [micro.inputs["input_ids"] for micro in batch]
            whole = _whole(numbers)
            sgd.zero_grad()
            loss = plain(**whole).loss
            loss.backward()
            sgd.step()
            assert float(run.step(batch)) == pytest.approx(loss.item(), rel=1e-4)


def _whole(ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch of these samples, whose padding is 0, as it was before it was cut up."""
    rows = [row[: int((row > 0).sum())] for part in ids for row in part]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (padded > 0).long()
    return {"input_ids": padded, "attention_mask": mask, "labels": torch.where(mask > 0, padded, -100)}


def test_data_to_test_on_stand_beside_those_to_train_on() -> None:
    workload = own_datasets.workload("to_train_and_test")
    assert (workload.num_train, workload.num_test) == (22, 10)
    ref, opened = looked_at("to_train_and_test")
    assert [len(known.positions) for known in ref.known] == [22, 10]
    assert opened.num_test == 10


def test_a_search_and_a_training_of_ones_own_data(tmp_path: Path, probed: None) -> None:
    where = ("--model", "tests.own_datasets:slow", "--profiles", str(tmp_path / "found"))
    done = briefly("search", *where, "--trials", "4", "--without", "compile", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["workload"]["source"] == "256 samples, Slow"
    assert found["baseline"]["loader_wait"] > 0.5
    assert found["best"]["strategy"]["workers"] > 0
    done = autotune("train", *where, "--epochs", "1", "--run", str(tmp_path))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["num_train"], len(metrics["steps"]["losses"])) == (256, 32)


def test_data_that_cannot_be_read_are_told_in_a_line() -> None:
    done = heard("search", "--model", "tests.own_datasets:broken")
    assert done.returncode == 2
    words = done.stderr.strip().splitlines()[-1]
    assert "the data of tests.own_datasets:broken cannot be read: OSError: picture 21 is torn" in words
