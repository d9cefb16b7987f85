"""Tables and words for the terminal, shared by the verbs. Live displays are in live.py."""

from __future__ import annotations

import math
import os
from pathlib import Path

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autotune.backends.base import Capability, Device
from autotune.measurement import Interval, Trial
from autotune.probe import MAX_BUSY_PART, Hardware
from autotune.profile import Profile
from autotune.report.runs import quality_name, quality_words
from autotune.search.space import Space
from autotune.strategy import Strategy, baseline
from autotune.training import Epoch
from autotune.units import format_bytes, format_duration, format_rate

_STYLE = {
    "ok": "green",
    "pruned": "bright_black",
    "oom": "red",
    "timeout": "yellow",
    "crashed": "red",
    "diverged": "red",
    "invalid": "yellow",
}
_UNITS = {
    "gflop_per_s": "{:,.0f} GFLOP/s",
    "side_elements": "side {:,.0f}",
    "gib_per_s": "{:.1f} GiB/s",
    "forward_ms": "forward {:.2f} ms",
    "unmasked_ms": "forward and backward {:.2f} ms",
    "backward_ms": "backward {:.2f} ms",
    "step_ms": "step {:.2f} ms",
    "first_call_s": "first call {:.1f} s",
    "speed_ratio": "{:.2f}x as fast as torch's choice",
}

DISAGREES = 1.3
"""So far apart are two trials' ratio and that of their race where both are told."""


def stdout() -> Console:
    """Where results go: as wide as the terminal; in a pipe as COLUMNS says, else 120."""
    return _console(stderr=False)


def stderr() -> Console:
    """Where progress goes."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    # without emoji: a function's name, as in my_train.py:key, is none
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not (console.is_terminal or os.environ.get("COLUMNS", "").isdigit()):
        console.width = 120
    return console


def describe(strategy: Strategy) -> str:
    """The knobs that differ from the plain baseline, in a line: ``bf16 · sdpa_flash · 8x4 · buckets``."""
    plain = msgspec.structs.replace(baseline(strategy.global_batch), deterministic=strategy.deterministic)
    if strategy == plain:
        return "plain baseline"
    words = [
        strategy.precision,
        strategy.attention,
        f"{strategy.micro_batch}x{strategy.accumulation}",
        strategy.padding,
    ]
    if strategy.checkpoint != "none":
        words.append(f"ckpt {strategy.checkpoint}")
    if strategy.compile != "none":
        words.append("compile" if strategy.compile == "default" else f"compile {strategy.compile}")
    if strategy.compile_scope != "model":
        words.append("by block")
    if strategy.graphs != "none":
        words.append("graph")
    if strategy.threads:
        words.append(count_words(strategy.threads, "thread"))
    if strategy.allocator != "default":
        words.append(strategy.allocator)
    if strategy.optimizer != "default":
        words.append(f"{strategy.optimizer} optimizer")
    if strategy.workers:
        words.append(count_words(strategy.workers, "worker"))
    if strategy.prefetch != plain.prefetch:
        words.append(f"prefetch {strategy.prefetch}")
    if strategy.memory_format != "contiguous":
        words.append(strategy.memory_format)
    if strategy.window != plain.window:
        words.append(f"window {strategy.window}")
    if strategy.deterministic:
        words.append("deterministic")
    return " · ".join(words)


def device_lines(device: Device) -> Table:
    """What the device is, a line a fact."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("device", f"{device.name} ({device.kind})")
    table.add_row("architecture", device.architecture)
    memory = f"{format_bytes(device.memory_total_bytes)}, {format_bytes(device.memory_free_bytes)} free"
    if device.memory_limit_bytes is not None:
        memory += f" (cgroup limit {format_bytes(device.memory_limit_bytes)})"
    table.add_row("memory", memory)
    table.add_row("CPU cores", str(device.num_cores))
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in device.versions.items()))
    table.add_row("fingerprint", device.fingerprint)
    return table


