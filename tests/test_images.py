"""Images: reading, checking, augmenting."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from autotune.data.images import (
    MAX_SHIFT,
    Images,
    collate,
    find_images,
    load_images,
    prepared_images,
    synthetic_images,
)
from autotune.errors import AutotuneError

PIXELS = np.random.default_rng(0).integers(1, 256, (40, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(40) % 10


def save(folder: Path, pixels: np.ndarray = PIXELS, labels: np.ndarray = LABELS) -> Path:
    for split in ("train", "test"):
        np.savez(folder / f"{split}_40.npz", images=pixels, labels=labels)
    return folder


def test_archives_and_cifar_s_own_pickles_give_the_same(tmp_path: Path) -> None:
    save(tmp_path)
    folder = tmp_path / "own" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = PIXELS.transpose(0, 3, 1, 2).reshape(40, -1)
    for name, part in (("data_batch_1", slice(0, 20)), ("data_batch_2", slice(20, 40)), ("test_batch", slice(0, 40))):
        (folder / name).write_bytes(pickle.dumps({b"data": rows[part], b"labels": LABELS[part].tolist()}, protocol=2))
    for source in (tmp_path, tmp_path / "own"):
        found = find_images(source)
        for pixels, labels in (found.train, found.test):
            np.testing.assert_array_equal(pixels, PIXELS)
            np.testing.assert_array_equal(labels, LABELS)


class Touch:
    """What a pickle of somebody else's might do."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


def test_a_pickle_that_is_more_than_arrays_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(AutotuneError, match="is no file of CIFAR-10's"):
        find_images(tmp_path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (PIXELS[:, :16], LABELS, "it should be"),
        (PIXELS.astype(np.float32), LABELS, "it should be"),
        (PIXELS, LABELS[:3], "it should be"),
        (PIXELS, LABELS + 1, "labels must be from 0 to 9"),
    ],
)
def test_images_of_another_shape_are_refused(
    pixels: np.ndarray, labels: np.ndarray, message: str, tmp_path: Path
) -> None:
    with pytest.raises(AutotuneError, match=message):
        find_images(save(tmp_path, pixels, labels))


def test_a_folder_without_images_and_a_damaged_archive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AutotuneError, match="no images at"):
        find_images(tmp_path)
    save(tmp_path)
    archive = tmp_path / "train_40.npz"
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(AutotuneError, match=r"train_40\.npz"):
        find_images(tmp_path)


def test_prepared_images_are_what_was_given_and_can_be_limited(tmp_path: Path) -> None:
    folder = prepared_images(find_images(save(tmp_path)), tmp_path / "cache")
    train, test = load_images(folder, 7)
    assert len(train.lengths) == len(test.lengths) == 7
    for image, label in zip(train.pixels(np.arange(7)), train.labels, strict=True):
        (original,) = [place for place in range(40) if (PIXELS[place] == image).all()]
        assert label == LABELS[original]
    assert sorted(train.labels) != list(range(7))


def test_a_batch_has_channels_first_and_is_centred() -> None:
    images, labels = synthetic_images(400, 0)
    batch = collate(Images(images, labels), np.arange(400), 1)
    assert batch.inputs["images_BCHW"].shape == (400, 3, 32, 32)
    assert abs(float(batch.inputs["images_BCHW"].mean())) < 0.5
    np.testing.assert_array_equal(batch.targets.numpy(), labels)


def test_an_epoch_s_augmentation_depends_on_its_seed_alone() -> None:
    data = Images(PIXELS, LABELS)
    first, again, other = data.augmented(1), data.augmented(1), data.augmented(2)
    every = np.arange(40)
    np.testing.assert_array_equal(first.pixels(every), again.pixels(every))
    np.testing.assert_array_equal(first.pixels(every[30:]), first.pixels(every)[30:], "in whatever batch")
    np.testing.assert_array_equal(data.pixels(every), PIXELS)
    assert (first.pixels(every) != other.pixels(every)).any()


def test_an_augmented_image_is_the_image_moved_and_perhaps_mirrored() -> None:
    data = Images(PIXELS, LABELS).augmented(0)
    seen = set()
    for index, image in enumerate(data.pixels(np.arange(40))):
        padded = np.pad(PIXELS[index], ((MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)))
        versions = {0: padded, 1: np.pad(PIXELS[index][:, ::-1], ((MAX_SHIFT,) * 2, (MAX_SHIFT,) * 2, (0, 0)))}
        matches = {
            (is_mirrored, row, column)
            for is_mirrored, version in versions.items()
            for row in range(2 * MAX_SHIFT + 1)
            for column in range(2 * MAX_SHIFT + 1)
            if (version[row : row + 32, column : column + 32] == image).all()
        }
        assert len(matches) == 1
        seen |= matches
    assert {is_mirrored for is_mirrored, _, _ in seen} == {0, 1}
    assert len(seen) > 20


def test_synthetic_classes_differ_and_are_the_same_again() -> None:
    images, labels = synthetic_images(200, 0)
    np.testing.assert_array_equal(images, synthetic_images(200, 0)[0])
    assert sorted(np.bincount(labels)) == [20] * 10
