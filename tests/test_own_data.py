"""A user's own data: what a loader gives is what trains, in whatever parts, processes and trials."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import default_data_collator

from autotune import backends, workloads
from autotune.apply import apply
from autotune.errors import UsageError
from autotune.search.settings import Settings
from autotune.search.space import build_space
from autotune.search.task import Task
from autotune.strategy import Strategy
from autotune.workloads.base import Workload, WorkloadRef
from tests import factories, own_datasets, own_trainers
from tests.commands import autotune, briefly, heard
from tests.own_datasets import run_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def looked_at(name: str) -> tuple[Any, Workload]:
    """As a search opens it, and its trials."""
    module = workloads.get(f"tests.own_datasets:{name}")
    ref = workloads.look(module.prepare(None, limit=None, on_progress=lambda _: None), lambda _: None)
    return ref, module.open_workload(ref)


def test_a_loaders_samples_are_trained_on_once_an_epoch() -> None:
    workload = own_datasets.workload("pictures")
    assert workload.source == "22 samples, Pictures, 4 of them also to test on"
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
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    assert plain == epochs()
    assert all(plain[0][number] != plain[1][number] for number in range(22))
    torch.set_rng_state(before[0])
    workload.train.fetch(np.arange(4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before[1:]


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
        ("with_two_views", "batches have other rows than samples"),
        ("of_some", "chooses samples in a way of its own"),
        ("with_own_iteration", "makes batches in a way of its own"),
    ],
)
def test_of_other_loaders_the_first_batch_is_the_example(name: str, words: str) -> None:
    workload = own_datasets.workload(name)
    assert workload.source.startswith("an example batch of 4, 1,000 times an epoch (its loader")
    assert words in workload.source
    assert (workload.num_train, workload.recipe.global_batch, workload.loop) == (4000, 4, "own")


def test_a_batch_sampler_of_torchs_says_how_large_batches_are() -> None:
    data = own_datasets.Pictures()
    loader = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, True))
    workload = workloads.custom.workload_of("mine", lambda: (nn.Linear(4, 3), loader))
    assert (workload.recipe.global_batch, workload.num_train, workload.steps_per_epoch) == (4, 22, 5)
    run = apply(run_of(workload).strategy, workload, backends.get("cpu"), dataset=own_datasets.Pictures(9))
    assert len(run.loader) == 2, "what the loader drops is dropped of another dataset as well"


def test_samples_of_any_length_are_left_out_of_buckets() -> None:
    """Which are those that come last by chance: the shortest would never be trained on."""
    workload = own_datasets.workload("texts")
    data = dataclasses.replace(workload.train, source=workload.train.source._replace(drops_last=True)).some(23)
    workload = dataclasses.replace(workload, train=data)
    run, seen = run_of(workload, padding="buckets"), set()
    for _ in range(30):
        epoch = [tuple(row.tolist()) for (micro,) in run.loader for row in micro.inputs["input_ids"][:, :4]]
        assert len(epoch) == 20
        seen |= set(epoch)
    assert len(seen) == 23


def test_random_numbers_of_three_sources_have_nothing_to_do_with_each_other() -> None:
    batches = run_of(workloads.custom.workload_of("mine", lambda: own_datasets.pictures(batch_size=1))).loader
    drawn = torch.cat([micro.inputs["input"] for _ in range(40) for (micro,) in batches])[:, 1:]
    assert torch.corrcoef(drawn.T).triu(1).abs().max() < 0.15


def test_data_that_draw_from_numbers_of_their_own_are_not_searched_with() -> None:
    ref, workload = looked_at("drawing")
    assert ref.known == ()
    assert "random numbers of their own" in workload.source
    assert (workload.num_train, workload.num_test) == (4000, 200)
    assert own_datasets.workload("drawing").num_train == 22, "trained on they are"


def test_padding_that_no_mask_tells_is_left_as_it_is() -> None:
    _, workload = looked_at("without_mask")
    assert workload.baseline.padding == "max"
    assert set(workload.train.lengths.tolist()) == {workload.max_tokens}
    space = build_space(factories.hardware(), backends.get("cpu"), workload)
    assert space.values["padding"] == ("max",)
    run, plain = (run_of(own_datasets.workload("without_mask"), **knobs) for knobs in ({"padding": "buckets"}, {}))
    assert [micro.targets.tolist() for (micro,) in run.loader] != [micro.targets.tolist() for (micro,) in plain.loader]
    assert run.loader.lengths.std() == 0, "they are not taken for as long as the batch that they were read in"


def test_data_to_test_on_are_those_that_were_asked_for() -> None:
    with pytest.raises(UsageError, match="data to test on: its loader chooses"):
        own_datasets.workload("to_test_on_some")
    with pytest.raises(UsageError, match="two DataLoaders"):
        workloads.custom.workload_of("mine", lambda: (nn.Linear(4, 3), [own_datasets.pictures()[1], []]))


def test_loader_processes_that_are_set_up_by_the_user_are_left_alone() -> None:
    space = build_space(factories.hardware(), backends.get("cpu"), looked_at("set_up")[1])
    assert space.values["workers"] == (0,)
    assert "worker_init_fn" in space.left_out["workers=1"]


def test_what_may_be_cut_up_is_told_by_samples_of_all_lengths() -> None:
    """Of a batch of the usual ones a mean over tokens is one over samples as well."""
    _, workload = looked_at("lines")
    assert set(own_datasets.workload("lines").example.lengths[:4].tolist()) == {16}
    assert set(workload.example.lengths[:4].tolist()) == {3, 16}
    assert "not the mean" in (workload.split_refusal or "")


def test_a_search_is_gone_on_with_whatever_reading_took() -> None:
    ref, workload = looked_at("pictures")
    hardware, cpu = factories.hardware(), backends.get("cpu")
    other = msgspec.structs.replace(ref, known=(msgspec.structs.replace(ref.known[0], positions=(1, 2)),))
    tasks = [
        Task(ref=one, workload=workload, hardware=hardware, backend=cpu, settings=Settings()) for one in (ref, other)
    ]
    assert tasks[0].identity() == tasks[1].identity()


def test_a_limit_draws_samples_from_all() -> None:
    module = workloads.get("tests.own_datasets:pictures")
    limited = module.open_workload(module.prepare(None, limit=8, on_progress=lambda _: None))
    assert limited.num_train == 8
    assert max(limited.train.samples) > 10


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
    cut_up: dict[str, Any] = {"micro_batch": 2, "accumulation": 4, "padding": "longest"}
    for knobs in ({}, cut_up):
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
    where = ("--model", "tests.slow_data:workload", "--profiles", str(tmp_path / "found"))
    done = briefly("search", *where, "--trials", "2", "--without", "compile", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["workload"]["source"] == "256 samples, Slow, 13 of them also to test on"
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
