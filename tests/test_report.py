"""The HTML page, opened in a real browser; the plots; comparisons."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from autotune import store
from autotune.cli import run
from autotune.measurement import Interval, Trial
from autotune.profile import Profile
from autotune.report.compare import compared_profiles, compared_runs, compared_studies
from autotune.report.run_page import run_page
from autotune.report.search_page import search_page
from autotune.report.study_page import study_page
from autotune.report.terminal import stdout
from autotune.strategy import Strategy, baseline
from autotune.training import Epoch, Metrics, Steps, read_metrics, write_metrics
from autotune.workloads.imdb import RECIPE
from tests import factories
from tests.test_study import results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"phone": (390, 844), "screen": (1280, 900)}
GIB = 2**30


def trials() -> list[Trial]:
    base, best = Strategy(micro_batch=32), Strategy(precision="bf16", micro_batch=8, accumulation=4, padding="buckets")
    found = [
        factories.trial(0, base, measurement=factories.measurement(5.0)),
        factories.trial(1, best, measurement=factories.measurement(50.0, peak_memory_bytes=GIB // 2)),
    ]
    for number, size in enumerate((4, 16, 32), 2):
        strategy = msgspec.structs.replace(best, micro_batch=size, accumulation=32 // size)
        found.append(
            factories.trial(
                number, strategy, measurement=factories.measurement(45.0 - size / 2, peak_memory_bytes=size * GIB // 8)
            )
        )
    found.append(
        factories.trial(
            5,
            msgspec.structs.replace(best, attention="sdpa"),
            measurement=None,
            outcome="oom",
            reason="killed <by> the kernel",
        )
    )
    return found


def profile() -> Profile:
    plain = factories.profile()
    shares = {"precision": Interval(ratio=1.9, low=1.7, high=2.1), "padding": Interval(ratio=1.4, low=1.2, high=1.7)}
    return msgspec.structs.replace(plain, evidence=msgspec.structs.replace(plain.evidence, shares=shares))


def run_of(strategy: Strategy, *, seconds: float, num_epochs: int = 2, **changes: Any) -> Metrics:
    """A training run of 300 steps an epoch, with one gradient that is no number."""
    num_steps = 300 * num_epochs
    plain = Metrics(
        workload="imdb",
        source="reviews <of mine>",
        device="Xeon",
        strategy=strategy,
        profile=None,
        num_train=9600,
        num_test=3200,
        seed=0,
        projected_s=None,
        wall_s=seconds * num_epochs,
        peak_memory_bytes=GIB,
        epochs=tuple(
            Epoch(
                epoch=number,
                train_loss=0.7 / number,
                test_loss=0.6 / number + seconds / 1000,
                test_accuracy=0.8 + number / 100 - seconds / 10_000,
                train_s=0.75 * seconds,
                eval_s=0.25 * seconds,
                samples_per_s=9600 / seconds,
                learning_rate=1e-4 / number,
                grad_norm=1.5,
            )
            for number in range(1, num_epochs + 1)
        ),
        steps=Steps(
            losses=tuple(0.7 - 0.5 * step / num_steps for step in range(num_steps)),
            learning_rates=tuple(1e-4 * (1 - step / num_steps) for step in range(num_steps)),
            grad_norms=(float("inf"), *(1.5 for _ in range(num_steps - 1))),
        ),
    )
    return msgspec.structs.replace(plain, **changes)


def runs() -> list[tuple[str, Metrics]]:
    best = Strategy(precision="bf16", micro_batch=8, accumulation=4, padding="buckets")
    return [("plain", run_of(baseline(32), seconds=100.0)), ("tuned", run_of(best, seconds=20.0))]


def pages() -> dict[str, str]:
    return {
        "search": search_page(profile(), Path("profiles/x/imdb.toml"), trials(), factories.hardware()),
        "study": study_page(results(), Path("runs/study.json")),
        "runs": run_page(runs()),
    }


def test_a_page_names_what_to_use_first_and_escapes_what_it_is_told() -> None:
    html = pages()["search"]
    assert html.index("faster") < html.index("Every trial")
    assert "killed &lt;by&gt; the kernel" in html
    assert "<by>" not in html


@pytest.mark.parametrize("kind", ["search", "study", "runs"])
def test_a_page_refers_to_nothing_outside(kind: str) -> None:
    html = pages()[kind]
    for word in ("http://", "https://", "src=", "@import", "url("):
        assert word not in html


def test_a_page_tells_where_race_and_trials_disagree() -> None:
    found = factories.profile()
    assert "By their trials" not in search_page(found, Path("imdb.toml"), [], None)
    evidence = msgspec.structs.replace(found.evidence, in_turns=(0.65, 0.98))
    html = search_page(msgspec.structs.replace(found, evidence=evidence), Path("imdb.toml"), [], None)
    assert f"it was {evidence.speedup.ratio * 0.65 / 0.98:.2f}x: in turns the baseline had 65%" in html


def test_a_profile_without_its_journal_is_a_page_too() -> None:
    html = search_page(factories.profile(), Path("imdb.toml"), [], None)
    assert "faster" in html
    assert "Every trial" not in html


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["search", "study", "runs"])
def test_the_page_opens_without_a_complaint_and_fits(
    kind: str, size: str, scheme: str, browser: Any, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(pages()[kind], encoding="utf-8")
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert said == []
    assert asked == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    counts = page.evaluate(
        "Array.from(document.querySelectorAll('figure')).map(f => f.querySelectorAll('.mark').length)"
    )
    measured = 5
    laps = 4
    expected = {
        # the knobs' shares; every measured trial; laps of four finalists and the baseline; two by micro batch
        "search": [2, measured, 5 * laps, 4, 4],
        # the curves of steps have no marks; test loss and accuracy of two epochs of two runs
        "runs": [0, 0, 0, 4, 4],
        # memory and speed: three techniques at two sizes; time against memory; savings of two
        "study": [6, 6, 3, 2, 0],
    }
    assert counts == expected[kind]
    page.locator(".mark").first.hover()
    assert page.locator("#tip").inner_text()
    assert float(page.evaluate("getComputedStyle(document.getElementById('tip')).opacity")) == 1
    page.close()


def test_the_six_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from autotune.report.plots import study_plots

    first, *others = results().cells
    windowed = msgspec.structs.replace(first, strategy=msgspec.structs.replace(first.strategy, attention="window"))
    paths = study_plots(msgspec.structs.replace(results(), cells=(windowed, *others)), tmp_path)
    assert [path.name[0] for path in paths] == list("123456")
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert [path.name[0] for path in study_plots(results(), tmp_path)] == list("12346")


def shown(renderable: object, capsys: pytest.CaptureFixture[str]) -> str:
    console = stdout()
    console.width = 120
    console.print(renderable)
    return capsys.readouterr().out


def test_two_profiles_are_compared_knob_by_knob(capsys: pytest.CaptureFixture[str]) -> None:
    first = factories.profile()
    second = msgspec.structs.replace(first, strategy=msgspec.structs.replace(first.strategy, precision="fp16"))
    out = shown(compared_profiles(first, second, ("a.toml", "b.toml")), capsys)
    (line,) = [line for line in out.splitlines() if line.startswith("precision")]
    assert line.split() == ["precision", "bf16", "fp16", "differs"]
    assert out.count("differs") == 1
    assert "1.00x" in out


def test_two_runs_are_compared_epoch_by_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    (_, plain), (_, tuned) = runs()
    text = shown(compared_runs(plain, tuned, ("a", "b")), capsys)
    assert "5.00x" in text
    assert "2 epochs, evaluations counted: 3m20s and 40 s, B is 5.00x faster" in text
    assert "Not the same training" not in text
    other = run_of(baseline(32), seconds=20.0, num_epochs=3, source="others")
    text = shown(compared_runs(plain, other, ("a", "b")), capsys)
    assert "they differ in data." in text
    for changes, words in (
        ({"recipe": RECIPE}, "clip_norm (None and 1.0)"),
        ({"strategy": Strategy(micro_batch=64)}, "global batch"),
        ({"strategy": Strategy(micro_batch=32, attention="window")}, "approximate knobs"),
        ({"num_epochs": 3}, "planned epochs"),
    ):
        known = msgspec.structs.replace(plain, num_epochs=2, recipe=msgspec.structs.replace(RECIPE, clip_norm=None))
        other = msgspec.structs.replace(known, **changes)
        assert f"they differ in {words}." in shown(compared_runs(known, other, ("a", "b")), capsys)
    fewer = shown(compared_runs(plain, run_of(baseline(32), seconds=20.0, num_train=960), ("a", "b")), capsys)
    assert "faster;" not in fewer
    assert "96.0 and 480.0 samples/s" in fewer
    none = run_of(baseline(32), seconds=20.0, num_epochs=0)
    assert "no epoch in common" in shown(compared_runs(plain, none, ("a", "b")), capsys)


def test_a_page_of_one_run_that_is_not_done_yet_is_a_page_too() -> None:
    html = run_page([("begun", run_of(baseline(32), seconds=20.0, num_epochs=0))])
    assert "No epoch is done yet" in html
    html = run_page([("done", run_of(baseline(32), seconds=20.0, num_epochs=1))])
    assert "<b>80.80%</b> accuracy after 1 epoch in 20 s" in html
    assert "of mine&gt;" in html


def test_a_runs_record_is_read_back_with_what_is_no_number(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    plain = run_of(baseline(32), seconds=20.0)
    epochs = tuple(msgspec.structs.replace(epoch, test_accuracy=nan) for epoch in plain.epochs)
    epochs = (msgspec.structs.replace(epochs[0], test_loss=inf), *epochs[1:])
    write_metrics(msgspec.structs.replace(plain, epochs=epochs), tmp_path / "metrics.json")
    found = read_metrics(tmp_path)
    assert found.steps.losses == plain.steps.losses
    assert str(found.steps.grad_norms[:2]) == "(nan, 1.5)"
    assert str((found.epochs[0].test_accuracy, found.epochs[0].test_loss)) == "(nan, nan)"
    html = run_page([("run", found)])
    assert "a test loss of <b>0.3200</b>" in html
    assert not re.search(r"nan\b(?!</td>)", html)


def test_runs_that_have_different_things_are_drawn_as_far_as_they_have_them() -> None:
    """One without accuracy, clipping and a second epoch, beside one with all."""
    epoch = msgspec.structs.replace(run_of(baseline(32), seconds=20.0).epochs[0], test_accuracy=float("nan"))
    steps = Steps(losses=(0.7, 0.6), learning_rates=(1e-4, 1e-5), grad_norms=())
    other = run_of(baseline(32), seconds=20.0, epochs=(epoch,), steps=steps)
    html = run_page([runs()[0], ("other", other)])
    charts = [part.split("</figure>")[0] for part in html.split("<figure>")[1:]]
    assert [chart.count("<polyline") for chart in charts] == [2, 2, 1, 2, 1]
    assert "other" not in charts[2]
    assert "other" not in charts[4]
    assert "a test loss of <b>0.6200</b> against 0.7000 after 1 epoch, <b>5.00x</b> as fast" in html
    assert "Not the same training" in run_page([runs()[0], ("other", run_of(baseline(32), seconds=1.0, workload="lm"))])


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
        write_metrics(run_of(baseline(32), seconds=20.0), tmp_path / folder / "metrics.json")
    page = tmp_path / "report.html"
    names = [str(tmp_path / "a/run"), str(tmp_path / "b/run" / "metrics.json")]
    assert run(["report", *names, "-o", str(page)]) == 0
    assert f"Every epoch of {names[0]}" in page.read_text()
    assert run(["report", names[0], "-o", str(page)]) == 0
    assert "Every epoch of run<" in page.read_text()
    assert run(["report", names[0], names[0]]) == 2
    assert "each run once" in capsys.readouterr().err


def test_a_folder_of_a_workloads_name_does_not_hide_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "imdb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "stores", lambda profiles=None: [tmp_path / "none"])
    for names in (["imdb"], []):
        assert run(["report", *names]) == 1
        assert "autotune search --model imdb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no record of"), ("[]", "no record of"), ('{"a": 1}', "no record of"), ('{"epochs": 1}', "no training run")],
)
def test_what_is_no_record_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    for command in (["report", str(path)], ["compare", str(path), str(path)]):
        assert run(command) == 1
        assert message in capsys.readouterr().err
    assert run(["compare", str(path.with_name("none.json")), str(path)]) == 1
    assert "there is no file or folder" in capsys.readouterr().err


def test_two_studies_are_compared_cell_by_cell(capsys: pytest.CaptureFixture[str]) -> None:
    first = results()
    out = shown(compared_studies(first, first, ("a.json", "b.json")), capsys)
    assert sum("1.00x" in line for line in out.splitlines()) == 6
    other = msgspec.structs.replace(first, cells=())
    assert "no cell in common" in shown(compared_studies(first, other, ("a", "b")), capsys)
