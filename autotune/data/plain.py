"""Text files, plain or compressed."""

from __future__ import annotations

import gzip
import lzma
import zlib
from pathlib import Path

from autotune.errors import AutotuneError

COMPRESSIONS = ("", ".gz", ".xz")


def read_text(path: Path) -> str:
    """The text in a UTF-8 file, unpacked where its name ends in .gz or .xz.

    Raises AutotuneError, on one line, where it is damaged or not UTF-8, OSError where it cannot be read.
    """
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".xz":
            data = lzma.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as exc:
        reason = str(exc).rstrip(".") or "damaged"
        raise AutotuneError(
            f"{path} cannot be unpacked ({reason}); it is truncated or damaged, fetch it again"
        ) from exc
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise AutotuneError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[exc.start]:02x}); convert the file to UTF-8"
        ) from exc
