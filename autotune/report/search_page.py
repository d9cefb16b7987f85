"""A search as a page: the verdict first, then what it rests on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import msgspec

from autotune.measurement import Trial
from autotune.probe import Hardware
from autotune.profile import Profile
from autotune.report import charts, page
from autotune.report.terminal import (
    batches_words,
    count_words,
    describe,
    disagreement_words,
    faster_words,
    interval_words,
    measured_words,
    share_words,
)
from autotune.strategy import Strategy
from autotune.units import GIB, format_bytes, format_duration, format_rate

_FINALISTS = 4


def search_page(profile: Profile, path: Path, trials: Sequence[Trial], hardware: Hardware | None) -> str:
    """The whole page; without ``trials``, as the search's journal has them, only what the profile says."""
    return page.page(f"autotune · {profile.workload.name}", _body(profile, path, trials, hardware))


def _body(profile: Profile, path: Path, trials: Sequence[Trial], hardware: Hardware | None) -> Iterator[str]:
    evidence, workload = profile.evidence, profile.workload
    base, best, speedup = evidence.baseline, evidence.best, evidence.speedup
    is_changed = profile.strategy != evidence.baseline_strategy
    words = f"Use <b>{escape(describe(profile.strategy))}</b>: {faster_words(speedup.ratio)}"
    yield page.verdict(
        f"autotune search · {workload.name} · {profile.device.name}",
        words if is_changed else "Nothing is better than the plain baseline",
        _how_sure(profile),
    )
    yield page.facts(
        [
            (f"{format_rate(base.samples_per_s)} → {format_rate(best.samples_per_s)}", "samples a second"),
            (f"{format_bytes(base.peak_memory_bytes)} → {format_bytes(best.peak_memory_bytes)}", "peak memory"),
            (
                f"{format_duration(base.projected_s)} → {format_duration(best.projected_s)}",
                f"planned run, {count_words(workload.epochs, 'epoch')}",
            ),
            (format_duration(evidence.search_s), f"search, {evidence.num_trials} trials"),
        ]
    )
    yield page.section(
        "What changes",
        page.table(
            ("knob", "plain", "best"),
            [(knob, str(before), str(now)) for knob, (now, before) in _changes(profile)],
        ),
    )
    if evidence.shares:
        rows = [
            charts.Bar(knob, share.ratio, share.low, share.high, f"{knob}: {interval_words(share)}")
            for knob, share in sorted(evidence.shares.items(), key=lambda item: -item[1].ratio)
        ]
        yield page.section(
            "What each knob brings",
            page.paragraph("How many times longer it takes without it, all else as in the best; 95 % intervals."),
            page.charts(("", charts.bars(rows, "times longer without it"))),
        )
    elif is_changed:
        words = "Not measured in this search; autotune search --explain times the best without each of its knobs."
        yield page.section("What each knob brings", page.paragraph(words))
    if profile.front:
        yield page.section(
            "What there is to choose from",
            page.table(
                ("--pick", "samples/s", "faster", "peak memory", "setting"),
                [
                    (
                        choice.name,
                        format_rate(choice.figures.samples_per_s),
                        f"{choice.speedup.ratio:.2f}x",
                        format_bytes(choice.figures.peak_memory_bytes),
                        describe(choice.strategy),
                    )
                    for choice in profile.front
                ],
                numbers=(1, 2, 3),
            ),
        )
    measured = [trial for trial in trials if trial.measurement is not None]
    if len(measured) > 1:
        figures = [("Every trial: time against memory", _pareto(profile, measured))]
        figures.append(("Steps of the fastest and of the baseline", _steps(profile, measured)))
        by_size = _by_size(measured)
        if by_size:
            figures += [
                ("Speed against micro batch", _against_size(by_size, "samples a second")),
                ("Memory against micro batch", _against_size(by_size, "peak memory, GiB")),
            ]
        yield page.section("What was measured", page.charts(*figures))
    if trials:
        yield page.section(
            "Every trial",
            page.table(
                ("#", "outcome", "samples/s", "memory", "setting", "reason"),
                [_trial_row(trial) for trial in trials],
                numbers=(0, 2, 3),
            ),
        )
    if hardware is not None:
        rows_of = [
            (found.name, "yes" if found.value else "no", ", ".join(measured_words(found.measured)), found.reason)
            for found in hardware.capabilities
        ]
        yield page.section("The probe", page.table(("capability", "use", "measured", "verdict"), rows_of))
    yield page.section("What was run, and on what", *_provenance(profile, path))


def _how_sure(profile: Profile) -> str:
    evidence = profile.evidence
    parts = [f"{interval_words(evidence.speedup)} over the plain baseline"]
    if evidence.num_rounds:
        parts.append(f"measured in {evidence.num_rounds} rounds in turns with it")
    if evidence.loss_deviation is not None:
        parts.append(f"first losses within {share_words(evidence.loss_deviation)} of it on the same batches")
    if evidence.soak_steps:
        parts.append(f"{evidence.soak_steps} steps lasted, the longest samples in a row first")
    said = ["; ".join(parts) + ".", disagreement_words(evidence.speedup, evidence.in_turns)]
    return " ".join(filter(None, [*said, batches_words(profile.strategy)]))


