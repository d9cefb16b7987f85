"""Text for language models: finding, cutting, tokenizing, and what can be wrong with it."""

from __future__ import annotations

import gzip
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from autotune.data import text
from autotune.data.text import SHARES, Windows, collate, find_text, load_tokens, synthetic_text, tokenized_text
from autotune.errors import AutotuneError

LINES = "\n".join(f"line {number} of a small text, and some more words" for number in range(400))


def tokenized(found: text.TextSet, cache: Path, size: int = 300) -> Path:
    return tokenized_text(found, cache_dir=cache, vocabulary_size=size, max_id=10_000, on_progress=lambda _: None)


def test_one_file_is_cut_in_its_own_order(tmp_path: Path) -> None:
    path = tmp_path / "book.txt.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    found = find_text(path)
    assert found.train + found.validation + found.test == LINES
    for part, share in zip(found[:3], SHARES, strict=True):
        assert len(part) / len(LINES) == pytest.approx(share, abs=0.001)


def test_a_folder_with_splits_is_taken_as_it_is(tmp_path: Path) -> None:
    for name, words in (("train", "a b"), ("valid", "c d"), ("test", "e f")):
        (tmp_path / f"wiki.{name}.tokens").write_text(words)
    assert find_text(tmp_path)[:3] == ("a b", "c d", "e f")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.txt", "there is no such file or folder"),
        (lambda folder: folder, "it should be a text file"),
        (lambda folder: (folder / "a.txt").write_text(" \n") and folder / "a.txt", "is empty"),
        (lambda folder: (folder / "a.txt.gz").write_bytes(b"no") and folder / "a.txt.gz", "cannot be unpacked"),
        (lambda folder: (folder / "a.txt").write_bytes(b"\xff\xfe\xfa") and folder / "a.txt", "not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_on_one_line(make: object, message: str, tmp_path: Path) -> None:
    assert callable(make)
    with pytest.raises(AutotuneError, match=message) as caught:
        find_text(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_tokens_spell_the_text_and_are_made_once(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    found = find_text_of(LINES, tmp_path)
    folder = tokenized(found, tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(folder / text.TOKENIZER_FILE))
    tokens = load_tokens(folder)
    assert tokenizer.decode(tokens["train"].tolist()) == found.train
    stamp = (folder / "train.npy").stat().st_mtime_ns
    assert tokenized(found, tmp_path / "cache") == folder
    assert (folder / "train.npy").stat().st_mtime_ns == stamp


def test_a_tokenizer_beside_the_text_is_used_where_its_ids_fit(tmp_path: Path) -> None:
    text.train_bpe("only these words " * 50, 270).save(str(tmp_path / text.TOKENIZER_FILE))
    found = find_text_of(LINES, tmp_path)
    assert found.tokenizer is not None
    own = load_tokens(tokenized(found, tmp_path / "cache"))
    trained = load_tokens(tokenized(found._replace(tokenizer=None), tmp_path / "cache"))
    assert len(own["train"]) > len(trained["train"])
    with pytest.raises(AutotuneError, match="the model takes up to 20"):
        tokenized_text(found, cache_dir=tmp_path / "c", vocabulary_size=300, max_id=20, on_progress=lambda _: None)
    (tmp_path / text.TOKENIZER_FILE).write_text("{}")
    with pytest.raises(AutotuneError, match="is no tokenizer"):
        tokenized(found, tmp_path / "d")


def test_each_token_is_to_be_followed_by_the_next() -> None:
    windows = Windows(np.arange(100, dtype=np.uint16), 8)
    assert len(windows.lengths) == 12
    batch = collate(windows, np.array([0, 11]), 8)
    assert batch.inputs["ids_BT"].tolist() == [list(range(8)), list(range(88, 96))]
    assert batch.targets.tolist() == [list(range(1, 9)), list(range(89, 97))]
    assert batch.num_tokens == 16


def test_a_tokenizer_that_cuts_or_pads_is_kept_from_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    own = text.train_bpe("only these words " * 50, 270)
    own.save(str(tmp_path / text.TOKENIZER_FILE))
    whole = load_tokens(tokenized(find_text_of(LINES, tmp_path), tmp_path / "a"))
    cutting = Tokenizer.from_file(str(tmp_path / text.TOKENIZER_FILE))
    cutting.enable_truncation(16)
    cutting.enable_padding(length=32)
    cutting.save(str(tmp_path / text.TOKENIZER_FILE))
    found = load_tokens(tokenized(find_text_of(LINES, tmp_path), tmp_path / "b"))
    np.testing.assert_array_equal(found["train"], whole["train"])


def test_a_text_too_short_for_a_sample_is_refused() -> None:
    with pytest.raises(AutotuneError, match="give more text"):
        Windows(np.arange(8, dtype=np.uint16), 8)


def test_a_limit_draws_samples_from_the_whole_text() -> None:
    limited = Windows(np.arange(8001, dtype=np.uint16), 8, limit=50)
    starts = [int(limited.ids(index)[0]) for index in range(50)]
    assert len(set(starts)) == 50
    assert max(starts) > 4000


def test_synthetic_text_is_the_same_again_and_can_be_learnt() -> None:
    words = synthetic_text(60, 300).replace(".", "").split()
    assert words == synthetic_text(60, 300).replace(".", "").split()
    single, pairs = Counter(words), Counter(itertools.pairwise(words))
    count = len(words)
    alone = -sum(n / count * math.log(n / count) for n in single.values())
    frequent = {word for word, n in single.most_common(20)}
    after = {word: Counter({b: n for (a, b), n in pairs.items() if a == word}) for word in frequent}
    known = [-sum(n / found.total() * math.log(n / found.total()) for n in found.values()) for found in after.values()]
    assert np.mean(known) < 0.8 * alone


def find_text_of(content: str, folder: Path) -> text.TextSet:
    (folder / "text.txt").write_text(content)
    return find_text(folder / "text.txt")
