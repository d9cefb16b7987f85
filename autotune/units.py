"""Sizes and durations as people write them: parsing and printing. GiB is 2^30 bytes."""

import re

from autotune.errors import UsageError

GIB = 2**30
_BYTES_PER = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_SECONDS_PER = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_bytes(text: str) -> int:
    """Bytes in a size such as ``6GiB``, ``800MB`` or ``512M`` (a bare K, M, G, T is binary).

    Raises UsageError for anything else, and for a size of zero.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _BYTES_PER:
        raise UsageError(f"a memory size is a number and a unit such as 6GiB or 800MB, got {text!r}")
    size_bytes = int(float(match[1]) * _BYTES_PER[match[2].lower()])
    if size_bytes < 1:
        raise UsageError(f"a memory size must be above zero, got {text!r}")
    return size_bytes


def parse_duration(text: str) -> float:
    """Seconds in a duration such as ``5m``, ``90s``, ``1h30m`` or ``45``. Raises UsageError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    rebuilt = "".join(number + unit for number, unit in parts)
    known = all(unit.lower() in _SECONDS_PER for _, unit in parts)
    if not parts or not known or rebuilt != re.sub(r"\s", "", text):
        raise UsageError(f"a duration is a number and a unit such as 90s, 5m or 1h30m, got {text!r}")
    duration_s = sum(float(number) * _SECONDS_PER[unit.lower()] for number, unit in parts)
    if duration_s <= 0:
        raise UsageError(f"a duration must be above zero, got {text!r}")
    return duration_s


def format_bytes(size_bytes: float) -> str:
    """``1.53 GiB``, ``412 MiB``, ``17 KiB``: three significant figures, binary units."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= size:
            return f"{_three_figures(size_bytes / size)} {unit}"
    return f"{size_bytes:.0f} B"


def format_duration(duration_s: float) -> str:
    """``0.42 s``, ``8.3 s``, ``4m10s``, ``1h05m``."""
    if duration_s < 10:
        return f"{duration_s:.2g} s" if duration_s < 1 else f"{duration_s:.1f} s"
    whole_s = round(duration_s)
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60}m{whole_s % 60:02d}s"
    whole_min = round(duration_s / 60)
    return f"{whole_min // 60}h{whole_min % 60:02d}m"


def format_rate(per_second: float) -> str:
    """``0.52``, ``5.3``, ``31.9``, ``1,240``: a rate with the figures that mean something."""
    if per_second >= 1000:
        return f"{per_second:,.0f}"
    return f"{per_second:.1f}" if per_second >= 1 else f"{per_second:.2g}"


def _three_figures(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
