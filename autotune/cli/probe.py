"""autotune probe"""

from __future__ import annotations

import click
import msgspec

from autotune.cli.options import device_option, find_backend, json_option, probed


@click.command("probe")
@device_option
@click.option("--refresh", is_flag=True, help="Measure again, whatever is cached.")
@json_option
def command(device_name: str | None, refresh: bool, as_json: bool) -> None:
    """What this device can do: every capability is run and timed, and comes with its reason."""
    from autotune import process

    process.warm_up()

    from autotune.report.terminal import probe_report, stdout

    backend = find_backend(device_name)
    hardware = probed(backend, refresh=refresh)
    if not as_json:
        stdout().print(probe_report(hardware))
        return
    report = {
        "device": {**msgspec.to_builtins(hardware.device), "fingerprint": hardware.device.fingerprint},
        "capabilities": [
            {"name": found.name, "value": found.value, "reason": found.reason, **found.measured}
            for found in hardware.capabilities
        ],
        "probed_at": hardware.probed_at,
        "probe_s": hardware.probe_s,
    }
    click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
