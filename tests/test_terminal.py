"""What people see, rendered at the widths that people have."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from rich.console import Console, RenderableType

from autotune.backends.base import Capability
from autotune.flops import Flops
from autotune.measurement import Interval
from autotune.report import summary, terminal
from autotune.report.live import ProbeDisplay, SearchDisplay, TrainDisplay
from autotune.search.explain import Share
from autotune.search.objective import PlannedRun
from autotune.search.proof import Proof
from autotune.search.result import Result
from autotune.strategy import Padding, Strategy, baseline
from autotune.training import Epoch
from autotune.workloads.base import Loop
from tests import factories

WIDTHS = (80, 120)
BEST = Strategy(
    precision="bf16",
    attention="sdpa_flash",
    micro_batch=8,
    accumulation=4,
    padding="buckets",
    compile="reduce-overhead",
    checkpoint="every_block",
    allocator="retain",
    workers=2,
)


def rendered(what: RenderableType, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False, color_system=None)
    console.print(what, crop=False)
    assert isinstance(console.file, io.StringIO)
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in console.file.getvalue().splitlines()]


def result() -> Result:
    fast = factories.measurement(50.0, peak_memory_bytes=600 * 2**20, warm_up_s=31.2)
    trials = (
        factories.trial(0),
        factories.trial(1, BEST, measurement=fast),
        factories.trial(2, outcome="oom", reason="7.10 GiB is over the memory limit of 6.00 GiB", measurement=None),
    )
    return Result(
        baseline=trials[0],
        best=trials[1],
        speedup=Interval(ratio=5.0, low=4.8, high=5.2),
        planned=PlannedRun(num_train=25_000, num_test=25_000, epochs=5),
        objective="time",
        search="0123",
        trials=trials,
        search_s=300,
        warm_up_cached_s=2.2,
        num_rounds=5,
        proof=Proof(outcome="ok", loss_deviation=0.0031, soak_steps=50, peak_memory_bytes=600 * 2**20),
        was_interrupted=False,
        flops=Flops(1e9),
        matmul_flops={"fp32": 100e9, "bf16": 500e9},
    )


def search_display() -> SearchDisplay:
    display = SearchDisplay("autotune search · imdb · CPU", budget_s=300, max_trials=None)
    for trial in result().trials:
        display.on_trial_start(trial.number, trial.strategy, "search")
        display.on_trial_end(trial, result().best)
    return display


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    probing = ProbeDisplay()
    for capability in factories.hardware().capabilities:
        probing.on_capability(capability)
    epoch = Epoch(
        epoch=1,
        train_loss=0.6931,
        test_loss=0.6421,
        test_accuracy=0.8312,
        train_s=612.2,
        eval_s=122.1,
        samples_per_s=40.8,
        learning_rate=1e-4,
    )
    training = TrainDisplay("autotune train", num_steps=782, num_epochs=5)
    training.on_step(1, 17, 544)
    training.on_epoch(epoch)
    for what in (
        summary.search_summary(result(), "imdb", Path("profiles/cpu/imdb.toml")),
        terminal.probe_report(factories.hardware()),
        terminal.epoch_table([epoch] * 5),
        search_display().render(),
        probing.render(),
        training.render(),
    ):
        assert max(len(line) for line in rendered(what, width)) <= width


@pytest.mark.parametrize("padding", ["buckets", "packed"])
def test_batches_of_other_samples_than_the_baselines_are_told(padding: Padding) -> None:
    found = msgspec.structs.replace(result(), best=factories.trial(1, msgspec.structs.replace(BEST, padding=padding)))
    text = " ".join(rendered(summary.search_summary(found, "imdb", Path("profiles/cpu/imdb.toml")), 120))
    assert ("--without padding=buckets" in text) == (padding == "buckets")


@pytest.mark.parametrize(("slowed", "is_told"), [(1.0, False), (0.8, False), (0.65, True), (1.5, True)])
def test_where_race_and_trials_disagree_both_are_told(slowed: float, is_told: bool) -> None:
    found = result()
    assert found.baseline.measurement is not None
    rate = slowed * found.baseline.measurement.samples_per_s
    raced = msgspec.structs.replace(found.baseline.measurement, samples_per_s=rate)
    found = msgspec.structs.replace(found, baseline=msgspec.structs.replace(found.baseline, measurement=raced))
    text = "\n".join(rendered(summary.search_summary(found, "imdb", Path("p")), 200))
    words = f"it was {5 * slowed:.2f}x: in turns the baseline had {slowed:.0%} of its trial's speed, the best 100%."
    assert (f"By their trials, one after the other, {words}" in text) == is_told


def test_for_a_loop_of_ones_own_the_summary_shows_that_loop() -> None:
    found = summary.search_summary(result(), "my_train.py:workload", Path("p"), loop="own")
    lines = rendered(found, 80)
    assert "    for batch in my_loader: loss = run.step(run.split(batch))" in [line.rstrip() for line in lines]
    assert not any("autotune train" in line for line in lines)


def test_a_folder_that_is_not_looked_in_is_named_in_what_to_type() -> None:
    for loop in get_args(Loop):
        found = summary.search_summary(
            result(),
            "imdb",
            Path("my profiles/cpu/imdb.toml"),
            loop=loop,
            elsewhere=Path("my profiles"),
        )
        text = "\n".join(rendered(found, 120))
        assert 'autotune.load("imdb", profiles="my profiles")' in text
        assert loop != "autotune" or "autotune train --model imdb --profiles 'my profiles'" in text


def test_what_is_to_be_copied_is_whole_however_long() -> None:
    path = Path("/home/somebody/a/long/way/down/profiles/cpu-intel-xeon-2-cores-c93d2b7e9805/my_train.py-workload.toml")
    found = summary.search_summary(result(), "my_train.py:workload", path, loop="own")
    text = "\n".join(rendered(found, 80))
    assert f"Saved {path}. To use it:" in text
    assert 'autotune.load("my_train.py:workload").apply(model, optimizer=make_optimizer)' in text


def test_a_functions_name_is_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.stdout().print("[bold]edge.py:train[/] and edge.py:key")
    assert capsys.readouterr().out == "edge.py:train and edge.py:key\n"


def test_a_speed_up_whose_interval_holds_one_is_called_uncertain() -> None:
    doubtful = msgspec.structs.replace(result(), speedup=Interval(ratio=1.3, low=0.9, high=1.8))
    assert "1.30x faster, not certain" in "\n".join(rendered(summary.search_summary(doubtful, "imdb", Path("p")), 80))
    assert "not certain" not in "\n".join(rendered(summary.search_summary(result(), "imdb", Path("p")), 80))


def test_the_summary_tells_baseline_best_change_and_the_three_lines() -> None:
    text = "\n".join(rendered(summary.search_summary(result(), "imdb", Path("p/imdb.toml")), 120))
    for words in (
        "5.00x faster",
        "95 % interval 4.80 to 5.20",
        "41% less memory",
        "fp32 -> bf16",
        "p/imdb.toml",
        "autotune train --model imdb",
        'autotune.load("imdb").apply()',
        "1 oom",
    ):
        assert words in text


def test_the_display_tells_the_trial_under_way_and_why_others_failed() -> None:
    text = "\n".join(rendered(search_display().render(), 120))
    assert "trial 2" in text
    assert "7.10 GiB is over the memory limit" in text
    assert "5.00x the baseline" in text
    assert "left" in text


def test_the_names_of_the_lines_are_whole_on_a_narrow_terminal() -> None:
    lines = rendered(search_display().render(), 80)
    assert [line for line in lines if line.startswith("best  ")]
    assert [line for line in lines if line.startswith("time  ")]
    (setting,) = (line for line in lines if "trial 1: bf16" in line)
    assert setting.rstrip().endswith("…")


def test_the_best_so_far_is_compared_at_one_speed_of_the_device() -> None:
    display = SearchDisplay("autotune search", budget_s=300, max_trials=None)
    slowed = msgspec.structs.replace(result().best, pulse_s=0.02, has_beats=True)
    for trial in (msgspec.structs.replace(result().trials[0], pulse_s=0.01, has_beats=True), slowed):
        display.on_trial_end(trial, slowed)
    text = "\n".join(rendered(display.render(), 80))
    assert f"50.0 samples/s, about {5 * 2**0.8:.2f}x the baseline" in text


def test_the_last_column_gives_way_and_the_others_stay_whole() -> None:
    long = msgspec.structs.replace(result().trials[1], reason="far behind " * 9)
    (row,) = rendered(terminal.trial_table([long]), 80)[1:]
    assert row.split()[:4] == ["1", "ok", "50.0", "600"]
    assert row.rstrip().endswith("…")
    probing = ProbeDisplay()
    probing.on_capability(Capability(name="attention.sdpa_efficient.fp16", value=False, reason="refused: no " * 9))
    assert rendered(probing.render(), 80)[0].startswith("attention.sdpa_efficient.fp16  no  refused: no")


def test_what_each_knob_brings_is_shown_with_its_interval_and_a_bar() -> None:
    brought = (
        Share(knob="precision", value="bf16", plain="fp32", ratio=Interval(ratio=2.0, low=1.8, high=2.2)),
        Share(knob="padding", value="buckets", plain="max", ratio=Interval(ratio=1.41, low=1.2, high=1.7)),
        Share(knob="workers", value=2, plain=0, ratio=Interval(ratio=0.98, low=0.9, high=1.05)),
    )
    lines = rendered(summary.changed_knobs(BEST, baseline(32), brought), 80)
    rows = {line.split()[0]: line for line in lines}
    assert list(rows)[:3] == ["precision", "padding", "workers"], "the largest first"
    assert "fp32 -> bf16" in rows["precision"]
    assert "2.00x  1.80 to 2.20" in rows["precision"]
    bars = [rows[knob].count("█") for knob in ("precision", "padding", "workers")]
    assert bars == [14, 7, 0]
    assert max(map(len, lines)) <= 80


def test_what_was_measured_without_a_knob_is_told_from_what_is_estimated() -> None:
    nothing = Interval(ratio=1.0, low=0.98, high=1.02)
    brought = (
        Share(knob="checkpoint", value="every_block", plain="none", ratio=None, num_rounds=4, reason="oom: too much"),
        Share(knob="precision", value="bf16", plain="fp32", ratio=Interval(ratio=2.0, low=1.8, high=2.2), num_rounds=4),
        Share(knob="optimizer", value="fused", plain="default", ratio=nothing, num_rounds=4),
    )
    lines = rendered(summary.changed_knobs(BEST, baseline(32), brought), 80)
    rows = {line.split()[0]: line for line in lines}
    assert "without it: oom:" in rows["checkpoint"]
    assert "set back" in rows["optimizer"], "the best does not have it"
    assert "set back" not in rows["precision"]
    assert "4 rounds" in " ".join(lines)
    assert "estimated" not in " ".join(lines)
    assert max(map(len, lines)) <= 80


def test_a_setting_is_described_by_what_it_changes() -> None:
    assert terminal.describe(baseline(32)) == "plain baseline"
    words = "bf16 · sdpa_flash · 8x4 · buckets · ckpt every_block · compile reduce-overhead · retain · 2 workers"
    assert terminal.describe(BEST) == words


def test_a_capability_shows_its_figures_with_units_or_its_reason() -> None:
    works = Capability(name="matmul.bf16", value=True, measured={"gflop_per_s": 1459.2, "side_elements": 1024})
    assert terminal.capability_row(works)[2] == "1,459 GFLOP/s, side 1,024"
    slow = Capability(name="matmul.fp16", value=False, reason="too slow: 1 GFLOP/s against 200 in fp32")
    assert terminal.capability_row(slow)[2] == "too slow: 1 GFLOP/s against 200 in fp32"


def test_profiles_are_listed_by_device_this_one_s_first_with_what_is_doubtful() -> None:
    tuned = factories.profile()
    once = Interval(ratio=2.0, low=0.0, high=float("inf"))
    measured_once = msgspec.structs.replace(tuned, evidence=msgspec.structs.replace(tuned.evidence, speedup=once))
    plain = msgspec.structs.replace(tuned, strategy=tuned.evidence.baseline_strategy)
    card = msgspec.structs.replace(tuned.device, fingerprint="0123456789ab", name="A card")
    others = msgspec.structs.replace(tuned, device=card)
    rows = [(others, False), (tuned, True), (measured_once, True), (plain, True)]
    lines = terminal.profile_lines([(Path(f"{n}.toml"), profile, is_own) for n, (profile, is_own) in enumerate(rows)])
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines if line.endswith(".toml")] == ["1.toml", "2.toml", "3.toml", "0.toml"]
    assert lines[1].endswith(", this device")
    assert lines[8].startswith("A card (")
    shown = [line for line in lines if "imdb" in line]
    for words, line in zip(("7.80 to 8.20", "measured once", "plain is best", "7.80 to 8.20"), shown, strict=True):
        assert words in line


def test_a_machine_that_others_used_meanwhile_is_told_of() -> None:
    assert terminal.shared_words(0.5, num_cores=2) == ""
    assert "had 1.6 of the 2 cores while trials were timed" in terminal.shared_words(1.6, num_cores=2)
    found = result()
    assert found.others_cores == 0.0, "not known"
    long, brief = (msgspec.structs.replace(found.best, wall_s=s, others_cores=c) for s, c in ((9.0, 2.0), (1.0, 0.0)))
    assert msgspec.structs.replace(found, trials=(*found.trials, long, brief)).others_cores == pytest.approx(1.8)


def test_only_a_sure_speed_up_pays_for_its_search() -> None:
    sure = result()
    unsure = msgspec.structs.replace(sure, speedup=Interval(ratio=3.5, low=0.1, high=114.0))
    shown = [
        " ".join(rendered(summary.search_summary(found, "imdb", Path("imdb.toml")), 120)) for found in (sure, unsure)
    ]
    assert ["pays for itself" in " ".join(text.split()) for text in shown] == [True, False]
