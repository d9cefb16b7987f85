"""A training script of one's own: what autotune needs of it is the function ``workload``.

autotune search --model examples/my_train.py:workload
python examples/my_train.py
"""

import torch
from torch import nn

CLASSES, TOKENS, BATCH = 10, 128, 32


class Classifier(nn.Module):
    """A small transformer over byte sequences."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 192)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(192, 4, 768, dropout=0.1, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(192, CLASSES)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(0, 256, (BATCH, TOKENS), generator=generator)
        yield ids, ids[:, 0] % CLASSES


def workload():
    return Classifier(), next(batches(1))


def main():
    import autotune

    model = Classifier()
    run = autotune.load("examples/my_train.py:workload").apply(model, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4))
    for step, batch in enumerate(batches(30)):
        loss = run.step(run.split(batch))
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
