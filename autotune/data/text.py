"""Running text for language models: found in the user's files or made up, split, as token ids in the cache.

Shapes: T tokens of a sample, B samples of a batch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from autotune.data.batching import Indices, MicroBatch
from autotune.data.plain import COMPRESSIONS, read_text
from autotune.data.prepared import prepared
from autotune.data.synthetic import neutral_words, rank_table
from autotune.data.tokenizer import parallel_tokenizers
from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
SHARES = (0.85, 0.10, 0.05)
"""Of a text that comes in one piece, in its own order: neighbouring passages stay in one split."""
TOKENIZER_FILE = "tokenizer.json"
"""Beside the user's text: a tokenizer of Hugging Face's ``tokenizers`` to use, such as GPT-2's."""
ACCEPTED = (
    "a text file, or a folder with train.txt or *.train.tokens (and valid or validation, test), plain, .gz or .xz"
)
SYNTHETIC_DOCUMENTS, SYNTHETIC_WORDS = 4_000, 400
"""About as many words as WikiText-2's training part has, 2.1 million, less a quarter."""
FOLLOWERS = 4
FOLLOW_SHARE = 0.6
"""Of the words, how many are one of the few that often follow the one before."""

_CACHE_FORMAT = 1
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
_CHUNK_CHARACTERS = 100_000


class TextSet(NamedTuple):
    """The three splits, and where they come from."""

    train: str
    validation: str
    test: str
    source: str
    """A phrase for a person."""
    notice: str | None = None
    tokenizer: Path | None = None
    """The user's own, beside the text."""


class Windows:
    """A text's token ids in samples of T tokens, each with the token that follows each; at most ``limit``, drawn once
    and for all by a seed. Raises AutotuneError for a text that is too short for one."""

    def __init__(self, tokens: NDArray[np.uint16], num_tokens: int, limit: int | None = None, seed: int = 0) -> None:
        count = (len(tokens) - 1) // num_tokens
        if count < 1:
            raise AutotuneError(
                f"a part of the text has {len(tokens):,} tokens, and a sample takes {num_tokens + 1:,}; give more text"
            )
        self._tokens, self._num_tokens = tokens, num_tokens
        self._chosen = np.arange(count) if limit is None else np.random.default_rng(seed).permutation(count)[:limit]
        self.lengths: Indices = np.full(len(self._chosen), num_tokens, dtype=np.int64)

    def ids(self, index: int) -> NDArray[np.uint16]:
        """A sample's tokens and the one after them, [T + 1]."""
        start = int(self._chosen[index]) * self._num_tokens
        return self._tokens[start : start + self._num_tokens + 1]


def collate(data: Windows, indices: Indices, width: int) -> MicroBatch:
    """Ids [B, T], and as targets the ids one place on, [B, T]."""
    rows = torch.from_numpy(np.stack([data.ids(int(index)) for index in indices]).astype(np.int64))
    return MicroBatch(
        inputs={"ids_BT": rows[:, :-1].contiguous()},
        targets=rows[:, 1:].contiguous(),
        num_samples=len(indices),
        num_tokens=len(indices) * width,
    )


def find_text(path: Path | None) -> TextSet:
    """Text from ``path``, else made up. Raises AutotuneError, on one line, for what cannot be used."""
    if path is None:
        text = synthetic_text(SYNTHETIC_DOCUMENTS, SYNTHETIC_WORDS)
        return TextSet(
            *_cut(text),
            "synthetic text (no data given)",
            "no text given, using synthetic text: speed and memory carry over, perplexity does not; give a text file "
            "with --data",
        )
    path = path.expanduser()
    try:
        if not path.exists():
            raise AutotuneError(f"no text at {path}: there is no such file or folder")
        folder = path if path.is_dir() else path.parent
        tokenizer = folder / TOKENIZER_FILE if (folder / TOKENIZER_FILE).is_file() else None
        if not path.is_dir():
            return TextSet(*_cut(_some_text(path)), f"text from {path}", None, tokenizer)
        files = {split: _split_file(path, names) for split, names in _NAMES.items()}
        train, validation, test = (files[split] for split in SPLITS)
        if train is None:
            raise AutotuneError(f"no text at {path}: it should be {ACCEPTED}")
        parts = _cut(_some_text(train))
        if validation is not None:
            parts = _some_text(train), _some_text(validation), _some_text(test or validation)
        return TextSet(*parts, f"text from {path}", None, tokenizer)
    except OSError as exc:
        raise AutotuneError(f"cannot read text at {path}: {exc}") from exc


