"""Reviews in the forms that people have them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from autotune.data.reviews import Review

REVIEWS = [Review(f"review {number}, “naïve”\nsecond line", number % 3 % 2) for number in range(60)]


def jsonl(reviews: list[Review]) -> bytes:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in reviews).encode()


def write_csv(path: Path, reviews: list[Review], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *reviews])
    return path


def write_acl(folder: Path, *splits: str) -> Path:
    for number, (text, label) in enumerate(REVIEWS):
        for split in splits:
            path = folder / split / ("neg", "pos")[label] / f"{number}_5.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return folder
