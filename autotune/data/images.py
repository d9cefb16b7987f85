"""Small labelled images: CIFAR-10 in the user's files, or made up; augmented by the loader's processes.

Shapes: N images, B samples of a batch, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from autotune.data.batching import Indices, MicroBatch
from autotune.data.prepared import prepared
from autotune.errors import AutotuneError

SIDE = 32
NUM_CLASSES = 10
NUM_SYNTHETIC = (50_000, 10_000)
"""As many as CIFAR-10 has."""
MAX_SHIFT = 4
"""Pixels that an augmented image is moved by at most, in either direction (He et al. 2016, section 4.2)."""
MEAN_C = np.array((0.4914, 0.4822, 0.4465), dtype=np.float32)
STD_C = np.array((0.2470, 0.2435, 0.2616), dtype=np.float32)
"""Of CIFAR-10's training images, by channel, from 0 to 1."""
ACCEPTED = (
    "a folder with train*.npz and test*.npz ('images' [N, 32, 32, 3] of 8 bits, 'labels' [N]), or CIFAR-10's own "
    "cifar-10-batches-py"
)

_CACHE_FORMAT = 1
_CHUNK = 5_000
Pixels = NDArray[np.uint8]


class ImageSet(NamedTuple):
    """Both splits, [N, H, W, C] and [N], and where they come from."""

    train: tuple[Pixels, Indices]
    test: tuple[Pixels, Indices]
    source: str
    notice: str | None = None


class Images:
    """Images and their classes, all or those ``chosen``; the training split as an epoch sees it, moved and mirrored by
    chance."""

    def __init__(self, pixels_NHWC: Pixels, labels: Indices, chosen: Indices | None = None) -> None:
        self._pixels = pixels_NHWC
        self._chosen: Indices = np.arange(len(labels)) if chosen is None else chosen
        self._all_labels = labels
        self.labels: Indices = np.asarray(labels)[self._chosen]
        self.lengths: Indices = np.ones(len(self.labels), dtype=np.int64)
        self._shifts: NDArray[np.int8] | None = None

    def augmented(self, seed: int) -> Images:
        """The same images, each moved and mirrored as the seed says, whatever batch it comes in."""
        found = Images(self._pixels, self._all_labels, self._chosen)
        rng = np.random.default_rng(seed)
        moves = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, (len(self.labels), 2), dtype=np.int8)
        mirrored = rng.integers(0, 2, (len(self.labels), 1), dtype=np.int8)
        found._shifts = np.concatenate([moves, mirrored], 1)
        return found

    def pixels(self, indices: Indices) -> Pixels:
        """Images [B, H, W, C]; what is moved in from outside is black."""
        images: Pixels = self._pixels[self._chosen[indices]]
        if self._shifts is None:
            return images
        height, width = images.shape[1:3]
        padded = np.pad(images, ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)))
        for image, wider, shift in zip(images, padded, self._shifts[indices], strict=True):
            down, right, is_mirrored = shift.tolist()
            rows = wider[MAX_SHIFT - down :][:height]
            columns = rows[:, ::-1] if is_mirrored else rows
            image[:] = columns[:, MAX_SHIFT - right :][:, :width]
        return images


def collate(data: Images, indices: Indices, width: int) -> MicroBatch:
    """Images [B, C, H, W] with mean 0 and deviation 1, and classes [B].

    By one thread, on purpose: torch would take one for each core for such a batch, all of which wait for the last.
    """
    images = data.pixels(indices).transpose(0, 3, 1, 2).astype(np.float32, order="C")
    images /= 255
    images -= MEAN_C[:, None, None]
    images /= STD_C[:, None, None]
    return MicroBatch(
        inputs={"images_BCHW": torch.from_numpy(images)},
        targets=torch.from_numpy(data.labels[indices].astype(np.int64)),
        num_samples=len(indices),
        num_tokens=len(indices),
    )


def find_images(path: Path | None) -> ImageSet:
    """Images from ``path``, else made up. Raises AutotuneError, on one line, for what cannot be used."""
    if path is None:
        train, test = (synthetic_images(count, seed) for seed, count in enumerate(NUM_SYNTHETIC))
        return ImageSet(
            train,
            test,
            "synthetic images (no data given)",
            "no images given, using synthetic images: speed and memory carry over, accuracy does not; give CIFAR-10 "
            "with --data",
        )
    path = path.expanduser()
    try:
        if not path.is_dir():
            raise AutotuneError(f"no images at {path}: it should be {ACCEPTED}")
        for folder in (path, path / "cifar-10-batches-py"):
            batches = [folder / f"data_batch_{number}" for number in range(1, 6)]
            if batches[0].is_file():
                parts = [_pickled(batch) for batch in batches if batch.is_file()]
                train = np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])
                return ImageSet(train, _pickled(folder / "test_batch"), f"CIFAR-10 from {path}")
        files = [next(iter(sorted(path.glob(f"{split}*.npz"))), None) for split in ("train", "test")]
        if files[0] is None or files[1] is None:
            raise AutotuneError(f"no images at {path}: it should be {ACCEPTED}")
        return ImageSet(_archived(files[0]), _archived(files[1]), f"images from {path}")
    except OSError as exc:
        raise AutotuneError(f"cannot read images at {path}: {exc}") from exc


