"""What is wrong with reviews: the one line that says so."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from autotune.data.reviews import Review, find_reviews
from autotune.errors import AutotuneError
from tests.reviews import REVIEWS, jsonl, write_acl


def error_of(path: Path, data: bytes | str | None = None) -> str:
    """The message for this file's contents: always one line."""
    if data is not None:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(AutotuneError) as caught:
        find_reviews(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert "there is no such file or folder" in error_of(tmp_path / "missing")


def test_an_empty_folder_says_what_is_accepted(tmp_path: Path) -> None:
    message = error_of(tmp_path)
    assert "is empty" in message
    assert "train.jsonl" in message


def test_a_folder_of_other_things_says_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    assert "aclImdb folder" in error_of(tmp_path)


def test_a_test_split_alone_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(jsonl(REVIEWS))
    assert "only test.jsonl, no train split" in error_of(tmp_path)


def test_an_acl_imdb_folder_with_a_class_missing_names_its_folder(tmp_path: Path) -> None:
    write_acl(tmp_path, "train", "test")
    for path in (tmp_path / "test" / "pos").iterdir():
        path.unlink()
    assert f"no reviews in {tmp_path / 'test' / 'pos'}" in error_of(tmp_path)


def test_a_file_of_another_kind_says_what_is_accepted(tmp_path: Path) -> None:
    assert ".jsonl" in error_of(tmp_path / "reviews.parquet", b"PAR1")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("contents", ["", " \n\n"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str, contents: str) -> None:
    assert "is empty" in error_of(tmp_path / name, contents)


def test_an_empty_packed_file_is_called_empty(tmp_path: Path) -> None:
    assert "is empty" in error_of(tmp_path / "a.jsonl.gz", gzip.compress(b""))


def test_a_csv_file_with_nothing_but_a_header_has_no_reviews(tmp_path: Path) -> None:
    assert "no reviews" in error_of(tmp_path / "a.csv", "text,label\n")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_truncated_file_is_called_truncated(tmp_path: Path, suffix: str) -> None:
    packed = (gzip.compress if suffix == ".gz" else lzma.compress)(jsonl(REVIEWS))
    assert "truncated" in error_of(tmp_path / f"a.jsonl{suffix}", packed[: len(packed) // 2])


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_file_that_only_claims_to_be_packed_cannot_be_unpacked(tmp_path: Path, suffix: str) -> None:
    assert "cannot be unpacked" in error_of(tmp_path / f"a.jsonl{suffix}", jsonl(REVIEWS))


@pytest.mark.parametrize("line", ['{"text": "x", "lab', "text", "[1, 2]", '"x"'])
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, line: str) -> None:
    message = error_of(tmp_path / "a.jsonl", jsonl(REVIEWS[:2]) + line.encode())
    assert "line 3" in message
    assert "one object a line" in message


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{"body": "x", "label": 1}'),
        ("a.csv", "body,label\nx,1\n"),
    ],
)
def test_a_row_without_a_text_names_the_missing_and_the_existing_keys(tmp_path: Path, name: str, contents: str) -> None:
    message = error_of(tmp_path / name, contents)
    assert "line 2: no 'text'" in message
    assert "'body', 'label'" in message


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n\n\n{"text": "x", "stars": 1}'),
        ("a.csv", 'text,label\n"x\ny",1\nx\n'),
    ],
)
def test_a_row_without_a_label_is_named_by_its_line(tmp_path: Path, name: str, contents: str) -> None:
    assert "line 4: no 'label'" in error_of(tmp_path / name, contents)


@pytest.mark.parametrize("text", ["null", "3", '""', '"  "'])
def test_a_text_must_be_a_string_with_something_in_it(tmp_path: Path, text: str) -> None:
    message = error_of(tmp_path / "a.jsonl", f'{{"text": {text}, "label": 1}}')
    assert "line 1: the text must be a string" in message


@pytest.mark.parametrize("label", ["2", "-1", "null", '"good"', "0.5"])
def test_an_unknown_label_is_shown_with_its_line(tmp_path: Path, label: str) -> None:
    message = error_of(tmp_path / "a.jsonl", f'{{"text": "x", "label": {label}}}')
    assert "line 1: the label must be 0, 1" in message
    assert repr(json.loads(label)) in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_text_that_is_not_utf_8_is_named_by_its_line(tmp_path: Path, name: str) -> None:
    message = error_of(tmp_path / name, "text,label\ncaf\xe9,1\n".encode("latin-1"))
    assert "line 2: not UTF-8" in message


def test_an_unfinished_quote_in_csv_is_named(tmp_path: Path) -> None:
    assert "not CSV" in error_of(tmp_path / "a.csv", 'text,label\n"never closed,1\n')


def test_reviews_of_one_class_are_refused(tmp_path: Path) -> None:
    assert "all 4 reviews have label 1" in error_of(tmp_path / "a.jsonl", jsonl([Review("x", 1)] * 4))


def test_too_few_reviews_to_split_are_refused(tmp_path: Path) -> None:
    assert "cannot be split" in error_of(tmp_path / "a.jsonl", jsonl([Review("x", 1), Review("y", 0)]))
