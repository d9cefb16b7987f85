"""autotune compare"""

from __future__ import annotations

from pathlib import Path

import click

from autotune.errors import UsageError


@click.command("compare")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def command(first: Path, second: Path) -> int:
    """Two profiles, or the records of two studies, side by side: settings and figures."""
    from autotune.profile import read_profile
    from autotune.report.compare import compared_profiles, compared_studies
    from autotune.report.terminal import stdout
    from autotune.study.runner import read_results

    kinds = {path.suffix for path in (first, second)}
    if kinds == {".toml"}:
        stdout().print(compared_profiles(read_profile(first), read_profile(second), (str(first), str(second))))
    elif kinds == {".json"}:
        stdout().print(compared_studies(read_results(first), read_results(second), (str(first), str(second))))
    else:
        raise UsageError("compare takes two profiles (.toml) or the records of two studies (.json)")
    return 0
