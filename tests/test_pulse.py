"""The device's pulse: real processes are paused for it, and times are moved to one speed by it."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import psutil
import pytest

from autotune import pace
from autotune.pace import Beat, Beats, at_pulse, drift_doubt, even, slowdown, usual_pulse_s
from autotune.process import Child
from autotune.trial.pulse import Pulse
from tests import factories, marks


def counts(connection: Connection, seconds: float) -> None:
    """Says that it has begun, then when it was held up for more than 5 ms, in seconds of the clock that all processes
    share. It may be held up as soon as it has said so."""
    gaps, last = [], time.perf_counter()
    connection.send("begun")
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


def until(condition: Callable[[], bool]) -> None:
    """Waits for it, twenty seconds at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def beats_of(path: str | None) -> list[Beat]:
    assert path is not None
    written = Path(path).read_bytes() if Path(path).exists() else b""
    return [Beat(*one) for one in struct.iter_unpack("=3d", written)]


@marks.pauses
def test_what_is_timed_stands_still_while_a_beat_is_taken(pulse: Pulse) -> None:
    path = pulse.file()
    with Child(counts, 2.0) as child:
        child.receive(30)
        with pulse.pausing(child.pid, path):
            gaps = child.receive(30)
        beats = [beat for beat in beats_of(path) if beat.end_s < max(end for _, end in gaps)]
        assert len(beats) >= 3
        for beat in beats:
            longest = max(min(end, beat.end_s) - max(start, beat.start_s) for start, end in gaps)
            assert longest > 0.5 * (beat.end_s - beat.start_s)
            assert 0 < beat.seconds < beat.end_s - beat.start_s


@marks.pauses
def test_what_it_has_started_is_paused_too_and_goes_on(pulse: Pulse) -> None:
    path = pulse.file()
    with Child(starts_another) as child:
        other = psutil.Process(child.receive(30))
        with pulse.pausing(child.pid, path):
            until(lambda: other.status() == psutil.STATUS_STOPPED)
            until(lambda: len(beats_of(path)) >= 3)
        after = len(beats_of(path))
        time.sleep(1.0)
        assert len(beats_of(path)) == after
        assert other.status() == psutil.STATUS_SLEEPING


@marks.pauses
def test_what_is_paused_goes_on_when_the_pulse_dies_and_is_paused_no_more(pulse: Pulse) -> None:
    """It would not know of the pauses: it reads the file of the one that died."""
    path = pulse.file()
    with Child(starts_another) as child:
        child.receive(30)
        with pulse.pausing(child.pid, path):
            assert pulse._child is not None
            os.kill(pulse._child.pid, signal.SIGKILL)
            os.killpg(child.pid, signal.SIGSTOP)  # as it was killed in the middle of a beat

            def goes_on() -> bool:
                pulse.check()
                return psutil.Process(child.pid).status() != psutil.STATUS_STOPPED

            until(goes_on)
        with pulse.pausing(child.pid, path):
            assert pulse.beat()
            time.sleep(1.0)
        assert not beats_of(pulse.file())
        with pulse.pausing(child.pid, pulse.file()):
            until(lambda: bool(beats_of(pulse.file())))


@marks.pauses
def test_turns_shorter_than_the_time_between_two_beats_have_some_all_the_same(pulse: Pulse) -> None:
    path = pulse.file()
    assert pulse.beat(), "it is ready"
    with Child(starts_another) as child:
        child.receive(30)
        for _ in range(30):
            with pulse.pausing(child.pid, path):
                time.sleep(0.05)
    assert len(beats_of(path)) >= 2


@marks.pauses
def test_the_beats_file_goes_with_the_pulse() -> None:
    with Pulse("cpu") as pulse, Child(starts_another) as child:
        path = Path(pulse.file() or "")
        with pulse.pausing(child.pid, str(path)):
            until(path.exists)
    assert not path.exists()


