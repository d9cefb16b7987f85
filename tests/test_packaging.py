"""What is in the wheel: the top-level folders under their installed names, nothing importable as plain `backends`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_backends_and_profiles_inside_the_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("autotune_torch-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for module in sorted(ROOT.glob("backends/*.py")):
        assert f"autotune/backends/{module.name}" in names
    for folder in ("models", "data", "workloads", "trial", "search", "report", "cli"):
        for module in sorted((ROOT / "autotune" / folder).glob("*.py")):
            assert f"autotune/{folder}/{module.name}" in names
    for profile in sorted(ROOT.glob("profiles/*/*.toml")):
        assert f"autotune/profiles/{profile.parent.name}/{profile.name}" in names
    assert "autotune/py.typed" in names
    assert "autotune/data/imdb_lengths.json" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"autotune"}
