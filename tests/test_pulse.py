"""The device's pulse: real processes are paused for it, and times are moved to one speed by it."""

from __future__ import annotations

import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import psutil
import pytest

from autotune import pace
from autotune.pace import Beat, Beats, at_pulse, drift_doubt, even, slowdown, usual_pulse_s
from autotune.process import Child
from autotune.trial.pulse import Pulse
from tests import factories

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="what is timed is paused on Linux only")


def counts(connection: Connection, seconds: float) -> None:
    """Says when it was held up for more than 5 ms, in seconds of the clock that all processes share."""
    gaps, last = [], time.perf_counter()
    end = last + seconds
    while (now := time.perf_counter()) < end:
        if now - last > 0.005:
            gaps.append((last, now))
        last = now
    connection.send(gaps)
    time.sleep(600)


def starts_another(connection: Connection) -> None:
    if other := os.fork():
        connection.send(other)
    time.sleep(600)


@pytest.fixture
def pulse() -> Iterator[Pulse]:
    with Pulse("cpu") as found:
        yield found


def beats_of(path: str | None) -> list[Beat]:
    assert path is not None
    written = Path(path).read_bytes() if Path(path).exists() else b""
    return [Beat(*one) for one in struct.iter_unpack("=3d", written)]


@only_linux
def test_what_is_timed_stands_still_while_a_beat_is_taken(pulse: Pulse) -> None:
    path = pulse.file()
    with Child(counts, 2.0) as child:
        with pulse.pausing(child.pid):
            gaps = child.receive(30)
        beats = [beat for beat in beats_of(path) if beat.end_s < max(end for _, end in gaps)]
        assert len(beats) >= 3
        for beat in beats:
            longest = max(min(end, beat.end_s) - max(start, beat.start_s) for start, end in gaps)
            assert longest > 0.5 * (beat.end_s - beat.start_s)
            assert 0 < beat.seconds < beat.end_s - beat.start_s


@only_linux
def test_what_it_has_started_is_paused_too_and_goes_on(pulse: Pulse) -> None:
    path = pulse.file()
    with Child(starts_another) as child:
        other = psutil.Process(child.receive(30))
        seen = set()
        with pulse.pausing(child.pid):
            while len(beats_of(path)) < 3:
                seen.add(other.status())
        assert psutil.STATUS_STOPPED in seen
        after = len(beats_of(path))
        time.sleep(1.0)
        assert len(beats_of(path)) == after
        assert other.status() == psutil.STATUS_SLEEPING


@only_linux
def test_what_is_paused_goes_on_when_the_pulse_dies(pulse: Pulse) -> None:
    assert pulse.file() is not None
    with Child(starts_another) as child:
        child.receive(30)
        with pulse.pausing(child.pid):
            assert pulse._child is not None
            os.kill(pulse._child.pid, signal.SIGKILL)
            os.killpg(child.pid, signal.SIGSTOP)  # as it was killed in the middle of a beat
            deadline = time.monotonic() + 20
            while psutil.Process(child.pid).status() == psutil.STATUS_STOPPED:
                assert time.monotonic() < deadline
                pulse.check()
        assert pulse.file() is not None
        with pulse.pausing(child.pid):  # another one takes its place
            deadline = time.monotonic() + 20
            while not beats_of(pulse.file()):
                assert time.monotonic() < deadline
                time.sleep(0.05)


@only_linux
def test_the_beats_file_goes_with_the_pulse() -> None:
    with Pulse("cpu") as pulse, Child(starts_another) as child:
        path = Path(pulse.file() or "")
        with pulse.pausing(child.pid):
            while not path.exists():
                time.sleep(0.05)
    assert not path.exists()


