"""Labelled reviews: found in the user's files, the Hugging Face cache or hub, or made up; checked, split and limited.

Nothing here knows about tokens.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from autotune.data.plain import COMPRESSIONS, read_text
from autotune.data.synthetic import Review as Review
from autotune.data.synthetic import synthetic_reviews
from autotune.errors import AutotuneError, UsageError

DATA_VARIABLE = "AUTOTUNE_DATA"
HUB_NAME = "stanfordnlp/imdb"
DEFAULT_NUM_REVIEWS = 25_000
"""Synthetic reviews in each split when no number is given: as many as IMDB has."""
TEST_SHARE = 0.2
"""Of the reviews that come without a test split."""
TEXT_KEYS = ("text", "review")
LABEL_KEYS = ("label", "sentiment")
ACCEPTED = (
    "an aclImdb folder (train/pos/*.txt, train/neg/*.txt, test/...), a folder with train.jsonl or train.csv "
    "(and test.*), or one .jsonl, .json (one object a line) or .csv file with 'text' and 'label', plain, .gz or .xz"
)

_LABELS = {"0": 0, "neg": 0, "negative": 0, "false": 0, "1": 1, "pos": 1, "positive": 1, "true": 1}
_FORMATS = (".jsonl", ".json", ".csv")
_HUB_CACHE_TIMEOUT_S = 60
_HUB_DOWNLOAD_TIMEOUT_S = 300
_HUB_EXPORT = """
import json, sys
from datasets import load_dataset
for split in ("train", "test"):
    with open(f"{sys.argv[2]}/{split}.jsonl", "w", encoding="utf-8") as file:
        for row in load_dataset(sys.argv[1], split=split):
            print(json.dumps({"text": row["text"], "label": row["label"]}), file=file)
