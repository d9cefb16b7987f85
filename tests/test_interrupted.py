"""Searches that are killed, that meet each other, and that run out of disk: real processes and a real small disk."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from autotune.backends.base import Device
from autotune.measurement import Interval
from autotune.profile import Profile, ProfiledDevice, format_profile, read_profile, write_profile
from autotune.store import profile_path
from autotune.strategy import baseline
from tests import factories
from tests.commands import briefly, refused
from tests.faulty import NAME, RECIPE

pytestmark = pytest.mark.usefixtures("probed")

SEARCH = ("search", "--model", NAME, "--trials", "5", "--epochs", "1000")


@contextmanager
def searching(until: str, profiles: Path, module: str = "tests.brief") -> Iterator[subprocess.Popen[str]]:
    """A search, its timings short, that has printed a line that starts so."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *SEARCH, "--profiles", str(profiles)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith(until):
                break
        yield process
    finally:
        process.kill()
        process.communicate()


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_after_a_kill_the_same_command_goes_on_with_nothing_lost_and_nothing_run_twice(tmp_path: Path) -> None:
    with searching("trial  2", tmp_path) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert len(family) >= 3, "the server, a guard and its trial, at least"
        assert_gone(family)
    done = briefly(*SEARCH, "--profiles", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert "going on after 3 trials" in done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["number"] for trial in trials] == list(range(5))
    assert len({json.dumps(trial["strategy"]) for trial in trials}) == 5
    assert "trial  0" not in done.stderr


def test_a_search_outlives_its_warm_server(tmp_path: Path) -> None:
    with searching("trial  1", tmp_path) as process:
        servers = [
            child for child in psutil.Process(process.pid).children() if "forkserver" in " ".join(child.cmdline())
        ]
        assert len(servers) == 1
        servers[0].kill()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert list(tmp_path.glob("*/*.toml"))


def test_a_second_search_on_the_device_is_refused_in_a_line(tmp_path: Path) -> None:
    with searching("trial  0", tmp_path, module="autotune"):  # goes on for a minute
        line = refused(1, *SEARCH, "--profiles", tmp_path / "others")
        assert "another search is measuring on this device" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, in a mount namespace of its own: it goes with its holder, whatever ends the suite."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=128k tmpfs {shlex.quote(str(folder))} && echo mounted && read end_of_input"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", mount], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        if not holder.stdout.readline():
            pytest.skip(f"needs the right to mount a tmpfs: {holder.stderr.read().decode().strip()}")
        yield Path(f"/proc/{holder.pid}/root{folder}")
        holder.stdin.close()


def fast_profile(device: Device) -> Profile:
    """Of this device and the searched workload, faster than anything is."""
    plain = factories.profile()
    fields = {name: getattr(device, name) for name in ProfiledDevice.__struct_fields__}
    replace, batch = msgspec.structs.replace, RECIPE.global_batch
    ratio = Interval(ratio=1e6, low=1e6, high=1e6)
    return replace(
        plain,
        strategy=baseline(batch),
        device=ProfiledDevice(**fields),
        workload=replace(plain.workload, name=NAME, global_batch=batch),
        evidence=replace(plain.evidence, speedup=ratio, soak_steps=26, baseline_strategy=baseline(batch)),
    )


def test_a_disk_that_fills_up_ends_the_search_with_a_line_and_leaves_the_old_profile(small_disk: Path) -> None:
    """And a search that then replaces a faster one keeps that beside it."""
    from autotune import backends

    device = backends.get("cpu").device()
    path = profile_path(device, NAME, small_disk)
    write_profile(fast_profile(device), path)
    before = path.read_bytes()
    (small_disk / "other").write_bytes(b"x" * (116 * 1024))
    done = briefly(*SEARCH, "--profiles", small_disk)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot be written: No space left on device" in last
    assert "--profiles" in last
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == before
    (small_disk / "other").unlink()
    done = briefly(*SEARCH, "--profiles", small_disk)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() != before
    assert read_profile(path).workload.name == NAME
    assert "This takes the place of a profile of 2026-11-21" in " ".join(done.stdout.split())
    assert path.with_suffix(".toml.old").read_bytes() == before


def test_two_writers_never_tear_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "imdb.toml"
    profiles = [factories.profile(autotune=version) for version in ("1" * 3000, "2" * 6000)]
    write_profile(profiles[0], path)
    is_over = threading.Event()

    def write(profile: object) -> None:
        while not is_over.is_set():
            write_profile(profile, path)  # type: ignore[arg-type]

    threads = [threading.Thread(target=write, args=(profile,)) for profile in profiles]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 1.0
    seen = set()
    while time.monotonic() < end:
        seen.add(format_profile(read_profile(path)))
    is_over.set()
    for thread in threads:
        thread.join()
    assert seen <= {format_profile(profile) for profile in profiles}
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file is left"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_without_a_terminal_that_is_told_to_end_loses_nothing(number: int, tmp_path: Path) -> None:
    """By SIGTERM, as Slurm and containers do."""
    with searching("trial  2", tmp_path) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert_gone(family)
    done = briefly(*SEARCH, "--profiles", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
