"""Batches with several targets, models that give several outputs, and models that are given their targets."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autotune import backends
from autotune.apply import apply
from autotune.backends.base import Backend
from autotune.errors import UsageError
from autotune.strategy import Strategy
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests.own_datasets import losses, run_of
from tests.taped import Tape

CPU = backends.get("cpu")


class Heads(nn.Module):
    """A class and a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.kind, self.size = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).relu()
        return self.kind(hidden), self.size(hidden).squeeze(1)


def of_both(output: Any, targets: Any) -> Tensor:
    kinds, sizes = targets.values() if isinstance(targets, dict) else targets
    return F.cross_entropy(output[0], kinds) + F.mse_loss(output[1], sizes)


class Sizes(NamedTuple):
    kinds: Tensor
    sizes: Tensor


def data(count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(count, 8, generator=numbers), torch.arange(count) % 3, torch.rand(count, generator=numbers)


def batches() -> dict[str, Any]:
    x, kinds, sizes = data()
    return {
        "one behind the other": (x, kinds, sizes),
        "a tuple": (x, (kinds, sizes)),
        "a list": [x, [kinds, sizes]],
        "a named tuple": (x, Sizes(kinds, sizes)),
        "a dict": (x, {"kinds": kinds, "sizes": sizes}),
        "in a dict": {"x": x, "kinds": kinds, "sizes": sizes},
        "a dict in a dict": {"x": x, "targets": {"kinds": kinds, "sizes": sizes}},
    }


@pytest.mark.parametrize("form", batches())
def test_several_targets_are_cut_up_with_their_samples(form: str) -> None:
    batch = batches()[form]
    workload = workload_of("heads", lambda: (Heads(), batch, of_both))
    workload.check_runs()
    assert workload.split_refusal is None
    strategy = Strategy(micro_batch=4, accumulation=4)
    run = apply(strategy, workload, CPU)
    for trained in (next(iter(run.loader)), run.split(batch)):
        assert [micro.num_samples for micro in trained] == [4, 4, 4, 4]
    found, plain = [], Heads()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    run = apply(strategy, workload, CPU, optimizer=lambda own: torch.optim.AdamW(own, lr=1e-3, weight_decay=0.0))
    x, kinds, sizes = data()
    for _ in range(5):
        loss = of_both(plain(x), (kinds, sizes))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
        optimizer.step()
        found.append((float(run.step(run.split(batch))), float(loss.detach())))
    for ours, theirs in found:
        assert ours == pytest.approx(theirs, rel=1e-4)


class Both(torch.utils.data.Dataset[tuple[Tensor, dict[str, Tensor]]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, kinds, sizes = data(40)
        return x[index], {"kinds": kinds[index], "sizes": sizes[index]}


def of_loader() -> Workload:
    return workload_of("heads", lambda: (Heads(), DataLoader(Both(), batch_size=8), of_both))


def test_several_targets_are_read_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = losses(run_of(of_loader()))
    assert losses(run_of(of_loader(), workers=1, accumulation=2)) == pytest.approx(plain, rel=1e-4)
    Tape().set_up(monkeypatch.setattr)
    backend: Backend = CPU
    monkeypatch.setattr(backend, "graphs", ("none", "step"))
    recorded = run_of(of_loader(), graphs="step")
    assert losses(recorded) == pytest.approx(plain, rel=1e-4)
    assert recorded.step.graphs is not None
    assert recorded.step.graphs.num_recorded == 1


class Penalized(Heads):
    """With a number that its loss may take or leave."""

    def forward(self, x: Tensor) -> Any:
        kinds, sizes = super().forward(x)
        return kinds, sizes, sizes.square().mean()


@pytest.mark.parametrize("kind", [Heads, Penalized])
def test_several_outputs_are_in_fp32_for_the_loss(kind: type[Heads]) -> None:
    seen = set[torch.dtype]()

    def noting(output: Any, targets: Any) -> Tensor:
        seen.update(part.dtype for part in output)
        return of_both(output, targets)

    workload = workload_of("heads", lambda: (kind(), data(), noting))
    run = apply(Strategy(micro_batch=16, precision="bf16"), workload, CPU)
    run.step(next(iter(run.loader)))
    assert seen == {torch.float32}


def test_a_mean_over_the_tokens_of_several_targets_is_no_mean_over_samples() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))  # type: ignore[no-any-return]

    def mean(output: Tensor, targets: dict[str, Tensor]) -> Tensor:
        found = [F.cross_entropy(output.flatten(0, 1), part.flatten(), ignore_index=-100) for part in targets.values()]
        return torch.stack(found).mean()

    ids = torch.randint(2, 20, (16, 10), generator=torch.Generator().manual_seed(0))
    marked = torch.where(torch.arange(10) < torch.arange(4, 20).clamp(max=10)[:, None], ids, -100)
    for tags, is_refused in ((ids, False), (marked, True)):
        targets = {"words": ids, "tags": tags}
        workload = workload_of("tagger", functools.partial(lambda targets: (Tagger(), (ids, targets), mean), targets))
        assert (workload.split_refusal is not None) == is_refused


@pytest.mark.parametrize("name", ["targets", "labels"])
def test_a_model_that_takes_its_targets_and_gives_its_loss_among_others_is_trained_by_it(name: str) -> None:
    ids = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self: Any, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(self.embedding(idx))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def forward_by_labels(self: Any, idx: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return forward(self, idx, labels)

    Model.forward = forward if name == "targets" else forward_by_labels
    batch = (ids, ids.roll(-1, 1))
    workload = workload_of("gpt", lambda: (Model(), batch))
    workload.check_runs()
    assert workload.split_refusal is None
    run = apply(Strategy(micro_batch=4, accumulation=2), workload, CPU)
    expected = float(Model()(*batch)[1].detach())
    assert float(run.step(run.split(batch))) == pytest.approx(expected, rel=1e-4)


def test_several_targets_without_a_loss_are_refused_with_their_names() -> None:
    workload = workload_of("heads", lambda: (Heads(), batches()["in a dict"]))
    with pytest.raises(UsageError, match=r"several targets \(kinds, sizes\).*\(model, batch, loss\)"):
        workload.check_runs()


class Expert(nn.Module):
    """Gives logits, and a number that is no loss by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.gate = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.gate(x).square().mean()


def test_a_number_beside_logits_is_no_loss_where_there_are_targets() -> None:
    workload = workload_of("expert", lambda: (Expert(), data()[:2]))
    with pytest.raises(UsageError, match="without a loss"):
        workload.check_runs()


class Optional(nn.Module):
    """Could be told its labels, and gives logits in any case."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]


def test_labels_stay_the_targets_of_a_model_that_gives_no_loss() -> None:
    workload = workload_of("optional", lambda: (Optional(), data()[:2]))
    workload.check_runs()
    assert workload.collate(workload.train, np.arange(4), 1).targets.tolist() == [0, 1, 2, 0]


def test_what_else_a_dict_has_is_left_out_as_long_as_there_is_a_target() -> None:
    x, kinds, _ = data(4)
    ragged = [torch.zeros(count) for count in (1, 2, 3, 4)]
    batch = {"x": x, "label": kinds, "size": [torch.full((4,), 224), torch.full((4,), 200)], "boxes": ragged}
    workload = workload_of("more", lambda: (Optional(), batch))
    workload.check_runs()
    micro = workload.collate(workload.train, np.arange(4), 1)
    assert list(micro.inputs) == ["x"]
    assert micro.targets.tolist() == kinds.tolist()
