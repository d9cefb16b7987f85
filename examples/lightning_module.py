"""A training with Lightning: what autotune needs of it is the function ``workload``.

autotune search --model examples/lightning_module.py:workload
python examples/lightning_module.py
"""

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, TOKENS, SAMPLES, BATCH = 10, 128, 640, 32


class Classifier(lightning.LightningModule):
    """A small transformer over byte sequences."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 256)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.1, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(256, CLASSES)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))

    def training_step(self, batch, batch_idx):
        ids, classes = batch
        loss = F.cross_entropy(self(ids), classes)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def dataset():
    ids = torch.randint(0, 256, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    return TensorDataset(ids, ids[:, 0] % CLASSES)


def fit(module, loader, **options):
    lightning.Trainer(logger=False, enable_checkpointing=False, **{"max_epochs": 2, **options}).fit(module, loader)


def workload():
    return Classifier(), DataLoader(dataset(), batch_size=BATCH, shuffle=True)


def main():
    import autotune

    tuned = autotune.load("examples/lightning_module.py:workload")
    fit(tuned.prepare(Classifier()), tuned.loader(dataset()), **tuned.arguments("lightning"))


if __name__ == "__main__":
    main()