@only_linux
def test_nothing_is_left_where_the_search_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(
        "from tests.test_pulse import starts_another\n"
        "from autotune.process import Child\n"
        "from autotune.trial.pulse import Pulse\n"
        "pulse, child = Pulse('cpu'), Child(starts_another)\n"
        "path = pulse.file()\n"
        "with pulse.pausing(child.pid):\n"
        "    print(child.receive(30), child.pid, path, flush=True)\n"
        "    import time; time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    search = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert search.stdout is not None
    other, child, path = search.stdout.readline().split()
    while not Path(path).exists():
        time.sleep(0.05)
    os.killpg(int(child), signal.SIGSTOP)  # as in the middle of a beat
    search.kill()
    search.wait()
    search.stdout.close()
    deadline = time.monotonic() + 20
    while Path(path).exists() or psutil.pid_exists(int(child)) or psutil.pid_exists(int(other)):
        assert time.monotonic() < deadline, "something outlived the search"
        time.sleep(0.05)


@only_linux
def test_what_is_gone_ends_no_pulse(pulse: Pulse) -> None:
    path = pulse.file()
    with Child(starts_another) as child:
        group = child.pid
    with pulse.pausing(group):
        time.sleep(0.5)
    assert not beats_of(path)
    assert pulse.beat()


def test_nothing_is_paused_where_the_beats_cannot_be_written(
    pulse: Pulse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert pulse.file() is None
    with pulse.pausing(1):
        assert pulse._child is None


def test_where_nothing_can_be_paused_the_work_is_timed_between_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, whose queue would run on; the CPU's own work stands in for its."""
    with Pulse("cuda") as pulse:
        assert pulse.file() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    pulse = Pulse("cpu")
    monkeypatch.undo()
    with pulse:
        assert pulse.file() is None
        with pulse.pausing(os.getpid()):
            assert 0 < (pulse.beat() or 0) < 10


def test_beats_are_read_as_they_come_and_old_ones_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "beats"
    whole = b"".join(map(pace.written, (Beat(1.0, 1.5, 0.01), Beat(9.5, 9.75, 0.02), Beat(9.9, 10.0, 0.08))))
    path.write_bytes(whole[:-5])
    beats = Beats(str(path))
    assert beats.during(1.2, 2.0) == pytest.approx((0.3, 0.01))
    assert beats.during(9.6, 9.9) == pytest.approx((0.15, 0.02))
    with path.open("ab") as file:
        file.write(whole[-5:])
    assert beats.during(9.8, 10.5) == pytest.approx((0.1, 0.04)), "the geometric mean of both"
    assert beats.during(20.0, 21.0) == (0.0, None)
    assert Beats().during(0.0, 1.0) == (0.0, None)


def test_laps_are_moved_to_the_speed_that_the_device_had_on_the_whole() -> None:
    """Twice as slow a device has laps longer by 2 to the power that training follows with."""
    power = pace.LAP_POWER
    laps = [
        msgspec.structs.replace(factories.lap(seconds), wait_s=seconds / 4, pulse_s=pulse_s)
        for seconds, pulse_s in ((1.0, 0.01), (2**power, 0.02))
    ]
    unknown = factories.lap(7.0)
    found = even([*laps, unknown])
    assert [lap.seconds for lap in found] == pytest.approx([2 ** (power / 2), 2 ** (power / 2), 7.0])
    assert [lap.wait_s / lap.seconds for lap in found[:2]] == pytest.approx([0.25, 0.25])
    assert usual_pulse_s(found) == pytest.approx(0.01 * math.sqrt(2))
    assert even(found) == found
    assert at_pulse(unknown, 0.01) == unknown
    assert usual_pulse_s([unknown]) is None


def test_beats_within_a_trial_are_believed_more_than_those_around_it() -> None:
    around = factories.trial(pulse_s=0.02)
    within = msgspec.structs.replace(around, has_beats=True)
    assert 1 < slowdown(around, 0.01) < slowdown(within, 0.01) < 2
    assert drift_doubt(around, 0.01) > drift_doubt(within, 0.01) > 0
    assert slowdown(within, None) == 1.0
    assert drift_doubt(within, None) == 0.0
