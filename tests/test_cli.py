"""The command as a person runs it: real processes, real files, exit status and what is printed where."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from autotune import backends, store
from autotune.errors import kind_of, line_of
from autotune.profile import write_profile
from tests import factories
from tests.commands import autotune, heard, refused

# One worker runs all of these, so that they share one search.
pytestmark = [pytest.mark.xdist_group("cli"), pytest.mark.usefixtures("probed")]


def test_help_imports_neither_torch_nor_optuna_nor_rich() -> None:
    code = (
        "import sys\nfrom autotune.cli import _VERBS, run\n"
        "status = run(['--help']) or any(run([verb, '--help']) for verb in _VERBS)\n"
        "heavy = {'torch', 'optuna', 'rich', 'numpy'} & set(sys.modules)\n"
        "sys.exit(status or (repr(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("probe", "search", "train", "profiles"):
        assert verb in done.stdout


def test_importing_autotune_imports_no_torch() -> None:
    code = "import sys, autotune; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_a_profile_imports_no_optuna(tmp_path: Path) -> None:
    code = (
        "import sys, warnings, autotune; warnings.simplefilter('ignore'); autotune.load('imdb')\n"
        "assert 'optuna' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("verb", ["search", "train"])
def test_an_unknown_model_is_refused_with_the_nearest_name(verb: str) -> None:
    assert "did you mean 'imdb'? (your own model: FILE.py:FUNCTION, " in refused(2, verb, "--model", "imbd")


def test_an_unknown_verb_is_refused_with_the_nearest_name() -> None:
    assert "did you mean 'search'?" in refused(2, "serch")


def test_a_missing_model_is_a_usage_error() -> None:
    assert "--model" in refused(2, "search")


def test_a_bad_memory_budget_is_refused_with_an_example() -> None:
    assert "6GiB" in refused(2, "search", "--model", "imdb", "--memory-budget", "six")


def test_a_bad_budget_is_refused_with_an_example() -> None:
    assert "90s" in refused(2, "search", "--model", "imdb", "--budget", "soon")


def test_what_goes_together_is_said_where_it_does_not() -> None:
    assert "--objective memory" in refused(2, "search", "--model", "imdb", "--min-speed", "0.8")
    assert "--profile none" in refused(2, "train", "--model", "imdb", "--profile", "none", "--pick", "leanest")


def test_an_unknown_device_is_refused() -> None:
    assert "cpu" in refused(2, "search", "--model", "imdb", "--device", "cpuu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "reviews.jsonl"),
        ("", "empty"),
        ('{"text": "fine", "label": 1}\n{"text": "no label"}\n', "line 2"),
        ('{"text": "fine", "label": 1}\nnot json\n', "line 2"),
    ],
)
def test_bad_data_is_refused_before_anything_is_measured(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "reviews.jsonl"
    if content is not None:
        path.write_text(content)
    done = heard("search", "--model", "imdb", "--data", path, "--profiles", tmp_path / "profiles")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("autotune: ")
    assert str(path) in last
    assert words in last
    assert "trial" not in done.stderr


def test_an_unwritable_profile_folder_is_found_before_the_search(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("a file in the way")
    line = refused(1, "search", "--model", "imdb", "--profiles", tmp_path / "profiles")
    assert "--profiles" in line


def own_profile(folder: Path, **changes: Any) -> Path:
    path = folder / "imdb.toml"
    write_profile(factories.profile(**changes), path)
    return path


def test_train_refuses_another_devices_profile(tmp_path: Path) -> None:
    line = refused(1, "train", "--model", "imdb", "--profile", own_profile(tmp_path))
    assert "another device" in line


def test_train_refuses_a_newer_or_wrong_or_missing_profile(tmp_path: Path) -> None:
    path = own_profile(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("schema = 1", "schema = 2"))
    assert "schema 2" in refused(1, "train", "--model", "imdb", "--profile", path)
    path.write_text(text.replace("micro_batch = 8", 'micro_batch = "8"'))
    assert "strategy.micro_batch" in refused(1, "train", "--model", "imdb", "--profile", path)
    assert "no profile" in refused(1, "train", "--model", "imdb", "--profile", tmp_path / "none.toml")


@pytest.fixture(scope="module")
def found(tiny_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """A real search of three trials on a real probe; its JSON, its progress and its profile folder."""
    folder = tmp_path_factory.mktemp("profiles")
    done = autotune(
        "search",
        "--model",
        "imdb",
        "--data",
        tiny_reviews,
        "--limit",
        "8",
        "--budget",
        "40s",
        "--trials",
        "3",
        "--profiles",
        folder,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, folder


Found = tuple[dict[str, Any], str, Path]


def test_a_search_prints_one_object_with_all_that_was_found(found: Found) -> None:
    report, progress, _ = found
    assert set(report) >= {"device", "workload", "baseline", "best", "speedup", "trials", "search_s", "profile_path"}
    is_shared = report["others_cores"] > 0.25 * report["device"]["num_cores"]
    assert ("cores while trials were timed" in progress) == is_shared
    for side in ("baseline", "best"):
        assert set(report[side]) >= {"strategy", "samples_per_s", "step_ms", "peak_memory_bytes", "projected_s"}
    assert set(report["speedup"]) == {"ratio", "low", "high"}
    assert report["speedup"]["low"] <= report["speedup"]["ratio"] <= report["speedup"]["high"]
    assert [trial["number"] for trial in report["trials"]] in ([0, 1], [0, 1, 2])
    for trial in report["trials"]:
        keys = {"number", "strategy", "outcome", "reason", "samples_per_s", "peak_memory_bytes", "wall_s"}
        assert set(trial) == keys
        assert trial["strategy"]["micro_batch"] * trial["strategy"]["accumulation"] == 32


def test_progress_in_a_pipe_is_plain_lines_without_control_codes(found: Found) -> None:
    _, progress, _ = found
    assert "\x1b" not in progress
    assert "\r" not in progress
    assert "trial  0  ok       plain baseline" in progress


def test_the_saved_profile_is_found_and_trained_with(found: Found, tiny_reviews: Path, tmp_path: Path) -> None:
    report, _, folder = found
    metrics = tmp_path / "metrics.json"
    done = autotune(
        *("train", "--model", "imdb", "--data", tiny_reviews, "--limit", "8", "--epochs", "2"),
        *("--profiles", folder, "--run", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(metrics.read_text())
    assert record["strategy"] == report["best"]["strategy"]
    assert record["projected_s"] > 0
    assert len(record["epochs"]) == 2
    assert len(record["steps"]["losses"]) == len(record["steps"]["grad_norms"]) == 2
    assert record["epochs"][0]["grad_norm"] > 0
    assert "accuracy" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_profile_none_trains_the_plain_baseline(found: Found, tiny_reviews: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    done = autotune(
        *("train", "--model", "imdb", "--data", tiny_reviews, "--limit", "8", "--epochs", "1"),
        *("--profile", "none", "--profiles", found[2], "--run", tmp_path / "run", "--metrics", metrics),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(metrics.read_text())
    assert record["strategy"] == found[0]["baseline"]["strategy"]
    assert record["profile"] is None


def test_profiles_are_listed_shown_verified_and_exported(found: Found) -> None:
    report, _, folder = found
    path = report["profile_path"]
    listed = autotune("profiles", "list", "--profiles", folder)
    assert "imdb" in listed.stdout
    assert f"  {path}" in listed.stdout.splitlines(), "whole, to be copied"
    assert "Speed-up" in autotune("profiles", "show", path).stdout
    assert "ok, schema 1" in autotune("profiles", "verify", path).stdout
    exported = json.loads(autotune("profiles", "export", path, "--json").stdout)
    assert exported["strategy"] == report["best"]["strategy"]
    assert autotune("profiles", "export", path).stdout == Path(path).read_text()
    by_name = autotune("profiles", "export", "imdb", "--profiles", folder)
    assert by_name.stdout == Path(path).read_text(), "this device's, by the workload's name"


def test_a_loaded_profile_gives_a_run_that_trains(
    found: Found, tiny_reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import autotune as package

    tuned = package.load("imdb", profiles=found[2], data=tiny_reviews, limit=8)
    assert tuned.profile is not None
    run = tuned.apply()
    losses = [float(run.step(batch)) for batch in run.loader]
    assert len(losses) == 1
    assert 0 < losses[0] < 3


def test_without_a_profile_loading_warns_and_gives_safe_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import autotune as package

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="autotune search --model imdb"):
        tuned = package.load("imdb")
    assert tuned.profile is None
    assert tuned.strategy.precision == "fp32"


def test_ctrl_c_in_mid_search_saves_the_best_so_far_and_leaves_no_process(
    found: Found, tiny_reviews: Path, tmp_path: Path
) -> None:
    """In a terminal of its own, with the interrupt sent as the terminal sends it: to the whole foreground group."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.brief", "search", "--model", "imdb", "--data", str(tiny_reviews)),
            *("--limit", "8", "--trials", "50", "--profiles", str(tmp_path)),
        ],
        env={**os.environ, "COLUMNS": "40"},
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    os.close(follower)
    assert process.stderr is not None
    family: list[psutil.Process] = []
    for line in process.stderr:
        if line.startswith("trial  1"):
            family = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)
            break
    output, errors = process.communicate(timeout=60)
    os.close(leader)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (saved,) = tmp_path.glob("*/imdb.toml")
    assert f"Saved {saved}. To use it:" in output, "whole, to be copied, however narrow the terminal"
    assert len(family) >= 2, "the forkserver and a trial, at least"
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_probe_json_lists_every_capability_with_its_reason_and_units() -> None:
    done = autotune("probe", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["device"]["fingerprint"]
    names = [capability["name"] for capability in report["capabilities"]]
    assert {"matmul.fp32", "attention.eager.fp32", "compile.default", "memory_copy"} <= set(names)
    for capability in report["capabilities"]:
        assert isinstance(capability["value"], bool)
        assert capability["reason"].split(":")[0] in ("ok", "refused", "too slow")
    fp32 = report["capabilities"][names.index("matmul.fp32")]
    assert fp32["gflop_per_s"] > 0


def test_a_pipe_that_closes_early_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "autotune", "probe", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()  # before anything is written, so that the write fails whatever its size
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


def test_help_without_a_verb_is_whole() -> None:
    done = autotune()
    assert done.returncode == 2
    assert "  search " in done.stderr
    assert len(done.stderr.splitlines()) > 8


def test_a_broken_profile_does_not_stop_a_training_without_one(tmp_path: Path) -> None:
    """The data is missing, so the profile must have been passed over."""
    path = store.profile_path(backends.find().device(), "imdb", tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("schema = 9")
    common = (
        "train",
        "--model",
        "imdb",
        "--profiles",
        tmp_path,
        "--data",
        tmp_path / "none",
        "--run",
        tmp_path / "run",
    )
    assert "schema 9" in autotune(*common).stderr
    assert "schema 9" not in autotune(*common, "--profile", "none").stderr


def test_a_terminal_that_lacks_characters_and_a_full_disk_end_nothing_in_a_traceback(tmp_path: Path) -> None:
    plain = factories.profile()
    named = msgspec.structs.replace(plain, workload=msgspec.structs.replace(plain.workload, name="modèle"))
    write_profile(named, tmp_path / "device" / "named.toml")
    shown = autotune("profiles", "show", tmp_path / "device" / "named.toml", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("mod?le on ")
    if not Path("/dev/full").exists():
        return
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "autotune", "profiles", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.endswith("No space left on device\n")
    assert "Traceback" not in done.stderr


def test_what_a_loader_process_has_sent_is_told_by_its_last_line() -> None:
    sent = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: no room")
    assert line_of(sent) == "RuntimeError: no room"
    assert line_of(ValueError("first\nsecond")) == "ValueError: first"
    assert line_of(ValueError()) == "ValueError: "


def test_what_many_parts_are_is_said_of_a_few() -> None:
    assert kind_of((1, "two")) == "(int, str)"
    assert kind_of([{}] * 16) == "(dict, dict, … 16 in all)"
