"""Language models: a decoder that predicts each token from those before it, AdamW with warm-up and cosine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autotune.data.text import Windows, collate, find_text, load_tokens, tokenized_text
from autotune.models.decoder import DecoderLM
from autotune.store import cache_dir
from autotune.workloads.base import CrossEntropy, Recipe, Workload, WorkloadRef

RECIPE = Recipe(learning_rate=3e-4, weight_decay=0.01, warmup_steps=100, clip_norm=1.0, global_batch=32, epochs=1)
BPE_SIZE = 10_000
"""Of the vocabulary that is trained where the user brings no tokenizer; the model's own may be larger."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """What a workload module provides, for a decoder of one size."""

    name: str
    vocabulary_size: int
    max_tokens: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    RECIPE: Recipe = RECIPE

    def prepare(self, data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
        """Finds, tokenizes and caches the text. Raises AutotuneError for data that cannot be used."""
        on_progress("reading the text")
        text = find_text(data)
        folder = tokenized_text(
            text,
            cache_dir=cache_dir() / "data",
            vocabulary_size=BPE_SIZE,
            max_id=self.vocabulary_size - 1,
            on_progress=on_progress,
        )
        return WorkloadRef(name=self.name, folder=str(folder), source=text.source, notice=text.notice, limit=limit)

    def open_workload(self, ref: WorkloadRef) -> Workload:
        """The decoder and its text; evaluated on the validation part."""
        tokens = load_tokens(Path(ref.folder))
        train, validation = (Windows(tokens[part], self.max_tokens, ref.limit) for part in ("train", "validation"))
        return Workload(
            name=self.name,
            recipe=self.RECIPE,
            source=ref.source,
            build_model=functools.partial(
                DecoderLM,
                vocabulary_size=self.vocabulary_size,
                max_tokens=self.max_tokens,
                width=self.width,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                ffn_width=self.ffn_width,
            ),
            loss=CrossEntropy(),
            num_correct=None,
            has_perplexity=True,
            train=train,
            test=validation,
            max_tokens=self.max_tokens,
            collate=collate,
            is_masked=False,
        )


SMALL = LanguageModel(
    name="lm", vocabulary_size=50_257, max_tokens=256, width=256, num_layers=4, num_heads=8, ffn_width=1024
)
BASE = LanguageModel(
    name="lm-base", vocabulary_size=BPE_SIZE, max_tokens=512, width=512, num_layers=6, num_heads=8, ffn_width=2048
)