def synthetic_images(count: int, seed: int) -> tuple[Pixels, Indices]:
    """Made-up images [N, H, W, C] of ten classes: a pattern for each, moved, of random contrast, in noise."""
    patterns = _patterns()
    rng = np.random.default_rng(seed + 1)
    labels = rng.permutation(np.arange(count) % NUM_CLASSES)
    pixels = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        chosen = labels[start : start + _CHUNK]
        rows, columns = rng.integers(0, SIDE // 2, (2, len(chosen)))
        contrast = rng.uniform(10, 40, len(chosen)).astype(np.float32)
        noise = rng.standard_normal((len(chosen), SIDE, SIDE, 3), dtype=np.float32) * 40
        for place, label in enumerate(chosen.tolist()):
            row, column = rows[place], columns[place]
            noise[place] += 128 + contrast[place] * patterns[label, row : row + SIDE, column : column + SIDE]
        pixels[start : start + len(chosen)] = noise.clip(0, 255)
    return pixels, labels


def prepared_images(images: ImageSet, cache_dir: Path) -> Path:
    """The folder with both splits' arrays. Raises AutotuneError where the cache cannot be written."""
    digest = hashlib.blake2b(f"{_CACHE_FORMAT}".encode(), digest_size=12)
    for pixels, labels in (images.train, images.test):
        for array in (pixels, labels):
            digest.update(np.ascontiguousarray(array).data)

    def make(draft: Path) -> None:
        for split, (pixels, labels) in (("train", images.train), ("test", images.test)):
            np.save(draft / f"{split}_pixels.npy", pixels)
            np.save(draft / f"{split}_labels.npy", labels)

    folder = cache_dir / f"images-{digest.hexdigest()}"
    prepared(folder, make, load_images)
    return folder


def load_images(folder: Path, limit: int | None = None) -> tuple[Images, Images]:
    """Both splits, memory-mapped, at most ``limit`` of each drawn by a seed. Raises AutotuneError for a folder that has
    none."""
    try:
        parts = [
            [np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in ("pixels", "labels")]
            for split in ("train", "test")
        ]
    except (OSError, ValueError, EOFError) as exc:
        raise AutotuneError(f"{folder} holds no prepared images ({exc}); delete it to have them made again") from exc
    train, test = (Images(pixels, labels, _drawn(len(labels), limit)) for pixels, labels in parts)
    return train, test


def _drawn(count: int, limit: int | None, seed: int = 0) -> Indices | None:
    return None if limit is None else np.random.default_rng(seed).permutation(count)[:limit].astype(np.int64)


def _patterns() -> NDArray[np.float32]:
    """A smooth pattern for each class, larger than an image: [class, 48, 48, C]."""
    rng = np.random.default_rng(0)
    side = SIDE + SIDE // 2
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / SIDE
    found = np.zeros((NUM_CLASSES, side, side, 3), dtype=np.float32)
    for label in range(NUM_CLASSES):
        for channel in range(3):
            for _ in range(4):
                across, along = rng.uniform(-4, 4, 2)
                found[label, :, :, channel] += np.sin(2 * np.pi * (across * x + along * y + rng.uniform()))
    return found


def _checked(pixels: Any, labels: Any, path: Path) -> tuple[Pixels, Indices]:
    labels = np.asarray(labels, dtype=np.int64)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (SIDE, SIDE, 3) or labels.shape != pixels.shape[:1]:
        raise AutotuneError(
            f"{path}: images {pixels.dtype} {list(pixels.shape)}, labels {list(labels.shape)}; it should be {ACCEPTED}"
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise AutotuneError(f"{path}: labels must be from 0 to {NUM_CLASSES - 1}, and at least one")
    return pixels, labels


def _archived(path: Path) -> tuple[Pixels, Indices]:
    try:
        with path.open("rb") as file, np.load(file) as archive:
            return _checked(archive["images"], archive["labels"], path)
    except (KeyError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        raise AutotuneError(f"{path} cannot be read ({exc}); it should be {ACCEPTED}") from exc
    except Exception as exc:
        if type(exc).__module__ == "zipfile":
            raise AutotuneError(f"{path} is damaged ({exc}); fetch it again") from exc
        raise


def _pickled(path: Path) -> tuple[Pixels, Indices]:
    """One of CIFAR-10's own files: rows of 3,072 bytes, red, green, blue."""
    try:
        found = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.asarray(found[b"data"]).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        return _checked(pixels, found[b"labels"], path)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as exc:
        raise AutotuneError(f"{path} is no file of CIFAR-10's ({exc}); fetch it again") from exc


class _Arrays(pickle.Unpickler):
    """Arrays and nothing else: a pickle may otherwise run what it likes."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        is_array = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if is_array or (module, name) == ("_codecs", "encode"):
            found: Callable[..., Any] = super().find_class(module.replace("numpy.core", "numpy._core"), name)
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