def _some_text(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise AutotuneError(f"{path} is empty; it should hold text")
    return text


def _split_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """``train.txt``, ``wiki.train.tokens.gz``: a name among the dotted words of a file's."""
    for path in sorted(folder.iterdir()):
        words = path.name.split(".")
        compression = f".{words[-1]}" if f".{words[-1]}" in COMPRESSIONS else ""
        plain = words[:-1] if compression else words
        if path.is_file() and plain[-1] in ("txt", "tokens", "raw") and set(names) & set(plain[:-1]):
            return path
    return None


def _cut(text: str) -> tuple[str, str, str]:
    ends = [round(len(text) * share) for share in itertools.accumulate(SHARES)]
    return text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]


def synthetic_text(num_documents: int, num_words: int, seed: int = 0) -> str:
    """Invented prose, the same for the same arguments: words as frequent as in English (Zipf's law, synthetic.py), of
    which each has a few that often follow it, so that there is something to learn from what came before."""
    rng = np.random.default_rng(seed)
    words, ranks = np.array(neutral_words(), dtype=object), rank_table()
    followers = ranks[rng.integers(0, len(ranks), (len(words), FOLLOWERS))]
    drawn = ranks[rng.integers(0, len(ranks), (num_words, num_documents))]
    follows = rng.random((num_words, num_documents)) < FOLLOW_SHARE
    which = rng.integers(0, FOLLOWERS, (num_words, num_documents))
    for place in range(1, num_words):
        drawn[place] = np.where(follows[place], followers[drawn[place - 1], which[place]], drawn[place])
    ends = rng.random((num_words, num_documents)) < 0.06
    forms = np.where(ends, words[drawn] + ".", words[drawn]).T
    return "\n".join(" ".join(document) for document in forms.tolist())


def train_bpe(text: str, vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's is (Radford et al. 2019)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    with parallel_tokenizers():
        tokenizer.train_from_iterator(_chunks(text), trainer)
    return tokenizer


def tokenized_text(
    text: TextSet, *, cache_dir: Path, vocabulary_size: int, max_id: int, on_progress: Callable[[str], None]
) -> Path:
    """The folder with the splits' token ids: of the user's tokenizer, else of a BPE of ``vocabulary_size`` trained on
    the training split.

    Raises AutotuneError where the cache cannot be written, or the tokenizer cannot be used or has ids over ``max_id``.
    """
    import tokenizers

    own = text.tokenizer.read_bytes() if text.tokenizer else b""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(f"{_CACHE_FORMAT} {tokenizers.__version__} {vocabulary_size} {max_id}".encode())
    for part in (own, *(split.encode() for split in text[:3])):
        digest.update(b"%d " % len(part))
        digest.update(part)

    def make(draft: Path) -> None:
        if text.tokenizer is not None:
            tokenizer = _own_tokenizer(text.tokenizer)
        else:
            on_progress("training the tokenizer")
            tokenizer = train_bpe(text.train, vocabulary_size)
        tokenizer.save(str(draft / TOKENIZER_FILE))
        for split, content in zip(SPLITS, text[:3], strict=True):
            on_progress(f"tokenizing the {split} text")
            with parallel_tokenizers():
                encodings = tokenizer.encode_batch_fast(list(_chunks(content)), add_special_tokens=False)
            ids = np.array([token for encoding in encodings for token in encoding.ids], dtype=np.int64)
            if len(ids) and ids.max() > max_id:
                raise AutotuneError(
                    f"{text.tokenizer} has token {ids.max():,}, the model takes up to {max_id:,}; take the file away "
                    "to have a tokenizer trained"
                )
            np.save(draft / f"{split}.npy", ids.astype(np.uint16))

    folder = cache_dir / f"text-{digest.hexdigest()}"
    prepared(folder, make, load_tokens)
    return folder


def load_tokens(folder: Path) -> dict[str, NDArray[np.uint16]]:
    """Each split's token ids, memory-mapped. Raises AutotuneError for a folder that has none, or is damaged."""
    try:
        found = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
    except (OSError, ValueError, EOFError) as exc:
        raise AutotuneError(f"{folder} holds no tokenized text ({exc}); delete it to have it made again") from exc
    if any(tokens.dtype != np.uint16 or tokens.ndim != 1 for tokens in found.values()):
        raise AutotuneError(f"{folder} holds damaged tokenized text; delete it to have it made again")
    return found


def _own_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        json.loads(path.read_text(encoding="utf-8"))
        found: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:
        raise AutotuneError(f"{path} is no tokenizer of Hugging Face's: {exc}; mend it, or take it away") from exc
    found.no_truncation()  # which files from elsewhere may ask for, as they do for padding
    found.no_padding()
    return found


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, where there are lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK_CHARACTERS)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end
