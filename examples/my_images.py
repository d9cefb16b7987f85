"""A training script of one's own, whose images take longer to read than to train on: what autotune needs of it is the
function ``workload``, which gives the loader as it is.

autotune search --model examples/my_images.py:workload
python examples/my_images.py
"""

import itertools
import random
import zlib

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

CLASSES, IMAGES, STORED, SIDE, EPOCHS = 10, 2000, 512, 64, 10


class Images(torch.utils.data.Dataset):
    """Made up, and kept compressed; each reading is another part of it, scaled down and perhaps mirrored."""

    def __init__(self):
        numbers = np.random.default_rng(0)
        smooth = (
            numbers.integers(0, 256, (64, 16, 16, 3), dtype=np.uint8).repeat(STORED // 16, 1).repeat(STORED // 16, 2)
        )
        self.files = [zlib.compress(image.tobytes()) for image in smooth]

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        pixels = np.frombuffer(zlib.decompress(self.files[index % 64]), dtype=np.uint8).reshape(STORED, STORED, 3)
        side = random.randint(SIDE * 2, STORED)
        top, left = random.randint(0, STORED - side), random.randint(0, STORED - side)
        image = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).permute(2, 0, 1).float() / 255
        image = nn.functional.interpolate(image[None], SIDE, mode="bilinear", antialias=True)[0]
        return image.flip(2) if random.random() < 0.5 else image, index % CLASSES


class Classifier(nn.Module):
    """A small convolutional network."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.GELU())
                for before, after in itertools.pairwise(widths)
            )
        )
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, image):
        return self.head(self.layers(image).mean((2, 3)))


def loader(**options):
    return DataLoader(Images(), batch_size=32, shuffle=True, drop_last=True, **options)


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=3e-4)


def workload():
    return Classifier(), loader(), nn.functional.cross_entropy, optimizer


def main():
    import autotune

    run = autotune.load("examples/my_images.py:workload").apply()
    for epoch in range(EPOCHS):
        for batch in run.loader:
            loss = run.step(batch)
        print(f"epoch {epoch}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
