"""Trainings as users of transformers and Lightning have them, and strategies for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from autotune import backends
from autotune.api import Tuned
from autotune.strategy import Strategy
from autotune.workloads.base import Workload

TOKENS = 24


UNHEARD = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
"""What the trainers and their parts say of each other and of this machine."""


class Reviews(Dataset[dict[str, Tensor]]):
    """Sequences padded to the limit when they were tokenized, as in many a tutorial."""

    def __init__(self, count: int = 64) -> None:
        numbers = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(4, 17, (count,), generator=numbers)
        self.mask = (torch.arange(TOKENS) < self.lengths[:, None]).long()
        self.ids = torch.randint(2, 50, (count, TOKENS), generator=numbers) * self.mask

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.ids[index, 0] % 2}


class Tokens(Reviews):
    """The same, every token's next to be told but padding's."""

    def __init__(self, same_length: bool = False) -> None:
        super().__init__()
        if same_length:
            self.mask = torch.ones_like(self.mask)
            self.ids = self.ids.clamp(min=2)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = torch.where(self.mask[index] > 0, self.ids[index], -100)
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": labels}


def classifier() -> Any:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=TOKENS, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def decoder() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([Reviews()[index] for index in range(64)])


class Weighted(Trainer):  # type: ignore[misc]
    """Chooses its samples itself."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return WeightedRandomSampler([1.0] * 4 + [0.0] * 60, num_samples=8)


class WithOwnLoss(Trainer):  # type: ignore[misc]
    """Takes a mean, however many batches are accumulated."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return mean_loss(outputs, inputs["labels"])


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def trainer_of_sgd() -> Trainer:
    model = classifier()
    return trainer_of(model, Reviews(), trainer_options={"optimizers": (torch.optim.SGD(model.parameters()), None)})


def trainer_of(
    model: nn.Module | None,
    data: Any,
    collate: Any = default_data_collator,
    *,
    kind: type[Trainer] = Trainer,
    trainer_options: Any = None,
    **options: Any,
) -> Trainer:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "output_dir": "unused", "max_steps": 4}
    plain = {"per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9}
    arguments = TrainingArguments(**{**quiet, **plain, "use_cpu": True, **options})
    return kind(model, arguments, train_dataset=data, data_collator=collate, **(trainer_options or {}))


def reviewing(**options: Any) -> Trainer:
    return trainer_of(classifier(), Reviews(), **options)


def reviews() -> Trainer:
    return reviewing(per_device_train_batch_size=4, gradient_accumulation_steps=2)


def tokens() -> Trainer:
    return trainer_of(decoder(), Tokens())


def tokens_without_trainer() -> tuple[nn.Module, Any]:
    return decoder(), default_data_collator([Tokens()[index] for index in range(8)])


class Module(lightning.LightningModule):  # type: ignore[misc]
    """A small classifier of byte sequences; ``forward`` gives logits, ``training_step`` the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, classes = batch
        loss = F.cross_entropy(self(ids), classes)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]


class Counting(Module):
    """Keeps a metric, and makes its layers when it is told to."""

    def configure_model(self) -> None:
        self.accuracy = MulticlassAccuracy(num_classes=2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.accuracy(self(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)


class TwoOptimizers(Module):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.head.parameters(), lr=0.1), torch.optim.SGD(self.layers.parameters(), lr=0.1)]


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class AsksItsTrainer(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1 / self.trainer.estimated_stepping_batches)


def sequences() -> TensorDataset:
    data = Reviews()
    return TensorDataset(data.ids, data.ids[:, 0] % 2)


class Data(lightning.LightningDataModule):  # type: ignore[misc]
    """With a set-up of its own, and batches by name."""

    def setup(self, stage: str) -> None:
        self.data = Reviews()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=8, shuffle=True)


class WithOwnLoader(Module):
    """Takes batches by name, which it loads itself."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return {"loss": F.cross_entropy(self(batch["input_ids"]), batch["labels"])}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Reviews(), batch_size=4)


def module() -> tuple[Any, Any]:
    return Module(), DataLoader(sequences(), batch_size=8, shuffle=True)


def fit(module: Any, loader: Any, **options: Any) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    plain = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_model_summary": False}
    lightning.Trainer(**{**quiet, **plain, **options}).fit(module, loader)


class AroundBert(nn.Module):
    """A user's own head on one of Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = classifier().distilbert
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden[:, 0])  # type: ignore[no-any-return]


def around_bert() -> tuple[nn.Module, Any]:
    return AroundBert(), default_data_collator([Reviews()[index] for index in range(8)])


def with_sgd() -> tuple[Any, ...]:
    ids, classes = next(iter(DataLoader(sequences(), batch_size=8)))
    return nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(8 * TOKENS, 2)), (ids, classes), None, _sgd


def with_groups() -> tuple[Any, ...]:
    """An optimizer that knows its model's parts by itself."""
    model, batch, *_ = with_sgd()
    return model, batch, None, lambda _: torch.optim.SGD([{"params": model[2].parameters(), "lr": 0.5}], lr=0.1)


def with_rprop() -> tuple[Any, ...]:
    return (*with_sgd()[:3], lambda parameters: torch.optim.Rprop(parameters, lr=0.01))


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def tuned(name: str, *, backend: str = "cpu", **knobs: Any) -> Tuned:
    return Tuned(
        name=f"tests.own_trainers:{name}",
        strategy=Strategy(**{"micro_batch": 8, "attention": "sdpa", **knobs}),
        profile=None,
        path=None,
        backend=backends.get(backend),
    )


def workload(name: str) -> Workload:
    return tuned(name).workload


def apart(first: nn.Module, second: nn.Module) -> float:
    """The largest distance of two models' parameters."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