"""


class ReviewSet(NamedTuple):
    """Both splits, in random order, and where they come from."""

    train: list[Review]
    test: list[Review]
    source: str
    """A phrase for a person: "aclImdb, 25,000 + 25,000 reviews from /data/aclImdb"."""
    notice: str | None = None
    """What the user should know about this source, on one line; None when there is nothing."""


def parse_label(value: object) -> int | None:
    """1 for a positive label, 0 for a negative one, None for anything else.

    Labels are 0 and 1, booleans, "pos" and "neg", "positive" and "negative", in either case.
    """
    if isinstance(value, bool | int):
        return int(value) if value in (0, 1) else None
    return _LABELS.get(value.strip().lower()) if isinstance(value, str) else None


def find_reviews(
    path: Path | None, *, num_train: int | None = None, num_test: int | None = None, seed: int = 0
) -> ReviewSet:
    """Reviews from ``path``, else $AUTOTUNE_DATA, else Hugging Face ``datasets`` (if installed), else synthetic ones.

    ``num_train`` and ``num_test`` limit the splits to a random subset with the labels in proportion, the same for the
    same seed; None takes all there is. Reviews without a test split are split 80 to 20.

    Raises UsageError for a limit below one, AutotuneError, on one line, for data that cannot be used.
    """
    for name, limit in (("num_train", num_train), ("num_test", num_test)):
        if limit is not None and limit < 1:
            raise UsageError(f"{name} must be >= 1, got {limit}; leave it out to take every review")
    if path is None and os.environ.get(DATA_VARIABLE):
        path = Path(os.environ[DATA_VARIABLE])
    if path is not None:
        kind, train, test = _read(path.expanduser())
        return _review_set(kind, f"from {path}", train, test, num_train, num_test, seed)
    refusal = "the package datasets is not installed"
    if importlib.util.find_spec("datasets") is not None:
        with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
            refusal = _export_from_hub(folder)
            if not refusal:
                _, train, test = _read(Path(folder))
                return _review_set(HUB_NAME, "from Hugging Face datasets", train, test, num_train, num_test, seed)
    return ReviewSet(
        synthetic_reviews(num_train or DEFAULT_NUM_REVIEWS, 2 * seed),
        synthetic_reviews(num_test or DEFAULT_NUM_REVIEWS, 2 * seed + 1),
        "synthetic reviews (no data given)",
        "no review data given, using synthetic reviews with IMDB's lengths: speed and memory carry over, accuracy "
        f"does not; give aclImdb or a .jsonl file with --data or {DATA_VARIABLE} (Hugging Face: {refusal})",
    )


def _review_set(
    kind: str,
    origin: str,
    train: list[Review],
    test: list[Review] | None,
    num_train: int | None,
    num_test: int | None,
    seed: int,
) -> ReviewSet:
    if test is None:
        shuffled = _subset(train, None, [seed, 2])
        test = _subset(shuffled, max(1, round(TEST_SHARE * len(shuffled))), [seed, 3])
        chosen = {id(review) for review in test}
        train = [review for review in shuffled if id(review) not in chosen]
        if len({review.label for review in train}) < 2:
            raise AutotuneError(f"too few reviews {origin}: {len(shuffled)} cannot be split into train and test")
    train = _subset(train, num_train, [seed, 0])
    test = _subset(test, num_test, [seed, 1])
    return ReviewSet(train, test, f"{kind}, {len(train):,} + {len(test):,} reviews {origin}")


def _subset(reviews: Sequence[Review], limit: int | None, seed: list[int]) -> list[Review]:
    """At most ``limit`` reviews in random order, positive and negative in the proportion found."""
    order = np.random.default_rng(seed).permutation(len(reviews))
    if limit is not None and limit < len(reviews):
        is_positive = np.array([review.label for review in reviews])[order] == 1
        num_positive = round(limit * float(is_positive.mean()))
        if limit >= 2 and 0 < is_positive.sum() < len(reviews):
            num_positive = min(max(num_positive, 1), limit - 1)
        keep = np.where(
            is_positive, np.cumsum(is_positive) <= num_positive, np.cumsum(~is_positive) <= limit - num_positive
        )
        order = order[keep]
    return [reviews[index] for index in order.tolist()]


def _read(path: Path) -> tuple[str, list[Review], list[Review] | None]:
    """What kind of data it is, the train split, and the test split where there is one."""
    try:
        if not path.exists():
            raise AutotuneError(f"no review data at {path}: there is no such file or folder; it should be {ACCEPTED}")
        if not path.is_dir():
            return path.name, _read_file(path), None
        if not any(path.iterdir()):
            raise AutotuneError(f"no review data at {path}: the folder is empty; it should be {ACCEPTED}")
        for folder in (path, path / "aclImdb"):
            if (folder / "train" / "pos").is_dir() or (folder / "train" / "neg").is_dir():
                test = _read_acl_split(folder / "test") if (folder / "test").is_dir() else None
                return "aclImdb", _read_acl_split(folder / "train"), test
        train_file, test_file = _split_file(path, "train"), _split_file(path, "test")
        if train_file is None:
            found = f"only {test_file.name}, no train split" if test_file else "nothing that looks like reviews"
            raise AutotuneError(f"no review data at {path}: {found}; it should be {ACCEPTED}")
        return train_file.name, _read_file(train_file), _read_file(test_file) if test_file else None
    except OSError as exc:
        raise AutotuneError(f"cannot read review data at {path}: {exc}") from exc


def _split_file(folder: Path, split: str) -> Path | None:
    """The split's file: jsonl before json before csv, plain before compressed."""
    candidates = [folder / f"{split}{form}{packed}" for form in _FORMATS for packed in COMPRESSIONS]
    return next((path for path in candidates if path.is_file()), None)


def _read_acl_split(folder: Path) -> list[Review]:
    reviews: list[Review] = []
    for name, label in (("neg", 0), ("pos", 1)):
        paths = sorted((folder / name).glob("*.txt"))
        if not paths:
            raise AutotuneError(f"no reviews in {folder / name}: an aclImdb folder has *.txt files there")
        for path in paths:
            text = read_text(path)
            if not text.strip():
                raise AutotuneError(f"{path} is empty; delete it or give it a text")
            reviews.append(Review(text, label))
    return reviews


