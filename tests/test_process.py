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

from autotune.process import Child, ChildDied


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
        grown_bytes = child.memory_bytes() - empty.memory_bytes()
    assert 0.9 * held_bytes < grown_bytes < 1.5 * held_bytes


def test_closing_removes_the_childs_files() -> None:
    with Child(hangs) as child:
        assert child._stderr.exists()
    assert not child._stderr.exists()


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(
        "from tests.test_process import hangs\n"
        "from autotune.process import Child\n"
        "child = Child(hangs)\n"
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
