"""The command line with timings that are shorter than a user would want: for tests of what a search does, not of how
well it measures. ``python -m tests.brief ARGUMENTS`` is ``autotune ARGUMENTS``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import msgspec


@contextlib.contextmanager
def short_timings() -> Iterator[None]:
    """Trials are timed for a third of a second, races for three rounds."""
    from autotune.search import turns
    from autotune.trial import runner

    short = msgspec.structs.replace(runner.ORDINARY, min_s=0.3, narrow=math.inf)
    once = msgspec.structs.replace(runner.ONCE_WITH_BEATS, min_s=0.3, narrow=math.inf)
    with (
        mock.patch.object(turns, "MAX_ROUNDS", 3),
        mock.patch.multiple(runner, ORDINARY=short, WITH_BEATS=short, ONCE=once, ONCE_WITH_BEATS=once),
    ):
        yield


if __name__ == "__main__":
    from autotune.cli import main

    with short_timings():
        main()