def capability_table(capabilities: tuple[Capability, ...]) -> Table:
    """Every capability with its verdict, figures and reason."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("capability", no_wrap=True)
    table.add_column("use", no_wrap=True)
    table.add_column("measured, or why not", overflow="fold")
    for capability in capabilities:
        table.add_row(*capability_row(capability))
    return table


def space_table(space: Space) -> Table:
    """Every value of every knob: whether a search tries it, and if not, why."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("knob", no_wrap=True)
    table.add_column("value", no_wrap=True)
    table.add_column("searched, or why not", overflow="fold")
    for knob, values in space.values.items():
        verdict = Text("yes", style="green") if knob != "deterministic" else Text("as asked", style="bright_black")
        rows = [(str(value), verdict) for value in values]
        for key, reason in space.left_out.items():
            if key.startswith(f"{knob}="):
                rows.append((key.removeprefix(f"{knob}="), Text(reason, style="yellow")))
        for index, (value, verdict) in enumerate(rows):
            table.add_row("" if index else knob, value, verdict)
    return table


def capability_row(capability: Capability) -> tuple[str, Text, str]:
    """Name, verdict and figures of one capability."""
    verdict = Text("yes", style="green") if capability.value else Text("no", style="yellow")
    figures = ", ".join(measured_words(capability.measured))
    if capability.reason == "ok":
        return capability.name, verdict, figures
    return capability.name, verdict, f"{capability.reason}" + (f" ({figures})" if figures else "")


def measured_words(measured: dict[str, float]) -> list[str]:
    """Figures with their units, in words."""
    return [
        _UNITS[key].format(value) if key in _UNITS else f"{key.replace('_', ' ')} {value:,.3f}".rstrip("0").rstrip(".")
        for key, value in measured.items()
    ]


def probe_report(hardware: Hardware) -> RenderableType:
    """The whole probe."""
    num_usable = sum(capability.value for capability in hardware.capabilities)
    busy = busy_words(hardware)
    tail = Text(
        f"{num_usable} of {len(hardware.capabilities)} capabilities usable; probed in "
        f"{format_duration(hardware.probe_s)} at {hardware.probed_at}",
        style="bright_black",
    )
    parts: list[RenderableType] = [device_lines(hardware.device), "", capability_table(hardware.capabilities), "", tail]
    if busy:
        parts.append(Text(busy, style="yellow"))
    return Group(*parts)


def busy_words(hardware: Hardware) -> str:
    """A warning where other work kept so many cores busy that the probe's figures were not kept; else nothing."""
    if hardware.busy_cores <= MAX_BUSY_PART * hardware.device.num_cores:
        return ""
    return (
        f"Other work kept {hardware.busy_cores:.1f} of {hardware.device.num_cores} cores busy meanwhile: the figures "
        "suffer, and are not kept. Measure again when the machine is idle."
    )


def shared_words(others_cores: float, num_cores: int) -> str:
    """A warning where other work had so many of the cores while trials were timed; else nothing."""
    if others_cores <= MAX_BUSY_PART * num_cores:
        return ""
    return (
        f"Other work had {others_cores:.1f} of the {num_cores} cores while trials were timed: what was found, and how "
        "much faster it is, may be otherwise on an idle machine. Search again there: --fresh."
    )


def trial_row(trial: Trial) -> tuple[str, Text, str, str, Text]:
    """Number, outcome, samples/s, memory and the setting with the reason below it."""
    setting = Text(describe(trial.strategy), no_wrap=True, overflow="ellipsis")
    if trial.reason:
        setting.append(f"  {trial.reason}", style="bright_black")
    rate = format_rate(trial.samples_per_s) if trial.samples_per_s else ""
    if trial.outcome == "pruned" and rate:
        rate = f"~{rate}"
    memory = format_bytes(trial.measurement.peak_memory_bytes) if trial.measurement else ""
    return str(trial.number), Text(trial.outcome, style=_STYLE[trial.outcome]), rate, memory, setting


