"""Finding, reading, splitting and limiting reviews."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.data.reviews import Review, find_reviews, parse_label
from autotune.errors import UsageError
from tests.reviews import REVIEWS, jsonl, write_acl, write_csv


@pytest.fixture(autouse=True)
def no_other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the caller's data nor an installed ``datasets``."""
    monkeypatch.delenv("AUTOTUNE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.fixture
def real_data() -> Path:
    """The whole IMDB data set as train.jsonl.gz and test.jsonl.gz."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "imdb"
    folder = Path(os.environ.get("AUTOTUNE_TEST_DATA", beside))
    if not (folder / "train.jsonl.gz").is_file():
        pytest.skip(f"no IMDB reviews at {folder}; AUTOTUNE_TEST_DATA names their folder")
    return folder


# --- what is read


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
def test_a_folder_with_both_splits_is_read_in_every_form(tmp_path: Path, form: str, suffix: str) -> None:
    for split, reviews in (("train", REVIEWS[:40]), ("test", REVIEWS[40:])):
        data = write_csv(tmp_path / "draft", reviews).read_bytes() if form == ".csv" else jsonl(reviews)
        packed = {"": data, ".gz": gzip.compress(data), ".xz": lzma.compress(data)}[suffix]
        (tmp_path / f"{split}{form}{suffix}").write_bytes(packed)
    (tmp_path / "train.index.tsv.gz").write_bytes(b"not for us")
    (tmp_path / "length_stats.json").write_text("{}")
    found = find_reviews(tmp_path)
    assert sorted(found.train) == sorted(REVIEWS[:40])
    assert sorted(found.test) == sorted(REVIEWS[40:])
    assert found.source == f"train{form}{suffix}, 40 + 20 reviews from {tmp_path}"
    assert found.notice is None


@pytest.mark.parametrize("inside", ["", "aclImdb"])
def test_an_acl_imdb_folder_is_read_with_its_labels(tmp_path: Path, inside: str) -> None:
    write_acl(tmp_path / inside, "train", "test")
    found = find_reviews(tmp_path)
    assert sorted(found.train) == sorted(found.test) == sorted(REVIEWS)
    assert found.source == f"aclImdb, 60 + 60 reviews from {tmp_path}"


def test_unlabelled_acl_imdb_reviews_are_left_out(tmp_path: Path) -> None:
    write_acl(tmp_path, "train", "test")
    (tmp_path / "train" / "unsup").mkdir()
    (tmp_path / "train" / "unsup" / "0_0.txt").write_text("no label")
    assert len(find_reviews(tmp_path).train) == 60


@pytest.mark.parametrize("source", ["file", "folder", "acl"])
def test_reviews_without_a_test_split_are_split_80_to_20(tmp_path: Path, source: str) -> None:
    path = tmp_path / "mine.jsonl" if source == "file" else tmp_path
    if source == "acl":
        write_acl(tmp_path, "train")
    else:
        (path if source == "file" else tmp_path / "train.jsonl").write_bytes(jsonl(REVIEWS))
    found = find_reviews(path)
    assert (len(found.train), len(found.test)) == (48, 12)
    assert sorted(found.train + found.test) == sorted(REVIEWS)
    assert sum(review.label for review in found.test) == 4
    assert find_reviews(path) == found


def test_kaggles_column_names_are_read(tmp_path: Path) -> None:
    rows = [Review("good", "positive"), Review("bad", "Negative")] * 5  # type: ignore[arg-type]
    found = find_reviews(write_csv(tmp_path / "IMDB Dataset.csv", rows, ("review", "sentiment")))
    assert set(found.train) == {Review("good", 1), Review("bad", 0)}


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(REVIEWS).replace(b"\n", b"\r\n\r\n"))
    found = find_reviews(path)
    assert sorted(found.train + found.test) == sorted(REVIEWS)


@settings(max_examples=30)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")).filter(str.strip), min_size=6, max_size=12))
def test_any_text_survives_jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    reviews = [Review(text, number % 2) for number, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_bytes("\n".join(json.dumps(review._asdict(), ensure_ascii=False) for review in reviews).encode())
    found = find_reviews(path)
    assert sorted(found.train + found.test) == sorted(reviews)


# --- labels


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, 0), (1, 1), (True, 1), (False, 0), ("0", 0), ("1", 1), ("neg", 0), ("POS", 1), (" Positive ", 1), ("true", 1)],
)
def test_every_way_to_write_a_label_is_understood(value: object, label: int) -> None:
    assert parse_label(value) == label


@given(st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_nothing_else_is_taken_for_a_label(value: object) -> None:
    known = {"0", "1", "neg", "pos", "negative", "positive", "true", "false"}
    is_label = value.strip().lower() in known if isinstance(value, str) else isinstance(value, int) and value in (0, 1)
    assert (parse_label(value) is not None) == is_label


# --- limits


def test_a_limit_takes_the_same_mixed_subset_every_time(tmp_path: Path) -> None:
    ordered = sorted(REVIEWS, key=lambda review: review.label)
    (tmp_path / "train.jsonl").write_bytes(jsonl(ordered))
    (tmp_path / "test.jsonl").write_bytes(jsonl(ordered))
    found = find_reviews(tmp_path, num_train=30, num_test=6)
    assert (len(found.train), len(found.test)) == (30, 6)
    assert sum(review.label for review in found.train) == 10
    assert sum(review.label for review in found.test) == 2
    assert [review.label for review in found.train] != sorted(review.label for review in found.train)
    assert find_reviews(tmp_path, num_train=30, num_test=6) == found
    assert find_reviews(tmp_path, num_train=30, num_test=6, seed=1).train != found.train


@settings(max_examples=30)
@given(limit=st.integers(2, 70), num_positive=st.integers(1, 40))
def test_a_limit_keeps_both_classes(tmp_path_factory: pytest.TempPathFactory, limit: int, num_positive: int) -> None:
    folder = tmp_path_factory.mktemp("limit")
    reviews = [Review(f"review {number}", int(number < num_positive)) for number in range(60)]
    (folder / "train.jsonl").write_bytes(jsonl(reviews))
    (folder / "test.jsonl").write_bytes(jsonl(reviews))
    train = find_reviews(folder, num_train=limit).train
    assert len(train) == len(set(train)) == min(limit, 60)
    assert {review.label for review in train} == {0, 1}


@pytest.mark.parametrize("limits", [{"num_train": 0}, {"num_test": -5}])
def test_a_limit_below_one_is_a_usage_error(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be >= 1"):
        find_reviews(None, **limits)


# --- where reviews are looked for


def test_the_environment_variable_is_read_when_no_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.jsonl").write_bytes(jsonl(REVIEWS))
    monkeypatch.setenv("AUTOTUNE_DATA", str(tmp_path / "mine.jsonl"))
    assert len(find_reviews(None).train) == 48


def test_a_path_goes_before_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jsonl").write_bytes(jsonl(REVIEWS))
    monkeypatch.setenv("AUTOTUNE_DATA", str(tmp_path / "missing"))
    assert len(find_reviews(tmp_path / "mine.jsonl").train) == 48


def test_without_data_synthetic_reviews_come_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_DATA", "")
    found = find_reviews(None, num_train=30, num_test=20)
    assert (len(found.train), len(found.test)) == (30, 20)
    assert found.source == "synthetic reviews (no data given)"
    assert found.notice is not None
    assert "--data" in found.notice
    assert "AUTOTUNE_DATA" in found.notice
    assert "\n" not in found.notice
    assert not set(found.train) & set(found.test)


@pytest.fixture
def closed_port() -> str:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


class QuietHandler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """A web server that answers every request with an error: reachable is all it is."""
    with HTTPServer(("127.0.0.1", 0), QuietHandler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def install_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, endpoint: str) -> None:
    """A stand-in for the package ``datasets``; ``body`` is load_dataset's."""
    rows = [{"text": text, "label": label} for text, label in REVIEWS]
    (folder / "datasets.py").write_text(
        f"import os, sys\nROWS = {rows!r}\nOFFLINE = os.environ.get('HF_HUB_OFFLINE') == '1'\n"
        f"def load_dataset(name, split):\n    assert name == 'stanfordnlp/imdb'\n    {body}\n"
    )
    monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_the_hugging_face_cache_is_used_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: str
) -> None:
    install_datasets(tmp_path, monkeypatch, "assert OFFLINE; return ROWS", closed_port)
    found = find_reviews(None, num_test=10)
    assert sorted(found.train) == sorted(REVIEWS)
    assert found.source == "stanfordnlp/imdb, 60 + 10 reviews from Hugging Face datasets"
    assert found.notice is None


def test_the_hub_is_asked_when_the_cache_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    install_datasets(tmp_path, monkeypatch, "assert not OFFLINE; return ROWS", hub)
    assert sorted(find_reviews(None).train) == sorted(REVIEWS)


def test_without_a_network_synthetic_reviews_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: str
) -> None:
    install_datasets(tmp_path, monkeypatch, "sys.exit('offline and not cached')", closed_port)
    found = find_reviews(None, num_train=4, num_test=4)
    assert found.source == "synthetic reviews (no data given)"
    assert found.notice is not None
    assert "the hub does not answer" in found.notice


def test_a_failing_hub_is_named_in_the_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    install_datasets(tmp_path, monkeypatch, "raise RuntimeError('the hub is out of order')", hub)
    notice = find_reviews(None, num_train=4, num_test=4).notice
    assert notice is not None
    assert "RuntimeError: the hub is out of order" in notice


# --- the real thing


def test_imdb_is_read_whole_and_balanced(real_data: Path) -> None:
    found = find_reviews(real_data)
    for split in (found.train, found.test):
        assert len(split) == 25_000
        assert sum(review.label for review in split) == 12_500
