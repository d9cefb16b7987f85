"""autotune profiles list|show|verify|export"""

from __future__ import annotations

from pathlib import Path

import click

from autotune.cli.options import device_option, find_backend, named_profile, profiles_option
from autotune.errors import AutotuneError

_what = click.argument("what", metavar="PROFILE|WORKLOAD")
"""A profile's file, or a workload's name for this device's profile of it."""


@click.group("profiles")
def command() -> None:
    """List, show, verify and export profiles."""


@command.command("list")
@profiles_option
@device_option
def list_(profiles: Path | None, device_name: str | None) -> None:
    """Every profile there is, this device's first."""
    from autotune import store
    from autotune.profile import read_profile
    from autotune.report.terminal import profile_lines

    fingerprint = find_backend(device_name).device().fingerprint
    rows = []
    for path in store.all_profiles(profiles):
        try:
            profile = read_profile(path)
        except AutotuneError as exc:
            click.echo(f"autotune: {exc}", err=True)
            continue
        rows.append((path, profile, profile.device.fingerprint == fingerprint))
    if not rows:
        click.echo("no profiles; make one: autotune search --model imdb")
        return
    click.echo("\n".join(profile_lines(rows)))


@command.command("show")
@_what
@profiles_option
@device_option
def show(what: str, profiles: Path | None, device_name: str | None) -> None:
    """What a profile sets, and the evidence for it."""
    from autotune.report.summary import changed_knobs
    from autotune.report.terminal import describe, interval_words, shared_words, stdout
    from autotune.units import format_bytes, format_duration, format_rate

    profile, _ = named_profile(what, device_name, profiles)
    console, evidence = stdout(), profile.evidence
    console.print(f"{profile.workload.name} on {profile.device.name} ({profile.device.architecture})", style="bold")
    console.print(changed_knobs(profile.strategy, evidence.baseline_strategy))
    for title, figures in (("baseline", evidence.baseline), ("best", evidence.best)):
        console.print(
            f"{title:8}  {format_rate(figures.samples_per_s)} samples/s, step {figures.step_ms:,.0f} ms, peak "
            f"{format_bytes(figures.peak_memory_bytes)}, planned run {format_duration(figures.projected_s)}"
        )
    for choice in profile.front:
        console.print(
            f"--pick {choice.name}: {format_rate(choice.figures.samples_per_s)} samples/s, peak "
            f"{format_bytes(choice.figures.peak_memory_bytes)}, {describe(choice.strategy)}"
        )
    console.print(f"Speed-up {interval_words(evidence.speedup)}; {evidence.num_trials} trials, {profile.created}")
    if shared := shared_words(evidence.others_cores, profile.device.num_cores):
        console.print(shared, style="yellow")


@command.command("verify")
@_what
@profiles_option
@device_option
def verify(what: str, profiles: Path | None, device_name: str | None) -> None:
    """Whether a profile is well formed; exit status 1 with the key at fault where it is not."""
    profile, path = named_profile(what, device_name, profiles)
    click.echo(f"{path}: ok, schema {profile.schema}, {profile.workload.name} on {profile.device.name}")


@command.command("export")
@_what
@profiles_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="JSON in place of TOML.")
def export(what: str, profiles: Path | None, device_name: str | None, as_json: bool) -> None:
    """Prints a profile, checked, as TOML or JSON."""
    import msgspec

    from autotune.profile import format_profile

    profile, _ = named_profile(what, device_name, profiles)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(profile), indent=2).decode())
    else:
        click.echo(format_profile(profile), nl=False)
