"""autotune compare"""

from __future__ import annotations

from pathlib import Path

import click

from autotune.cli.options import device_option, kind_of, named_profile, profiles_option
from autotune.errors import UsageError


@click.command("compare")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@device_option
@profiles_option
def command(first: str, second: str, device_name: str | None, profiles: Path | None) -> int:
    """Two training runs, two profiles, or the records of two studies, side by side.

    A run is named by its folder or its metrics, a profile by its file or, this device's, by its workload's name.
    """
    from autotune.report.compare import compared_profiles, compared_runs, compared_studies
    from autotune.report.terminal import stdout
    from autotune.study.runner import read_results
    from autotune.training import read_metrics

    names = (first, second)
    kinds = {name: kind_of(name) for name in names}
    if len(set(kinds.values())) > 1:
        taken = ", ".join(f"{name} is taken for a {kind}" for name, kind in kinds.items())
        raise UsageError(f"compare takes two runs, two profiles or two studies; {taken}")
    if kinds[first] == "run":
        found = compared_runs(read_metrics(Path(first)), read_metrics(Path(second)), names)
    elif kinds[first] == "study":
        found = compared_studies(read_results(Path(first)), read_results(Path(second)), names)
    else:
        (one, path), (two, other) = (named_profile(name, device_name, profiles) for name in names)
        found = compared_profiles(one, two, (str(path), str(other)))
    stdout().print(found)
    return 0