def _read_file(path: Path) -> list[Review]:
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    form = Path(path.name.removesuffix(compression)).suffix
    if form not in _FORMATS:
        raise AutotuneError(f"{path} is not review data; it should be {ACCEPTED}")
    text = read_text(path)
    if not text.strip():
        raise AutotuneError(f"{path} is empty; it should hold one review a line")
    reviews = [_review(row, path, line) for line, row in (_csv_rows if form == ".csv" else _json_rows)(text, path)]
    if not reviews:
        raise AutotuneError(f"{path} has a header and no reviews")
    if len(labels := {review.label for review in reviews}) < 2:
        raise AutotuneError(
            f"{path}: all {len(reviews):,} reviews have label {labels.pop()}; training needs positive and negative ones"
        )
    return reviews


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    decode = msgspec.json.Decoder().decode
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
            raise AutotuneError(f"{path}, line {number}: not JSON ({exc}); one object a line is needed") from exc
        if not isinstance(row, dict):
            raise AutotuneError(f"{path}, line {number}: a JSON {type(row).__name__}; one object a line is needed")
        yield number, row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        first_line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield first_line, dict(zip(header, cells, strict=False))
            first_line = reader.line_num + 1
    except csv.Error as exc:
        raise AutotuneError(f"{path}, line {reader.line_num}: not CSV ({exc})") from exc


def _review(row: dict[str, Any], path: Path, line: int) -> Review:
    text, label = (_value(row, keys, path, line) for keys in (TEXT_KEYS, LABEL_KEYS))
    if not isinstance(text, str) or not text.strip():
        raise AutotuneError(f"{path}, line {line}: the text must be a string with something in it, got {_shown(text)}")
    if (number := parse_label(label)) is None:
        raise AutotuneError(
            f"{path}, line {line}: the label must be 0, 1, neg, pos, negative, positive or a boolean, "
            f"got {_shown(label)}"
        )
    return Review(text, number)


def _value(row: dict[str, Any], keys: tuple[str, ...], path: Path, line: int) -> object:
    for key in keys:
        if key in row:
            return row[key]
    existing = ", ".join(map(repr, row)) or "none"
    raise AutotuneError(f"{path}, line {line}: no {keys[0]!r} (or {keys[1]!r}); the keys there are {existing}")


def _shown(value: object) -> str:
    return f"{value!r:.60}"


def _export_from_hub(folder: str) -> str:
    """Writes train.jsonl and test.jsonl into the folder: "" when that worked, else why it did not.

    From the local cache first, then from the hub. It runs in a process of its own, because ``datasets`` reads its
    offline switches at import and would stay offline for the user's own calls, and because that one can be stopped.
    """
    quick = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "10", "HF_HUB_DISABLE_TELEMETRY": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    refusal = ""
    for extra, timeout_s in ((offline, _HUB_CACHE_TIMEOUT_S), ({}, _HUB_DOWNLOAD_TIMEOUT_S)):
        if not extra and not _hub_answers():
            return "not in the cache, and the hub does not answer"
        try:
            subprocess.run(
                [sys.executable, "-P", "-c", _HUB_EXPORT, HUB_NAME, folder],
                env=quick | dict(os.environ) | extra,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                check=True,
            )
        except subprocess.TimeoutExpired:
            refusal = f"no answer within {timeout_s} s"
        except subprocess.CalledProcessError as exc:
            lines = exc.stderr.decode(errors="replace").strip().splitlines()
            refusal = lines[-1][:200] if lines else f"exit status {exc.returncode}"
        else:
            return ""
    return refusal


def _hub_answers(timeout_s: float = 3.0) -> bool:
    """Whether the hub can be reached at all, through a proxy where one is set, within a few seconds."""
    import threading
    import urllib.error
    import urllib.request

    answered = threading.Event()

    def ask() -> None:
        try:
            hub = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
            with urllib.request.urlopen(hub, timeout=timeout_s):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no time-out of its own
    thread.start()
    thread.join(timeout_s + 1)
    return answered.is_set()