@marks.pauses
def test_nothing_is_left_where_the_search_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(
        "from tests.test_pulse import starts_another\n"
        "from autotune.process import Child\n"
        "from autotune.trial.pulse import Pulse\n"
        "pulse, child = Pulse('cpu'), Child(starts_another)\n"
        "path = pulse.file()\n"
        "with pulse.pausing(child.pid, path):\n"
        "    print(child.receive(30), child.pid, path, flush=True)\n"
        "    import time; time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    search = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert search.stdout is not None
    other, child, path = search.stdout.readline().split()
    until(Path(path).exists)
    os.killpg(int(child), signal.SIGSTOP)  # as in the middle of a beat
    search.kill()
    search.wait()
    search.stdout.close()
    until(lambda: not (Path(path).exists() or psutil.pid_exists(int(child)) or psutil.pid_exists(int(other))))


@marks.pauses
def test_what_is_gone_ends_no_pulse(pulse: Pulse) -> None:
    path = pulse.file()
    assert pulse.beat(), "it is ready"
    with Child(starts_another) as child:
        group = child.pid
    with pulse.pausing(group, path):
        time.sleep(0.5)
    assert not beats_of(path)
    assert pulse.beat()
    assert pulse.file() == path, "the same process goes on"


@marks.pauses
def test_a_process_that_is_about_to_begin_is_paused_when_it_has(pulse: Pulse) -> None:
    path = pulse.file()
    assert pulse.beat(), "it is ready"
    read, write = os.pipe()
    late = os.fork()
    if late == 0:
        os.read(read, 1)
        os.setpgid(0, 0)
        time.sleep(600)
    try:
        with pulse.pausing(late, path):
            time.sleep(0.5)
            assert not beats_of(path)
            os.write(write, b"!")
            until(lambda: bool(beats_of(path)))
    finally:
        os.kill(late, signal.SIGKILL)
        os.waitpid(late, 0)
        os.close(read)
        os.close(write)


def test_nothing_is_paused_where_the_beats_cannot_be_written(
    pulse: Pulse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert pulse.file() is None
    with pulse.pausing(1, pulse.file()):
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
        with pulse.pausing(os.getpid(), pulse.file()):
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
    usual = 2 ** (2**power / (1 + 2**power))  # of the first; the longer lap had as many more beats
    assert [lap.seconds for lap in found] == pytest.approx([usual**power, usual**power, 7.0])
    assert [lap.wait_s / lap.seconds for lap in found[:2]] == pytest.approx([0.25, 0.25])
    assert usual_pulse_s(found) == pytest.approx(0.01 * usual)
    assert [lap.seconds for lap in even(found)] == pytest.approx([lap.seconds for lap in found])
    assert at_pulse(unknown, 0.02, 0.01) == unknown
    slow = msgspec.structs.replace(factories.lap(7.0), pulse_s=0.02)
    assert at_pulse(slow, 0.02, 0.01).seconds == pytest.approx(
        7.0 / slowdown(factories.trial(pulse_s=0.02, has_beats=True), 0.01)
    ), "as a trial of that process would be moved"
    assert usual_pulse_s([unknown]) is None


def test_beats_within_a_trial_are_believed_more_than_those_around_it() -> None:
    around = factories.trial(pulse_s=0.02)
    within = msgspec.structs.replace(around, has_beats=True)
    assert 1 < slowdown(around, 0.01) < slowdown(within, 0.01) < 2
    assert drift_doubt(around, 0.01) > drift_doubt(within, 0.01) > 0
    assert slowdown(within, None) == 1.0
    assert drift_doubt(within, None) == 0.0


def test_what_was_stopped_altogether_is_known_by_the_beats_that_lack(tmp_path: Path) -> None:
    path = tmp_path / "beats"
    beats = Beats(str(path))

    def stopped(beat: Beat, start_s: float, end_s: float) -> bool:
        with path.open("ab") as file:
            file.write(pace.written(beat))
        beats.during(start_s, end_s)
        return beats.stopped(start_s, end_s)

    assert not stopped(Beat(10.0, 10.1, 0.01), 10.0, 10.5)
    assert stopped(Beat(20.6, 20.7, 0.01), 10.4, 20.5), "the next beat may come a little later"
    assert not stopped(Beat(21.0, 31.0, 10.0), 20.5, 31.0), "in the middle of a beat: a pause"
    assert beats.during(20.5, 31.0) == pytest.approx((0.1 + 10.0, 0.01)), "which says nothing of the device's speed"
    assert not stopped(Beat(40.4, 40.5, 0.01), 40.0, 41.0), "between two turns nothing is timed"
