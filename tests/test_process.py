"""Real child processes, and the ways they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from autotune.errors import AutotuneError
from autotune.process import STDERR_TAIL_BYTES, Child, ChildDied, _forget


def echoes(connection: Connection) -> None:
    while True:
        connection.send(connection.recv())


def kills_itself(connection: Connection, number: int) -> None:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)


def exits(connection: Connection, status: int) -> None:
    os.write(2, b"x" * 100_000 + b"\nthe end\n")
    os._exit(status)


def hangs(connection: Connection) -> None:
    time.sleep(600)


def has_a_grandchild_that_ignores_signals(connection: Connection) -> None:
    grandchild = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"],
        start_new_session=True,
    )
    connection.send(grandchild.pid)
    time.sleep(600)


def tells_its_main_module(connection: Connection) -> None:
    connection.send(getattr(sys.modules["__main__"], "__file__", None))


def is_running(pid: int) -> bool:
    """Whether the process runs; one that ended but that nobody has asked after does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_messages_go_both_ways() -> None:
    with Child(echoes) as child:
        child.send({"a": 1})
        assert child.receive(30) == {"a": 1}


def test_a_child_does_not_run_the_users_script_again() -> None:
    with Child(tells_its_main_module) as child:
        assert child.receive(60) is None


@pytest.mark.parametrize(("number", "name"), [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL")])
def test_a_signal_is_named_with_the_last_lines_of_stderr(number: int, name: str) -> None:
    with Child(kills_itself, int(number)) as child, pytest.raises(ChildDied) as caught:
        child.receive(30)
    assert caught.value.exit_code == -number
    assert f"killed by {name}" in caught.value.reason
    assert "last words" in caught.value.reason


def test_an_exit_status_is_told_and_a_flood_on_stderr_is_cut() -> None:
    with Child(exits, 3) as child, pytest.raises(ChildDied) as caught:
        child.receive(30)
    assert "exited with status 3" in caught.value.reason
    assert caught.value.stderr_tail.endswith("the end")
    assert len(caught.value.stderr_tail) < 10_000


def test_no_answer_in_time_is_a_timeout_and_the_waiting_is_told() -> None:
    waits = []
    with Child(hangs) as child, pytest.raises(TimeoutError):
        child.receive(0.5, lambda: waits.append(1))
    assert waits
    assert not is_running(child.pid)


def test_closing_ends_grandchildren_in_sessions_of_their_own() -> None:
    with Child(has_a_grandchild_that_ignores_signals) as child:
        grandchild = child.receive(30)
        assert psutil.pid_exists(grandchild)
    deadline = time.monotonic() + 5
    while is_running(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def holds_memory_and_forks(connection: Connection) -> None:
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    if os.fork() == 0:
        time.sleep(600)
    connection.send(len(held))
    time.sleep(600)


def test_memory_that_a_forked_descendant_shares_counts_once() -> None:
    with Child(hangs) as empty, Child(holds_memory_and_forks) as child:
        held_bytes = child.receive(60)
        grown_bytes = child.memory_bytes() + child.descendants_bytes() - empty.memory_bytes()
    assert 0.9 * held_bytes < grown_bytes < 1.5 * held_bytes


def test_closing_removes_the_childs_files() -> None:
    with Child(hangs) as child:
        assert child._stderr.exists()
    assert not child._stderr.exists()


def stops_itself(connection: Connection) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("target", ["hangs", "stops_itself"])
def test_children_die_with_a_parent_that_is_killed(tmp_path: Path, target: str) -> None:
    script = tmp_path / "search.py"
    script.write_text(
        f"from tests.test_process import {target}\n"
        "from autotune.process import Child\n"
        f"child = Child({target})\n"
        "print(child.pid, flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def leaves_a_daemon_and_dies(connection: Connection) -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            connection.send(os.getpid())
            time.sleep(600)
        os._exit(0)
    time.sleep(0.5)
    os._exit(5)


@pytest.mark.skipif(sys.platform != "linux", reason="the guard needs prctl")
def test_a_daemon_does_not_outlive_the_child_that_left_it() -> None:
    with Child(leaves_a_daemon_and_dies) as child:
        daemon = child.receive(30)
        with pytest.raises(ChildDied, match="exited with status 5"):
            child.receive(30)
        assert not is_running(daemon), "the guard ends it before it passes on the child's end"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a server")
def test_a_server_that_is_killed_is_started_again() -> None:
    from multiprocessing import forkserver

    with Child(echoes) as child:
        server = psutil.Process(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]
        server.kill()
        child.send("still there")
        assert child.receive(30) == "still there"
    with Child(echoes) as child:
        child.send("again")
        assert child.receive(60) == "again"


def floods(connection: Connection) -> None:
    for _ in range(100):
        os.write(2, b"complaint\n" * (2**20 // 10))
    connection.send("done")
    connection.recv()


def test_a_flood_on_stderr_does_not_fill_the_disk() -> None:
    with Child(floods) as child:
        assert child.receive(60) == "done"
        with pytest.raises(TimeoutError):
            child.receive(0.3)
        assert child._stderr.stat().st_blocks * 512 <= 32 * 2**20
        assert "complaint" in child.stderr_tail()


def test_forgetting_what_was_written_keeps_what_is_appended_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    path.write_bytes(b"x" * 2**20)
    with path.open("ab") as writer, path.open("rb+") as cutter:
        _forget(cutter, 2**20 - STDERR_TAIL_BYTES)
        writer.write(b"the last line")
    assert path.read_bytes().endswith(b"x" * STDERR_TAIL_BYTES + b"the last line")
    assert path.stat().st_blocks * 512 < 2**19


def test_a_full_temporary_folder_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(AutotuneError, match=r"no temporary file .* TMPDIR"):
        Child(echoes)


def sends_garbage(connection: Connection) -> None:
    connection.send_bytes(b"no pickle")
    time.sleep(600)


def test_what_is_no_message_ends_the_child() -> None:
    with Child(sends_garbage) as child, pytest.raises(ChildDied, match="no message"):
        child.receive(30)


@pytest.mark.skipif(sys.platform != "linux", reason="oom_score_adj is Linux's")
def test_the_kernel_would_kill_the_child_first() -> None:
    with Child(hangs) as child:
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "1000"
