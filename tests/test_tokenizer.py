"""Reviews as token ids: a reproducible vocabulary, faithful arrays, and a cache that is whole or not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.data.reviews import Review, ReviewSet
from autotune.data.synthetic import synthetic_reviews
from autotune.data.tokenizer import load_tokenized, tokenized, train_tokenizer
from autotune.errors import AutotuneError, UsageError

REVIEWS = ReviewSet(synthetic_reviews(60, seed=0), synthetic_reviews(20, seed=1), "synthetic")
VOCABULARY_SIZE = 400


# --- the vocabulary


@pytest.mark.parametrize("vocabulary_size", [10, 40, 300, 5_000])
def test_the_vocabulary_never_exceeds_its_size(vocabulary_size: int) -> None:
    texts = [*(review.text for review in REVIEWS.train), "ünïcode Ωμέγα 漢字 ! ? …"]
    tokenizer = train_tokenizer(texts, vocabulary_size=vocabulary_size)
    assert tokenizer.get_vocab_size() <= vocabulary_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


def test_a_vocabulary_fills_its_size_where_the_texts_allow_it() -> None:
    tokenizer = train_tokenizer((review.text for review in REVIEWS.train), vocabulary_size=VOCABULARY_SIZE)
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE


def test_special_tokens_have_the_first_ids() -> None:
    tokenizer = train_tokenizer(["some words"], vocabulary_size=50)
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]


def test_case_accents_and_line_breaks_make_no_difference() -> None:
    tokenizer = train_tokenizer(["a cafe is fine", "br"] * 9, vocabulary_size=60)
    assert tokenizer.encode("A Café<br /><br />is FINE").tokens == tokenizer.encode("a cafe is fine").tokens


def test_a_review_that_spells_out_a_special_token_does_not_get_its_id() -> None:
    tokenizer = train_tokenizer(["[PAD] ##d words"] * 9, vocabulary_size=60)
    assert not {0, 1, 2, 3} & set(tokenizer.encode("[PAD] [CLS ##d").ids[:3])
    assert tokenizer.encode("##d").tokens[:2] == ["#", "#"]


def test_a_character_never_seen_is_unknown() -> None:
    tokenizer = train_tokenizer(["words"], vocabulary_size=50)
    assert tokenizer.encode("漢").ids == [1]


def test_the_same_texts_give_the_same_vocabulary_in_every_process() -> None:
    program = (
        "import hashlib; from autotune.data.synthetic import synthetic_reviews as s;"
        "from autotune.data.tokenizer import train_tokenizer as t;"
        "print(hashlib.sha256(t([r.text for r in s(120, 0)], vocabulary_size=400).to_str().encode()).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(3)
    }
    assert len(digests) == 1
    assert b"" not in digests


@pytest.mark.parametrize("vocabulary_size", [0, 9, 65_537])
def test_a_vocabulary_size_out_of_range_is_a_usage_error(vocabulary_size: int) -> None:
    with pytest.raises(UsageError, match="vocabulary_size must be from 10 to 65536"):
        train_tokenizer(["x"], vocabulary_size=vocabulary_size)


# --- the arrays


def test_every_review_is_cls_and_its_pieces_cut_at_max_tokens(tmp_path: Path) -> None:
    splits = tokenized(REVIEWS, cache_dir=tmp_path, max_tokens=64, vocabulary_size=VOCABULARY_SIZE)
    tokenizer = train_tokenizer((review.text for review in REVIEWS.train), vocabulary_size=VOCABULARY_SIZE)
    for data, reviews in ((splits.train, REVIEWS.train), (splits.test, REVIEWS.test)):
        assert len(data) == len(reviews)
        assert data.labels.tolist() == [review.label for review in reviews]
        for index, review in enumerate(reviews):
            ids = [2, *tokenizer.encode(review.text).ids][:64]
            assert data.ids(index).tolist() == ids
            assert data.lengths[index] == len(ids)
        assert data.tokens.dtype == np.uint16
        assert {data.offsets.dtype, data.labels.dtype, data.lengths.dtype} == {np.dtype(np.int64)}


def test_the_arrays_are_mapped_from_the_folder_and_load_without_texts(tmp_path: Path) -> None:
    splits = tokenized(REVIEWS, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE)
    for made, loaded in zip((splits.train, splits.test), load_tokenized(splits.folder), strict=True):
        assert isinstance(loaded.tokens, np.memmap)
        assert np.array_equal(made.tokens, loaded.tokens)
        assert np.array_equal(made.offsets, loaded.offsets)
        assert np.array_equal(made.labels, loaded.labels)


def test_the_tokenizer_is_saved_beside_the_arrays(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    splits = tokenized(REVIEWS, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE)
    saved = Tokenizer.from_file(str(splits.folder / "tokenizer.json"))
    assert [2, *saved.encode(REVIEWS.test[0].text).ids][:512] == splits.test.ids(0).tolist()


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5), st.integers(2, 12))
def test_any_text_becomes_at_least_cls_and_at_most_max_tokens(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], max_tokens: int
) -> None:
    reviews = [Review(text, index % 2) for index, text in enumerate(texts)]
    data = tokenized(
        ReviewSet(reviews, reviews, "any"),
        cache_dir=tmp_path_factory.mktemp("any"),
        max_tokens=max_tokens,
        vocabulary_size=100,
    ).train
    assert data.lengths.min() >= 1
    assert data.lengths.max() <= max_tokens
    assert all(data.ids(index)[0] == 2 for index in range(len(data)))


def test_max_tokens_below_two_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_tokens must be >= 2"):
        tokenized(REVIEWS, cache_dir=tmp_path, max_tokens=1)


# --- the cache


def test_the_second_time_comes_from_the_cache(tmp_path: Path) -> None:
    messages: list[str] = []
    first = tokenized(REVIEWS, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE, on_progress=messages.append)
    assert messages[-1] == "tokenizing: 80 of 80 reviews"
    messages.clear()
    second = tokenized(REVIEWS, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE, on_progress=messages.append)
    assert messages == []
    assert second.folder == first.folder
    assert [path.name for path in tmp_path.iterdir()] == [first.folder.name]


def test_other_texts_labels_or_parameters_get_a_folder_of_their_own(tmp_path: Path) -> None:
    first, *rest = REVIEWS.train
    variants = [
        (REVIEWS, 512, VOCABULARY_SIZE),
        (REVIEWS, 256, VOCABULARY_SIZE),
        (REVIEWS, 512, VOCABULARY_SIZE + 1),
        (REVIEWS._replace(train=[Review(first.text + "x", first.label), *rest]), 512, VOCABULARY_SIZE),
        (REVIEWS._replace(train=[Review(first.text, 1 - first.label), *rest]), 512, VOCABULARY_SIZE),
        (REVIEWS._replace(train=rest), 512, VOCABULARY_SIZE),
        (REVIEWS._replace(train=rest, test=[first, *REVIEWS.test]), 512, VOCABULARY_SIZE),
    ]
    folders = {
        tokenized(reviews, cache_dir=tmp_path, max_tokens=max_tokens, vocabulary_size=vocabulary_size).folder
        for reviews, max_tokens, vocabulary_size in variants
    }
    assert len(folders) == len(variants)


def test_the_source_does_not_matter_to_the_cache(tmp_path: Path) -> None:
    first = tokenized(REVIEWS, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE)
    moved = REVIEWS._replace(source="elsewhere")
    assert tokenized(moved, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE).folder == first.folder


@pytest.mark.parametrize("damage", ["missing", "cut short", "foreign", "mixed up", "empty folder", "a file"])
def test_a_damaged_cache_is_refused_by_load_and_made_again(tmp_path: Path, damage: str) -> None:
    good = tokenized(REVIEWS, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE)
    folder, expected = good.folder, good.test.tokens.tolist()
    part = folder / "test_tokens.npy"
    if damage in ("empty folder", "a file"):
        shutil.rmtree(folder)
        folder.mkdir() if damage == "empty folder" else folder.write_text("x")
    elif damage == "cut short":
        data = part.read_bytes()
        part.unlink()
        part.write_bytes(data[: len(data) // 2])
    elif damage == "foreign":
        part.unlink()
        part.write_bytes(b"not an array")
    else:
        part.unlink()
        if damage == "mixed up":
            shutil.copy(folder / "train_tokens.npy", part)
    with pytest.raises(AutotuneError, match="delete it to have them made again"):
        load_tokenized(folder)
    again = tokenized(REVIEWS, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE)
    assert again.folder == folder
    assert again.test.tokens.tolist() == expected
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_several_at_once_share_one_folder(tmp_path: Path) -> None:
    def make(_: int) -> Path:
        return tokenized(REVIEWS, cache_dir=tmp_path, vocabulary_size=VOCABULARY_SIZE).folder

    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(make, range(4)))
    assert len(load_tokenized(folder)[0]) == 60
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AutotuneError, match="choose another cache folder"):
        tokenized(REVIEWS, cache_dir=tmp_path / "file" / "cache", vocabulary_size=VOCABULARY_SIZE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_forked_afterwards_neither_hangs_nor_prints_a_warning() -> None:
    program = (
        "import os; from autotune.data.tokenizer import train_tokenizer as t;"
        "texts = ['some words here'] * 2000; w = t(texts, vocabulary_size=60); pid = os.fork();"
        "w.encode_batch(texts); pid and os.waitpid(pid, 0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, timeout=60)
    assert done.stdout + done.stderr == b""


@pytest.mark.parametrize("choice", ["true", "false"])
def test_the_users_choice_of_parallelism_is_left_alone(choice: str) -> None:
    program = (
        "import os; from autotune.data.tokenizer import train_tokenizer as t;"
        "t(['some words here'], vocabulary_size=60); print(os.environ['TOKENIZERS_PARALLELISM'])"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": choice}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == choice
