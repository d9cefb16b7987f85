"""autotune report"""

from __future__ import annotations

from pathlib import Path

import click

from autotune.cli.options import device_option, find_backend, kind_of, named_profile, profiles_option
from autotune.errors import AutotuneError, UsageError


@click.command("report")
@click.argument("names", metavar="[SEARCH|STUDY|RUN...]", nargs=-1)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True)
@click.option("--plots", type=click.Path(path_type=Path), help="Folder for a study's PNG plots.")
@device_option
@profiles_option
def command(
    names: tuple[str, ...], output: Path, plots: Path | None, device_name: str | None, profiles: Path | None
) -> int:
    """Write one self-contained HTML page.

    SEARCH is a workload's name, for this device's profile of it, or a profile's file; STUDY is a study's record; RUN is
    a training run's folder or its metrics, and several are drawn over one another. Default: this device's last search.
    """
    from autotune import store
    from autotune.files import save
    from autotune.probe import cached_probe

    if not names:
        latest = store.latest_profile(find_backend(device_name).device(), profiles)
        if latest is None:
            raise AutotuneError("there is no profile for this device; autotune search --model imdb")
        click.echo(f"the last search on this device, for {latest[0].workload.name}", err=True)
        names = (str(latest[1]),)
    what, *others = names
    kind = kind_of(what)
    if any(kind_of(other) != "run" for other in (what, *others) if others):
        raise UsageError("of several, report draws training runs only")
    if plots is not None and kind != "study":
        raise UsageError("--plots draws a study's record only")
    path = Path(what)
    if kind == "run":
        from autotune.report.run_page import run_page
        from autotune.training import read_metrics

        runs = [read_metrics(Path(name)) for name in (what, *others)]
        html = run_page(list(zip(_labels((what, *others)), runs, strict=True)))
    elif kind == "study":
        from autotune.report.study_page import study_page
        from autotune.study.runner import read_results

        if plots is not None:
            store.check_writable(plots / "plot.png", "--plots")
        results = read_results(path)
        html = study_page(results, path)
        if plots is not None:
            from autotune.report.plots import study_plots

            for plot in study_plots(results, plots):
                click.echo(f"plot {plot}", err=True)
    else:
        from autotune.report.search_page import search_page
        from autotune.search.journal import recorded_trials

        profile, path = named_profile(what, device_name, profiles)
        trials = recorded_trials(path.with_suffix(".journal"), profile.evidence.search)
        html = search_page(profile, path, trials, cached_probe(profile.device.fingerprint, store.cache_dir() / "probe"))
    save(output, html.encode(), "page")
    click.echo(f"{output}: {len(html.encode()):,} bytes, nothing else needed; open it in a browser")
    return 0


def _labels(names: tuple[str, ...]) -> list[str]:
    """What runs are called: by their folders, or as the user names them where those are called the same. Raises
    UsageError for a run that is named twice."""
    from autotune.training import METRICS_FILE

    paths = [Path(name).resolve() for name in names]
    if len(set(paths)) < len(paths):
        raise UsageError("report takes each run once")
    labels = [path.name if path.is_dir() or path.name != METRICS_FILE else path.parent.name for path in paths]
    return labels if len(set(labels)) == len(labels) else list(names)
