"""Lightning's Tuner.scale_batch_size with its defaults: doubles from 2, three steps each, until memory gives out."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.tuner import Tuner

from benchmarks.peers import common


class Module(lightning.LightningModule):  # type: ignore[misc]
    """The classifier with the batch size that the tuner scales."""

    def __init__(self, workload: Any) -> None:
        super().__init__()
        self.batch_size = 2
        self.model = common.Classifier(workload)
        self._workload = workload

    def train_dataloader(self) -> Any:
        return common.loader(self._workload, self.batch_size)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch)["loss"]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return common.adamw(self.model, self._workload)


def main() -> None:
    common.limit_memory()
    workload = common.workload()
    clock = common.Clock()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=workload.recipe.clip_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    size = Tuner(trainer).scale_batch_size(Module(workload))
    clock.report(f"batch size {size}", micro_batch=size)


if __name__ == "__main__":
    main()