def _changes(profile: Profile) -> Iterator[tuple[str, tuple[object, object]]]:
    yield from profile.strategy.changed(profile.evidence.baseline_strategy).items()


def _pareto(profile: Profile, measured: Sequence[Trial]) -> str:
    points = []
    for trial in measured:
        found = trial.measurement
        assert found is not None
        kind = _kind(profile, trial.strategy)
        words = f"{describe(trial.strategy)}: {format_rate(found.samples_per_s)} samples/s"
        points.append(
            charts.Point(
                found.peak_memory_bytes / GIB,
                found.samples_per_s,
                f"{words}, {format_bytes(found.peak_memory_bytes)}",
                kind,
            )
        )
    front = [p for p in points if not any((q.x <= p.x and q.y > p.y) or (q.x < p.x and q.y >= p.y) for q in points)]
    return charts.scatter(points, "peak memory, GiB", "samples a second", joined=front)


def _steps(profile: Profile, measured: Sequence[Trial]) -> str:
    """Each timed lap's projection of the epoch, as a step."""
    ranked = sorted(measured, key=lambda trial: -(trial.samples_per_s or 0.0))
    chosen = ranked[:_FINALISTS]
    chosen += [trial for trial in measured if trial.strategy == profile.evidence.baseline_strategy][:1]
    steps = -(-profile.workload.num_train // profile.workload.global_batch)
    rows = []
    for trial in dict.fromkeys(chosen):
        assert trial.measurement is not None
        values = [1000 * seconds / steps for seconds in trial.measurement.epoch_s]
        is_base = trial.strategy == profile.evidence.baseline_strategy
        rows.append(
            charts.Row("baseline" if is_base else f"trial {trial.number}", values, _kind(profile, trial.strategy))
        )
    return charts.dots(rows, "milliseconds a step", "ms")


def _by_size(measured: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Trials that differ in their micro batch alone, where there are two or more."""
    groups: dict[str, list[Trial]] = {}
    for trial in measured:
        kind = msgspec.structs.replace(trial.strategy, micro_batch=trial.strategy.global_batch, accumulation=1)
        words = describe(kind).replace(f" · {kind.micro_batch}x1", "")
        groups.setdefault(words, []).append(trial)
    return {words: found for words, found in groups.items() if len({t.strategy.micro_batch for t in found}) > 1}


def _against_size(groups: dict[str, list[Trial]], title: str) -> str:
    series = {}
    for words, found in groups.items():
        points = {}
        for trial in found:
            assert trial.measurement is not None
            size, rate = trial.strategy.micro_batch, trial.measurement.samples_per_s
            memory = trial.measurement.peak_memory_bytes
            value = rate if title.startswith("samples") else memory / GIB
            hover = f"{words}, micro batch {size}: {format_rate(rate)} samples/s, {format_bytes(memory)}"
            points[size] = charts.Point(size, value, hover)
        series[words] = list(points.values())
    return charts.lines(series, "micro batch", title)


def _kind(profile: Profile, strategy: Strategy) -> str:
    if strategy == profile.strategy:
        return "best"
    return "base" if strategy == profile.evidence.baseline_strategy else "plain"


def _trial_row(trial: Trial) -> tuple[str, ...]:
    memory = format_bytes(trial.measurement.peak_memory_bytes) if trial.measurement else ""
    rate = format_rate(trial.samples_per_s) if trial.samples_per_s else ""
    if trial.outcome == "pruned" and rate:
        rate = f"~{rate}"
    return str(trial.number), trial.outcome, rate, memory, describe(trial.strategy), trial.reason


def _provenance(profile: Profile, path: Path) -> Iterator[str]:
    device, workload, evidence = profile.device, profile.workload, profile.evidence
    versions = ", ".join(f"{name} {version}" for name, version in evidence.versions.items())
    yield page.table(
        ("", ""),
        [
            ("device", f"{device.name}, {device.architecture}, {device.num_cores} cores"),
            ("memory", format_bytes(device.memory_total_bytes)),
            ("workload", f"{workload.name}: {workload.source}; global batch {workload.global_batch}"),
            (
                "planned run",
                f"{count_words(workload.epochs, 'epoch')} of {workload.num_train:,} samples, "
                f"evaluated on {workload.num_test:,}",
            ),
            ("baseline", describe(evidence.baseline_strategy)),
            ("objective", evidence.objective),
            ("versions", f"autotune {profile.autotune}, {versions}"),
            ("searched", profile.created),
            ("profile", str(path)),
        ],
    )
    name = shlex.quote(workload.name)
    yield page.code(f"autotune search --model {name}\nautotune train --model {name}")
