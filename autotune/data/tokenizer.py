"""Reviews as token ids: a WordPiece vocabulary trained on them, the ids in flat arrays, and their cache on disk.

Nothing here knows where reviews come from (``reviews``) or how they are padded (``batching``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autotune.data.prepared import prepared
from autotune.data.synthetic import Review
from autotune.errors import AutotuneError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from autotune.data.reviews import ReviewSet

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
"""With ids 0 to 3."""
CLS_ID = 2

_CACHE_FORMAT = 1
_REVIEWS_PER_CALL = 1_000
_PARTS = {"tokens": np.dtype(np.uint16), "offsets": np.dtype(np.int64), "labels": np.dtype(np.int64)}


@dataclass(frozen=True, eq=False)
class TokenizedReviews:
    """Labelled reviews as token ids: [CLS], then the pieces, at most ``max_tokens`` in all."""

    tokens: NDArray[np.uint16]
    """[total tokens]: every review's ids, end to end."""
    offsets: NDArray[np.int64]
    """[N + 1]: review i is ``tokens[offsets[i]:offsets[i + 1]]``."""
    labels: NDArray[np.int64]
    """[N]: 1 positive, 0 negative."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each review, [CLS] included, [N]."""
        offsets: NDArray[np.int64] = np.asarray(self.offsets)
        return offsets[1:] - offsets[:-1]

    def ids(self, index: int) -> NDArray[np.uint16]:
        """Token ids of one review."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class TokenizedSplits(NamedTuple):
    """Both splits, and the cache folder that ``load_tokenized`` reads them from."""

    train: TokenizedReviews
    test: TokenizedReviews
    folder: Path


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int = 10_000) -> Tokenizer:
    """A lower-casing WordPiece tokenizer of at most ``vocabulary_size`` entries, the same for the same texts.

    ``<br />`` counts as a space. Special tokens are the model's to add: a review that spells out ``[PAD]`` gets
    brackets and a word. Raises UsageError unless 10 <= ``vocabulary_size`` <= 65536 (ids are 16 bits).
    """
    if not 10 <= vocabulary_size <= 2**16:
        raise UsageError(f"vocabulary_size must be from 10 to 65536 (ids are 16 bits), got {vocabulary_size}")
    from tokenizers import Tokenizer, models, trainers

    texts = list(texts)
    draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    _set_text_rules(draft)
    alphabet = _alphabet(draft, texts, limit=(vocabulary_size - len(SPECIAL_TOKENS)) // 2)
    # The trainer numbers "##a", "##b", ... in the order of a randomly seeded hash table and breaks ties between
    # merges by number. Numbering them first, as if they were special tokens, makes the vocabulary reproducible.
    continuations = [f"##{character}" for character in alphabet if _continues_a_word(draft, character)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*SPECIAL_TOKENS, *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    with parallel_tokenizers():
        draft.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer = Tokenizer(models.WordPiece(vocab=draft.get_vocab(), unk_token="[UNK]"))
    _set_text_rules(tokenizer)
    return tokenizer


def tokenized(
    reviews: ReviewSet,
    *,
    cache_dir: Path,
    max_tokens: int = 512,
    vocabulary_size: int = 10_000,
    on_progress: Callable[[str], None] = lambda message: None,
) -> TokenizedSplits:
    """Both splits as token ids of a vocabulary trained on the train split, memory-mapped from the cache.

    The cache folder is named by a hash of texts, labels and parameters, and appears complete or not at all; one that
    is damaged is made again. It holds the arrays and ``tokenizer.json``.

    Raises UsageError for a ``max_tokens`` or ``vocabulary_size`` out of range, AutotuneError where the cache cannot
    be written.
    """
    if max_tokens < 2:
        raise UsageError(f"max_tokens must be >= 2 ([CLS] and a piece), got {max_tokens}")
    folder = cache_dir / f"reviews-{_content_hash(reviews, max_tokens, vocabulary_size)}"
    with contextlib.suppress(AutotuneError):
        return TokenizedSplits(*load_tokenized(folder), folder)
    on_progress("training the tokenizer")
    tokenizer = train_tokenizer((review.text for review in reviews.train), vocabulary_size=vocabulary_size)
    num_reviews = len(reviews.train) + len(reviews.test)

    def make(draft: Path) -> None:
        tokenizer.save(str(draft / "tokenizer.json"))
        num_done = 0
        for split, rows in (("train", reviews.train), ("test", reviews.test)):
            pieces: list[NDArray[np.uint16]] = []
            for batch in _encoded(tokenizer, rows, max_tokens):
                pieces += batch
                num_done += len(batch)
                if num_done % 10_000 == 0 or num_done == num_reviews:
                    on_progress(f"tokenizing: {num_done:,} of {num_reviews:,} reviews")
            _save(draft, split, pieces, rows)

    return TokenizedSplits(*prepared(folder, make, load_tokenized), folder)


def load_tokenized(folder: Path) -> tuple[TokenizedReviews, TokenizedReviews]:
    """The train and the test split from a folder that ``tokenized`` made, memory-mapped, without reading the texts.

    Raises AutotuneError for any other folder and for a damaged one.
    """
    return _load(folder, "train"), _load(folder, "test")


def _set_text_rules(tokenizer: Tokenizer) -> None:
    from tokenizers import normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("<br />", " "), normalizers.BertNormalizer(lowercase=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()


def _alphabet(tokenizer: Tokenizer, texts: list[str], *, limit: int) -> list[str]:
    """Characters of the normalised texts, sorted; the ``limit`` most frequent where there are more."""
    characters = _normalised(tokenizer, set().union(*texts))
    if len(characters) > limit:
        counts: Counter[str] = Counter()
        for character, count in sum((Counter(text) for text in texts), Counter[str]()).items():
            for normalised in _normalised(tokenizer, {character}):
                counts[normalised] += count
        characters = set(sorted(counts, key=lambda character: (-counts[character], character))[:limit])
    return sorted(characters)


def _normalised(tokenizer: Tokenizer, characters: set[str]) -> set[str]:
    return {
        normalised
        for character in characters
        for normalised in tokenizer.normalizer.normalize_str(character)
        if not normalised.isspace()
    }


def _continues_a_word(tokenizer: Tokenizer, character: str) -> bool:
    """Whether it may stand within a word: punctuation and CJK characters are words of their own."""
    text = tokenizer.normalizer.normalize_str(character * 2)
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


def _encoded(tokenizer: Tokenizer, rows: list[Review], max_tokens: int) -> Iterator[list[NDArray[np.uint16]]]:
    for start in range(0, len(rows), _REVIEWS_PER_CALL):
        texts = [review.text for review in rows[start : start + _REVIEWS_PER_CALL]]
        with parallel_tokenizers():
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        yield [np.array([CLS_ID, *encoding.ids[: max_tokens - 1]], dtype=np.uint16) for encoding in encodings]


@contextlib.contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """All cores within, unless the user has said otherwise.

    Afterwards the variable stays at ``false``. A process forked from this one, such as a loader's worker, would wait
    for ever for threads it has not got with ``true`` (seen with tokenizers 0.23.3), and older releases print a
    warning there when it is unset.
    """
    name = "TOKENIZERS_PARALLELISM"
    chosen = os.environ.get(name)
    if chosen is not None and name not in _chosen_here:
        yield
        return
    _chosen_here.add(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = "false"


_chosen_here: set[str] = set()


def _content_hash(reviews: ReviewSet, max_tokens: int, vocabulary_size: int) -> str:
    import tokenizers

    digest = hashlib.blake2b(digest_size=12)
    digest.update(f"{_CACHE_FORMAT} {tokenizers.__version__} {max_tokens} {vocabulary_size}".encode())
    for rows in (reviews.train, reviews.test):
        digest.update(f" {len(rows)}\n".encode())
        for text, label in rows:
            encoded = text.encode()
            digest.update(b"%d %d " % (label, len(encoded)))
            digest.update(encoded)
    return digest.hexdigest()


def _save(folder: Path, split: str, pieces: list[NDArray[np.uint16]], rows: list[Review]) -> None:
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16),
        "offsets": offsets,
        "labels": np.array([review.label for review in rows], dtype=np.int64),
    }
    for part, dtype in _PARTS.items():
        assert arrays[part].dtype == dtype
        np.save(folder / f"{split}_{part}.npy", arrays[part])


def _load(folder: Path, split: str) -> TokenizedReviews:
    try:
        arrays = {part: np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in _PARTS}
    except (OSError, ValueError, EOFError) as exc:
        raise AutotuneError(f"{folder} holds no tokenized reviews ({exc}); delete it to have them made again") from exc
    tokens, offsets, labels = arrays.values()
    is_whole = (
        all(arrays[part].dtype == dtype and arrays[part].ndim == 1 for part, dtype in _PARTS.items())
        and len(offsets) == len(labels) + 1
        and offsets[-1] == len(tokens)
    )
    if not is_whole:
        raise AutotuneError(f"{folder} holds damaged tokenized reviews ({split}); delete it to have them made again")
    return TokenizedReviews(tokens, offsets, labels)
