"""Synthetic reviews: IMDB's lengths, a learnable label, the same on every run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from autotune.data.synthetic import Review, imdb_lengths, synthetic_reviews
from autotune.data.tokenizer import train_tokenizer
from autotune.errors import UsageError


@pytest.fixture(scope="module")
def reviews() -> list[Review]:
    return synthetic_reviews(4_000, seed=0)


def words(review: Review) -> list[str]:
    return review.text.replace("<br />", " ").replace(".", " ").replace(",", " ").lower().split()


def test_the_same_seed_gives_the_same_reviews_whatever_the_hash_seed() -> None:
    program = (
        "import hashlib; from autotune.data.synthetic import synthetic_reviews as s;"
        "print(hashlib.sha256(repr(s(40, 7)).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
    assert b"" not in digests


def test_different_seeds_give_different_reviews_in_the_same_language(reviews: list[Review]) -> None:
    others = synthetic_reviews(1_000, seed=1)
    assert not {review.text for review in reviews} & {review.text for review in others}
    known = {word for review in reviews for word in words(review)}
    counts = Counter(word for review in others for word in words(review))
    assert sum(count for word, count in counts.items() if word in known) > 0.99 * counts.total()


def test_half_of_the_reviews_are_positive_in_mixed_order() -> None:
    labels = [review.label for review in synthetic_reviews(1_001, seed=3)]
    assert Counter(labels) == {0: 501, 1: 500}
    assert 350 < sum(a != b for a, b in pairwise(labels)) < 650


def test_lengths_in_words_follow_the_measured_distribution(reviews: list[Review]) -> None:
    table = imdb_lengths()["words"]
    lengths = np.array([len(review.text.split()) for review in reviews])
    assert table["values"][0] <= lengths.min()
    assert lengths.max() <= table["values"][-1]
    assert lengths.mean() == pytest.approx(table["mean"], rel=0.03)
    assert np.minimum(lengths, 512).mean() == pytest.approx(table["mean_truncated_512"], rel=0.03)
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        measured = np.interp(quantile, table["quantiles"], table["values"])
        assert np.quantile(lengths, quantile) == pytest.approx(measured, rel=0.06)


def test_lengths_in_word_pieces_come_close_to_imdbs(reviews: list[Review]) -> None:
    table = imdb_lengths()["word_pieces"]
    texts = [review.text for review in reviews[:3_000]]
    tokenizer = train_tokenizer(texts)
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    lengths = np.array([len(encoding.ids) for encoding in encodings])
    assert np.minimum(lengths, 512).mean() == pytest.approx(table["mean_truncated_512"], rel=0.05)
    used = {number for encoding in encodings for number in encoding.ids}
    assert len(used) > 0.8 * tokenizer.get_vocab_size()


def test_line_breaks_are_written_as_in_imdb(reviews: list[Review]) -> None:
    text = " ".join(review.text for review in reviews)
    assert text.count("<br /><br />") == text.count("<br") / 2 == text.count("/>") / 2
    assert 0.01 < text.count("<br />") / len(text.split()) < 0.03


def test_counting_words_tells_the_label_but_no_single_word_does(reviews: list[Review]) -> None:
    learned, unseen = reviews[:3_000], reviews[3_000:]
    counts = {0: Counter[str](), 1: Counter[str]()}
    for review in learned:
        counts[review.label].update(words(review))
    frequent = [word for word, count in (counts[0] + counts[1]).items() if count >= 200]
    weight = {word: float(np.log((counts[1][word] + 1) / (counts[0][word] + 1))) for word in frequent}
    correct = sum((sum(weight.get(word, 0.0) for word in words(review)) > 0) == review.label for review in unseen)
    assert 0.93 < correct / len(unseen) < 0.999

    telling = sorted(weight, key=lambda word: -abs(weight[word]) * (counts[0][word] + counts[1][word]))[:40]
    for word in telling:
        agreeing = sum((word in words(review)) == (review.label == (weight[word] > 0)) for review in unseen)
        assert agreeing / len(unseen) < 0.7


@pytest.mark.parametrize("num_reviews", [0, -1])
def test_a_number_below_one_is_refused(num_reviews: int) -> None:
    with pytest.raises(UsageError, match="num_reviews must be >= 1"):
        synthetic_reviews(num_reviews, seed=0)


def test_a_single_review_can_be_made() -> None:
    (review,) = synthetic_reviews(1, seed=0)
    assert len(review.text.split()) >= 10
