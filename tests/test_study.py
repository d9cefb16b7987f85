"""Studies: what is declared, what is refused, what is on record and gone on with."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from autotune import backends
from autotune.apply import apply
from autotune.errors import UsageError
from autotune.phases import Trained
from autotune.report.study import COLUMNS, study_csv, study_table
from autotune.report.terminal import stdout
from autotune.strategy import Strategy
from autotune.study.definition import read_definition, shipped
from autotune.study.runner import Capacity, Cell, Results
from autotune.workloads.base import Workload
from tests import own_script
from tests.commands import called

GIB = 2**30

STUDY = """
title = "Two ways"
model = "SCRIPT"
steps = 2
batch_sizes = [4, 8]
reference = "plain"

[[techniques]]
name = "plain"

[[techniques]]
name = "recomputed"
checkpoint = "every_block"

[[techniques]]
name = "on a card"
attention = "sdpa_cudnn"
precision = "bf16"
"""


def test_the_seeds_study_has_eighteen_cells() -> None:
    cells = read_definition("memory").cells()
    assert len(cells) == 18
    assert {size for _, size in cells} == {32, 64, 128}
    windows = {technique.strategy(8).window for technique, _ in cells if "window" in technique.name}
    assert windows == {16, 32}


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_study_can_be_read(name: str) -> None:
    found = read_definition(name)
    assert found.cells()
    assert found.reference in {technique.name for technique in found.techniques}


def test_accumulation_s_cells_have_one_global_batch() -> None:
    assert {technique.strategy(1).global_batch for technique, _ in read_definition("accumulation").cells()} == {16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 2", "steps = 0"), "must be >= 1"),
        (("steps = 2", "stepz = 2"), "stepz"),
        (('reference = "plain"', 'reference = "plan"'), "did you mean"),
        (('name = "recomputed"', 'name = "plain"'), "a name of its own"),
        (("checkpoint =", "checkpont ="), "technique 'recomputed'"),
        (('"every_block"', '"every_blok"'), "technique 'recomputed'"),
        (("batch_sizes = [4, 8]", ""), "needs a micro_batch"),
        (("steps", "steps ="), "is not TOML"),
        (("checkpoint =", "schedule ="), "it belongs to the recipe"),
        (("checkpoint =", "chekpoint ="), "did you mean 'checkpoint'"),
        (("checkpoint =", "micro_batch = 4\ncheckpoint ="), "drop one"),
        (("checkpoint =", "accumulation = 3\ncheckpoint ="), "cannot be accumulated"),
        (("checkpoint =", 'graphs = "stpe"\ncheckpoint ='), "it is one of none, step"),
        (("checkpoint =", 'graphs = "step"\ncheckpoint ='), "no phases to time; leave graphs out"),
        (("checkpoint =", "prefetch = 8\ncheckpoint ="), "prefetch does nothing"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused_by_name(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(STUDY.replace(*change))
    with pytest.raises(UsageError, match=message) as caught:
        read_definition(str(path))
    assert "own.toml" in str(caught.value)


def test_a_technique_that_accumulates_keeps_the_study_s_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(STUDY.replace("checkpoint =", "accumulation = 4\ncheckpoint ="))
    sizes = {(t.name, t.strategy(size).global_batch, size) for t, size in read_definition(str(path)).cells()}
    assert all(found == size for _, found, size in sizes)


def trained(peak_gib: float = 2.0, rate: float = 10.0, **changes: Any) -> Trained:
    plain = Trained(
        num_steps=5,
        step_ms=100.0,
        forward_ms=30.0,
        backward_ms=60.0,
        update_ms=10.0,
        samples_per_s=rate,
        forward_bytes=int(peak_gib * GIB / 2),
        backward_bytes=int(peak_gib * GIB * 0.9),
        peak_memory_bytes=int(peak_gib * GIB),
        train_loss=5.0,
        test_loss=5.0,
        accuracy=None,
        perplexity=148.4,
        losses=(6.0, 5.0),
    )
    return msgspec.structs.replace(plain, **changes)


def results() -> Results:
    cells = []
    for size in (32, 64):
        grown = size / 32
        for name, peak, rate in (("baseline", 2.0, 10.0), ("bf16", 1.2, 16.0), ("checkpointing", 1.0, 8.0)):
            cells.append(
                Cell(
                    technique=name,
                    batch_size=size,
                    strategy=Strategy(micro_batch=size, precision="bf16" if name == "bf16" else "fp32"),
                    recipe={},
                    outcome="ok",
                    trained=trained(peak * grown, rate),
                    wall_s=12.0,
                )
            )
        cells.append(
            Cell(
                technique="fp8",
                batch_size=size,
                strategy=Strategy(micro_batch=size, precision="fp8"),
                recipe={},
                outcome="invalid",
                reason="refused: needs a card <of its own>",
            )
        )
    return Results(
        autotune="0.1.0",
        name="memory",
        origin="memory",
        limit=None,
        title="Memory techniques",
        model="lm",
        source="synthetic text",
        device="Some CPU, x86_64",
        fingerprint="0123456789ab",
        versions={"torch": "2.13.0"},
        steps=5,
        batch_sizes=(32, 64),
        reference="baseline",
        seed=0,
        limit_bytes=16 * GIB,
        cells=tuple(cells),
        capacities=(
            Capacity(
                technique="bf16",
                knobs={"precision": "bf16"},
                batch_size=96,
                reason="128 is predicted",
                peak_memory_bytes=12 * GIB,
            ),
        ),
    )


def test_the_table_compares_with_the_reference_at_the_same_batch(capsys: pytest.CaptureFixture[str]) -> None:
    console = stdout()
    console.width = 110
    console.print(study_table(results()))
    lines = capsys.readouterr().out.splitlines()
    bf16 = [line for line in lines if line.startswith("bf16") and "samples" not in line]
    assert "-40%" in bf16[0]
    assert "-38%" in bf16[0]
    assert any("refused: needs a card <of its own>" in line for line in lines)
    assert any("largest batch" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    console = stdout()
    console.width = width
    console.print(study_table(results()))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert "perplexity" in shown


def test_the_csv_has_every_cell_and_plain_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(study_csv(results()))))
    assert len(rows) == 8
    assert tuple(rows[0]) == COLUMNS
    assert float(rows[1]["memory_change"]) == pytest.approx(-0.4)
    assert rows[3]["reason"] == "refused: needs a card <of its own>"
    assert rows[3]["step_ms"] == ""


@pytest.mark.usefixtures("probed")
def test_a_study_runs_is_on_record_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, record = tmp_path / "own.toml", tmp_path / "record.json"
    study.write_text(STUDY)
    command = ("study", "--study", study, "--model", own_script.write(tmp_path), "--limit", "40", "--output", record)
    assert called(*command, "--only", "plain", "--batch-size", "4") == 0
    before = json.loads(record.read_text())["cells"]
    assert [(cell["technique"], cell["outcome"]) for cell in before] == [("plain", "ok")]
    capsys.readouterr()
    assert called(*command, "--only", "plain,on a card", "--batch-size", "4") == 0
    assert [cell["technique"] for cell in json.loads(record.read_text())["cells"]] == ["plain", "on a card"]
    capsys.readouterr()
    assert called(*command, "--batch-size", "4", "--batch-size", "64", "--json", "--csv", tmp_path / "table.csv") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cells"][0] == before[0]
    outcomes = {(cell["technique"], cell["batch_size"]): cell["outcome"] for cell in found["cells"]}
    assert outcomes == {
        ("plain", 4): "ok",
        ("plain", 64): "invalid",
        ("recomputed", 4): "ok",
        ("recomputed", 64): "invalid",
        ("on a card", 4): "invalid",
        ("on a card", 64): "invalid",
    }
    measured = [cell["trained"] for cell in found["cells"] if cell["outcome"] == "ok"]
    for parts in measured:
        assert 0 < parts["forward_bytes"] <= parts["backward_bytes"] <= parts["peak_memory_bytes"]
        assert 0 < parts["forward_ms"] + parts["backward_ms"] + parts["update_ms"] <= 1.05 * parts["step_ms"]
    assert measured[0]["losses"] == pytest.approx(measured[1]["losses"], rel=1e-5)
    assert len(measured[0]["losses"]) == 2
    assert measured[0]["test_loss"] == pytest.approx(measured[1]["test_loss"], rel=1e-5)
    reasons = {cell["reason"] for cell in found["cells"] if cell["outcome"] == "invalid"}
    assert "there are only 40 samples" in reasons
    assert (tmp_path / "table.csv").read_text().count("\n") == 7
    assert called(*command, "--steps", "3") == 1
    assert "is of a study with steps 2, this has 3" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "bf61"), "did you mean 'bf16'"),
        (("--study", "memry"), "no study is called 'memry', and it is no .toml file; did you mean 'memory'"),
        (("--study", "accumulation", "--batch-size", "8"), "names its own micro batches"),
    ],
)
def test_what_a_study_has_not_is_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("study", *arguments) == 2
    assert message in capsys.readouterr().err


def test_quality_is_judged_on_the_same_samples_whatever_the_padding(prepared: tuple[object, Workload]) -> None:
    seen = []
    for padding, micro_batch in (("max", 8), ("buckets", 6)):
        strategy = msgspec.convert({"padding": padding, "micro_batch": micro_batch}, Strategy)
        run = apply(strategy, prepared[1], backends.get("cpu"))
        seen.append(sorted(int(i) for batch in run.evaluation_plan(20) for part in batch.micro_batches for i in part))
    assert seen == [list(range(20))] * 2
