"""What is in the wheel: the top-level folders under their installed names, nothing importable as plain `backends`; and
that the documents beside it point to what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_backends_and_profiles_inside_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files behind, which the next one would pack
    source.mkdir()
    for folder in ("autotune", "backends", "profiles", "studies"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("autotune_torch-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for module in sorted(ROOT.glob("backends/*.py")):
        assert f"autotune/backends/{module.name}" in names
    for folder in ("models", "data", "workloads", "trial", "search", "study", "report", "cli"):
        for module in sorted((ROOT / "autotune" / folder).glob("*.py")):
            assert f"autotune/{folder}/{module.name}" in names
    for profile in sorted(ROOT.glob("profiles/*/*.toml")):
        assert f"autotune/profiles/{profile.parent.name}/{profile.name}" in names
    for study in sorted(ROOT.glob("studies/*.toml")):
        assert f"autotune/studies/{study.name}" in names
    assert "autotune/py.typed" in names
    assert "autotune/data/imdb_lengths.json" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"autotune"}


def test_what_the_documents_point_to_is_there() -> None:
    """Files by their path, and headings of theirs by what GitHub makes of them."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
            path, _, heading = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page.name}: {target}"
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if found.suffix == ".md" else []
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not heading or heading in anchors, f"{page.name}: {target}"
