"""The image classifier: CIFAR-10's small images, a vision model in the manner of BDH, augmented by the loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autotune.data.images import collate, find_images, load_images, prepared_images
from autotune.models.vision import VisionBDH
from autotune.store import cache_dir
from autotune.workloads.base import CrossEntropy, Recipe, Workload, WorkloadRef, num_correct

RECIPE = Recipe(
    learning_rate=1e-3,
    weight_decay=0.05,
    warmup_steps=200,
    clip_norm=1.0,
    global_batch=128,
    epochs=10,
    label_smoothing=0.1,
)


def prepare(data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
    """Finds and caches the images. Raises AutotuneError for data that cannot be used."""
    on_progress("reading the images")
    images = find_images(data)
    folder = prepared_images(images, cache_dir() / "data")
    return WorkloadRef(name="cifar10", folder=str(folder), source=images.source, notice=images.notice, limit=limit)


def open_workload(ref: WorkloadRef) -> Workload:
    """The classifier and its images."""
    train, test = load_images(Path(ref.folder), ref.limit)
    return Workload(
        name="cifar10",
        recipe=RECIPE,
        source=ref.source,
        build_model=VisionBDH,
        loss=CrossEntropy(RECIPE.label_smoothing),
        num_correct=num_correct,
        train=train,
        test=test,
        max_tokens=1,
        collate=collate,
        is_masked=False,
    )
