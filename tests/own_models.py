"""Small models and losses as users have them: some train the same in parts, some do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def classes(num_samples: int = 16) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(num_samples, 8, generator=numbers), torch.arange(num_samples) % 3


def tokens(padding: int | None = None) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 20, (16, 10), generator=torch.Generator().manual_seed(0))
    if padding is None:
        return ids, ids
    return ids, torch.where(torch.arange(10) < torch.arange(4, 20).clamp(max=10)[:, None], ids, padding)


def net(*first: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*first, nn.Linear(8, 3))


class Forward(nn.Module):
    """A linear layer whose forward pass is as given."""

    def __init__(self, forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.passed = nn.Linear(8, 3), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.passed(self.linear, x)


class Averaging(nn.Module):
    """Keeps a running mean of its inputs; in a list as a block, so that it may be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x + self.inner(x)  # type: ignore[no-any-return]


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Blocks(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks, self.head = nn.ModuleList(kind() for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def noisy(linear: nn.Linear, x: Tensor) -> Tensor:
    return linear(x + torch.randn_like(x)) * F.dropout(torch.ones(len(x), 1), 0.2)  # type: ignore[no-any-return]


def masked(linear: nn.Linear, x: Tensor) -> Tensor:
    hidden = torch.rand(x.shape) < 0.3  # as many of each sample as it comes
    return (linear(x.masked_fill(hidden, 0.0)).square().sum(1) * hidden.sum(1)).sum() / hidden.sum()  # type: ignore[no-any-return]


def mixed(linear: nn.Linear, x: Tensor) -> Tensor:
    return linear(0.7 * x + 0.3 * x[torch.randperm(len(x))])  # type: ignore[no-any-return]


def weights_dropped(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, F.dropout(linear.weight, 0.4), linear.bias)


def two_headed(linear: nn.Linear, x: Tensor) -> Tensor:
    """A small coupled loss of the bias beside a large one of the weights."""
    coupled = (x.mean(0)[:3] * linear.bias).square().sum()
    return 1e3 * F.linear(x, linear.weight).square().mean() + coupled


def reentrant(linear: nn.Linear, x: Tensor) -> Tensor:
    return checkpoint(linear, x.requires_grad_(), use_reentrant=True)  # type: ignore[no-any-return]


class Counting(nn.Module):
    """Its penalty grows with the steps; what it keeps of a batch's size is none of that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.steps, self.num_samples = nn.Linear(8, 3), 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps, self.num_samples = self.steps + 1, len(x)
        return self.linear(x) * (1 + 1e-4 * self.steps)  # type: ignore[no-any-return]


class Frozen(nn.Module):
    """Normalises by what was learned elsewhere, and says so in its ``train``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Draws with the time first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.layers = nn.Embedding(20, 8), nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.embedding(ids))[0]  # type: ignore[no-any-return]


OTHERS = itertools.count(1)


def tossed(linear: nn.Linear, x: Tensor) -> Tensor:
    """By numbers that are another each time, whatever torch's seed."""
    return linear(x * next(OTHERS))  # type: ignore[no-any-return]


def whole(linear: nn.Linear, x: Tensor) -> Tensor:
    return linear(x[:, : 8 if len(x) == 16 else 7])  # type: ignore[no-any-return]


def weighted(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets, weight=torch.tensor([1.0, 5.0, 1.0]))


def contrasted(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output @ output.T, torch.arange(len(output)))


def hardest(output: Tensor, targets: Tensor) -> Tensor:
    return output.square().sum(1).topk(5).values.mean()


def per_token(ignored: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, targets: F.cross_entropy(output.movedim(-1, 1), targets, ignore_index=ignored)


class Pooled(nn.Module):
    def __init__(self, is_masked: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head, self.is_masked = nn.Embedding(20, 8), nn.Linear(8, 3), is_masked

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        keep = attention_mask.unsqueeze(-1) if self.is_masked else torch.ones_like(attention_mask).unsqueeze(-1)
        return self.head((self.embedding(input_ids) * keep).sum(1) / keep.sum(1))  # type: ignore[no-any-return]


def padded() -> dict[str, Tensor]:
    mask = (torch.arange(12) < torch.arange(3, 11)[:, None]).long()
    return {"input_ids": mask * torch.arange(1, 13), "attention_mask": mask, "label": torch.arange(8) % 3}


class Normalising(Pooled):
    """Its means, in training, are over padding, too."""

    def __init__(self) -> None:
        super().__init__(True)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        keep = attention_mask.unsqueeze(-1)
        x = self.norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.head((x * keep).sum(1) / keep.sum(1))  # type: ignore[no-any-return]
