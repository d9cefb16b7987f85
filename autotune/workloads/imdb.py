"""The movie review classifier: Maas et al. 2011's data, a 5.85 M parameter encoder, AdamW with warm-up and cosine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autotune.data.batching import Part, pack
from autotune.data.reviews import find_reviews
from autotune.data.tokenizer import load_tokenized, tokenized
from autotune.models.encoder import EncoderClassifier
from autotune.store import cache_dir
from autotune.workloads.base import CrossEntropy, Recipe, Workload, WorkloadRef, num_correct

MAX_TOKENS = 512
VOCABULARY_SIZE = 10_000
NUM_LAYERS = 4

RECIPE = Recipe(learning_rate=1e-4, weight_decay=0.01, warmup_steps=100, clip_norm=1.0, global_batch=32, epochs=5)


def prepare(data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
    """Finds, tokenizes and caches the reviews. Raises AutotuneError for data that cannot be used.

    ``limit`` takes at most so many reviews of each split; the tokenizer is always trained on the whole training split.
    """
    on_progress("reading the reviews")
    reviews = find_reviews(data, num_train=None, num_test=None)
    prepared = tokenized(
        reviews,
        cache_dir=cache_dir() / "data",
        max_tokens=MAX_TOKENS,
        vocabulary_size=VOCABULARY_SIZE,
        on_progress=on_progress,
    )
    return WorkloadRef(
        name="imdb", folder=str(prepared.folder), source=reviews.source, notice=reviews.notice, limit=limit
    )


def open_workload(ref: WorkloadRef) -> Workload:
    """The classifier and its reviews."""
    train, test = load_tokenized(Path(ref.folder))
    return Workload(
        name="imdb",
        recipe=RECIPE,
        source=ref.source,
        build_model=lambda: EncoderClassifier(
            vocabulary_size=VOCABULARY_SIZE, max_tokens=MAX_TOKENS, num_layers=NUM_LAYERS
        ),
        loss=CrossEntropy(),
        num_correct=num_correct,
        train=train if ref.limit is None else Part(train, ref.limit),
        test=test if ref.limit is None else Part(test, ref.limit),
        max_tokens=MAX_TOKENS,
        pack=pack,
    )