def trial_table(trials: list[Trial]) -> Table:
    """Trials, a row each; the setting takes the width that is left."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", expand=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("samples/s", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("setting")
    for trial in trials:
        table.add_row(*trial_row(trial))
    return table


def trial_line(trial: Trial) -> str:
    """One finished trial as a plain line, for logs and pipes."""
    number, outcome, rate, memory, setting = trial_row(trial)
    figures = ", ".join(part for part in (f"{rate} samples/s" if rate else "", memory) if part)
    return f"trial {number:>2}  {outcome.plain:8} {setting.plain}" + (f"  [{figures}]" if figures else "")


def interval_words(interval: Interval) -> str:
    """``7.9x (95 % interval 7.7 to 8.1)``."""
    if math.isinf(interval.high):
        return f"{interval.ratio:.2f}x (measured once, so without an interval)"
    return f"{interval.ratio:.2f}x (95 % interval {interval.low:.2f} to {interval.high:.2f})"


def disagreement_words(speedup: Interval, in_turns: tuple[float, float] | None) -> str:
    """Where the race and the trials say different things, both; the race is not always the one that is right.
    ``in_turns`` are the speeds that baseline and best had there, as shares of their trials'."""
    base, best = in_turns or (1.0, 1.0)
    if max(best / base, base / best) <= DISAGREES:
        return ""
    return (
        f"By their trials, one after the other, it was {speedup.ratio * base / best:.2f}x: in turns the baseline had "
        f"{base:.0%} of its trial's speed, the best {best:.0%}."
    )


def faster_words(ratio: float) -> str:
    """``7.47x faster``, ``1.20x slower``, ``as fast``."""
    if f"{ratio:.2f}" == "1.00":
        return "as fast"
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def share_words(share: float) -> str:
    """What a small share is within, in percent: ``0.31%``, and ``0.01%`` for less."""
    return f"{max(share, 1e-4):.2%}"


def batches_words(strategy: Strategy) -> str:
    """Says of a setting that makes its batches of other samples than the baseline; nothing of one that does not."""
    if strategy.padding != "buckets":
        return ""
    return (
        "Its batches are of samples of similar length, the baseline's of any; --without padding=buckets searches for "
        "the very same batches."
    )


def count_words(count: int, what: str) -> str:
    """``1 epoch``, ``5 epochs``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def epoch_table(epochs: list[Epoch]) -> Table:
    """The training's record, a row an epoch."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in (
        *(
            "\nepoch",
            "train\nloss",
            "test\nloss",
            f"test\n{quality_name(epochs) or 'accuracy'}",
            "learning\nrate",
            "grad\nnorm",
        ),
        *("\ntrained", "\ntested", "samples\nper s"),
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for epoch in epochs:
        table.add_row(*epoch_row(epoch))
    return table


def epoch_row(epoch: Epoch) -> tuple[str, ...]:
    """One epoch's cells."""
    return (
        str(epoch.epoch),
        f"{epoch.train_loss:.4f}",
        f"{epoch.test_loss:.4f}",
        quality_words(epoch),
        f"{epoch.learning_rate:.1e}",
        "–" if epoch.grad_norm is None else f"{epoch.grad_norm:.3g}",
        format_duration(epoch.train_s),
        format_duration(epoch.eval_s),
        format_rate(epoch.samples_per_s),
    )


def profile_lines(rows: list[tuple[Path, Profile, bool]]) -> list[str]:
    """Profiles by device, two lines each, the second its file, to be copied whole; those of ``is_own``, of this device,
    are the first."""
    name_width = max(map(len, ["workload", *(profile.workload.name for _, profile, _ in rows)]))
    by_device: dict[str, list[tuple[Path, Profile, bool]]] = {}
    for row in sorted(rows, key=lambda row: not row[2]):
        by_device.setdefault(row[1].device.fingerprint, []).append(row)
    lines = [f"  {'workload':{name_width}}  speed-up  95 % interval   samples/s       memory"]
    for of_device in by_device.values():
        _, first, is_own = of_device[0]
        lines.append(f"{first.device.name} ({first.device.architecture}){', this device' if is_own else ''}")
        for path, profile, _ in of_device:
            evidence = profile.evidence
            memory = format_bytes(evidence.best.peak_memory_bytes)
            lines.append(
                f"  {profile.workload.name:{name_width}}  {evidence.speedup.ratio:>7.2f}x  {_doubt(profile):14} "
                f"{format_rate(evidence.best.samples_per_s):>10}  {memory:>11}"
            )
            lines.append(f"  {path}")
    return lines


def _doubt(profile: Profile) -> str:
    speedup = profile.evidence.speedup
    if profile.strategy == profile.evidence.baseline_strategy:
        return "plain is best"
    return "measured once" if math.isinf(speedup.high) else f"{speedup.low:.2f} to {speedup.high:.2f}"
