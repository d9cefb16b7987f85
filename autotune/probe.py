"""What this device can do, each line found by running it in a child process; kept on disk until the software changes.

Owns the children, the verdicts that compare figures, and the cache. What is run is in autotune.checks.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import msgspec

from autotune import backends, checks
from autotune.backends.base import Backend, Capability, Device
from autotune.checks import Check
from autotune.contention import Load, cpu_s
from autotune.errors import AutotuneError
from autotune.files import replace_file
from autotune.process import Child, ChildDied

PROBE_VERSION = 4
"""Raised when a check changes its meaning: what an older version measured is measured again."""

TOO_SLOW = 3.0
"""A precision or a kernel this many times behind one that gives up no more of fp32 is not worth a search."""

START_LIMIT_S = 120.0
"""For a child to start and describe its device: the first one imports torch."""

STOP_LIMIT_S = 10.0
"""For a child to end by itself."""

# fp32, tf32 and bf16 have the same range, in falling exactness; fp16 has less range, and needs loss scaling for it
_RANK_BY_PRECISION = {"fp32": 0, "tf32": 1, "bf16": 2, "fp16": 3, "fp8": 4}
MAX_BUSY_PART = 0.25
"""With more than this part of the cores taken by others, results are not kept: with one of two cores taken, fp32 matmul
came to 7 GFLOP/s in place of 235, and kernels equally fast on a quiet machine were found too slow (2-core CPU)."""

_BASELINES = ("matmul.fp32", "attention.eager.fp32")


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device and what it was found to do."""

    device: Device
    capabilities: tuple[Capability, ...]
    probed_at: str
    """UTC, ISO 8601."""
    probe_s: float
    """How long the probing took."""
    busy_cores: float = 0.0
    """Of the cores that this process may use, how many others kept busy meanwhile. Figures suffer from that."""

    def capability(self, name: str) -> Capability:
        """The capability of that name; one that was not probed is not there, and says so."""
        for capability in self.capabilities:
            if capability.name == name:
                return capability
        return Capability(name=name, value=False, reason="unknown: not probed")

    def allows(self, name: str) -> bool:
        """Whether a search may use it."""
        return self.capability(name).value


def describe_device(backend: Backend) -> Device:
    """The device as a child process sees it, so that this process holds no device context. Raises AutotuneError."""
    with _Prober(backend) as prober:
        return prober.device()


def probe(
    backend: Backend,
    *,
    refresh: bool = False,
    cache_dir: Path,
    on_capability: Callable[[Capability], None] = lambda capability: None,
    on_start: Callable[[str], None] = lambda name: None,
    only: Sequence[Check] | None = None,
) -> Hardware:
    """The device as it is now with its capabilities: cached ones where this hardware and software were probed before.

    ``on_start`` is told the name of what is being run; ``on_capability`` gets each result, in order, cached ones too.
    Results that are judged against one another (matmul, attention) come together. ``refresh`` measures again; ``only``
    runs these checks in place of the standard ones. What was measured on a busy machine is not cached. Raises
    AutotuneError where the device cannot even be described.
    """
    start_s = time.perf_counter()
    wanted = checks.standard(backend) if only is None else tuple(only)
    with _Prober(backend) as prober:
        on_start("device")
        device = prober.device()
        path = cache_dir / _cache_name(device, wanted)
        cached = None if refresh else _read(path)
        if cached is not None and cached.device.fingerprint == device.fingerprint:
            for capability in cached.capabilities:
                on_capability(capability)
            return msgspec.structs.replace(cached, device=device)
        capabilities: list[Capability] = []
        load = Load()
        for _, family in itertools.groupby(wanted, key=lambda check: check.name.partition(".")[0]):
            found: list[Capability] = []
            for check in family:
                on_start(check.name)
                found.append(_follow(check, found) if check.follows else prober.run(check))
            for capability in _judge(found):
                capabilities.append(capability)
                on_capability(capability)
        busy_cores = load.busy_cores(device.num_cores, prober.cpu_s)
    hardware = Hardware(
        device=device,
        capabilities=tuple(capabilities),
        probed_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        probe_s=round(time.perf_counter() - start_s, 2),
        busy_cores=round(busy_cores, 2),
    )
    if busy_cores <= MAX_BUSY_PART * device.num_cores:
        _write(path, hardware)
    return hardware


class _Prober:
    """A child that runs checks, and its successor after each check that it does not survive."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._child: Child | None = None
        self.cpu_s = 0.0
        """CPU seconds that its children spent on checks."""
        self._scratch = tempfile.TemporaryDirectory(prefix="autotune-probe-", ignore_cleanup_errors=True)

    def device(self) -> Device:
        try:
            answer = self._ask("device", START_LIMIT_S)
        except (ChildDied, TimeoutError) as exc:
            answer = str(exc)
        if not isinstance(answer, Device):
            raise AutotuneError(f"device {self._backend.name} cannot be probed: {answer}; name another with --device")
        return answer

    def run(self, check: Check) -> Capability:
        limit_s = check.time_limit_s + (START_LIMIT_S if self._child is None else 0.0)
        try:
            answer = self._ask(check, limit_s)
        except ChildDied as exc:
            self._kill()
            return Capability(name=check.name, value=False, reason=f"refused: {_death(exc)}")
        except TimeoutError as exc:
            self._kill()
            return Capability(name=check.name, value=False, reason=f"refused: {exc}")
        assert isinstance(answer, Capability)
        return answer

    def __enter__(self) -> _Prober:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Lets the child end by itself, since a kill leaves its semaphores registered and multiprocessing complains of
        them at exit; after an error, ^C among them, nobody waits.
        """
        if self._child is not None and error is None:
            with contextlib.suppress(ChildDied, TimeoutError):
                self._ask("stop", STOP_LIMIT_S)
        self._kill()
        self._scratch.cleanup()

    def _kill(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(self, question: Check | Literal["device", "stop"], limit_s: float) -> object:
        if self._child is None:
            self._child = Child(_serve, self._backend.name, self._scratch.name)
        self._child.send(question)
        before_s = cpu_s(self._child.pid)
        try:
            answer: object = self._child.receive(limit_s)
        finally:
            self.cpu_s += max(0.0, cpu_s(self._child.pid) - before_s)
        return answer


def _serve(connection: Connection, backend_name: str, scratch: str) -> None:
    """In the child: answers "device" with the Device (or why there is none), a Check with its Capability."""
    warnings.simplefilter("ignore")
    tempfile.tempdir = scratch
    backend = backends.get(backend_name)
    while (question := connection.recv()) != "stop":
        if question == "device":
            try:
                connection.send(backend.device())
            except Exception as exc:  # noqa: BLE001 - the parent raises it as the user's error
                connection.send(checks.first_line(exc))
        else:
            connection.send(_capability(question, backend))


def _capability(check: Check, backend: Backend) -> Capability:
    assert check.run is not None
    try:
        figures = check.run(backend)
    except Exception as exc:  # noqa: BLE001 - a refusal is data, and its reason is kept
        if isinstance(exc, checks.RefusalError):
            return Capability(name=check.name, value=False, reason=f"refused: {exc}", measured=exc.figures)
        return Capability(name=check.name, value=False, reason=f"refused: {checks.first_line(exc)}")
    return Capability(name=check.name, value=True, measured=figures)


def _death(death: ChildDied) -> str:
    """The signal by its name; after a plain exit also what was said last. faulthandler's stack is of no use here."""
    head = death.reason.partition(":")[0]
    last = death.stderr_tail.rpartition(" | ")[2]
    return head if head.startswith("killed") or not last else f"{head}: {last}"[:108]


def _follow(check: Check, found: Sequence[Capability]) -> Capability:
    leader = next((capability for capability in found if capability.name == check.follows), None)
    if leader is None:
        return Capability(name=check.name, value=False, reason=f"unknown: {check.follows} was not probed")
    reason = f"ok: as {leader.name}" if leader.value else leader.reason
    return Capability(name=check.name, value=leader.value, reason=reason)


def _judge(family: Sequence[Capability]) -> Iterator[Capability]:
    """Marks as too slow what is TOO_SLOW times behind another of its family that gives up no more of fp32.

    The baselines, fp32 and fp32 attention written out, are never too slow: everything is compared with them.
    """
    speeds = {capability.name: speed for capability in family if (speed := _speed(capability)) is not None}
    for capability in family:
        name = capability.name
        rivals = [rival for rival in speeds if name in speeds and _given_up(rival) <= _given_up(name)]
        fastest = max(rivals, key=lambda rival: speeds[rival], default=name)
        if name in _BASELINES or fastest == name or speeds[fastest] < TOO_SLOW * speeds[name]:
            yield capability
            continue
        if "gflop_per_s" in capability.measured:
            figures = f"{speeds[name]:.3g} GFLOP/s against {speeds[fastest]:.3g}"
        else:
            figures = f"{1 / speeds[name]:.3g} ms against {1 / speeds[fastest]:.3g}"
        rival = fastest.partition(".")[2]
        yield msgspec.structs.replace(capability, value=False, reason=f"too slow: {figures} in {rival}")


def _given_up(name: str) -> int:
    """How much of fp32 a capability's precision gives up, as a rank: exactness first, then range."""
    return _RANK_BY_PRECISION[name.rpartition(".")[2]]


def _speed(capability: Capability) -> float | None:
    """Higher is faster: GFLOP/s of a matmul, one over the milliseconds of attention forward and backward.

    None for what did not run or has no such figures.
    """
    measured = capability.measured
    if "gflop_per_s" in measured:
        return measured["gflop_per_s"]
    # a window that leaves nothing out says nothing of how fast windows are
    is_window = capability.name.startswith("attention.window.")
    if "forward_ms" in measured and "backward_ms" in measured and not is_window:
        return 1 / (measured["forward_ms"] + measured["backward_ms"])
    return None


def cached_probe(fingerprint: str, cache_dir: Path) -> Hardware | None:
    """What the last probe of the device with this fingerprint found; None where there is none."""
    paths = sorted(cache_dir.glob(f"hardware-{fingerprint}-*.json"), key=lambda path: path.stat().st_mtime)
    return next((found for path in reversed(paths) if (found := _read(path)) is not None), None)


def _cache_name(device: Device, wanted: Sequence[Check]) -> str:
    """One file for a device, its software, what the environment tells it and what is asked of it."""
    told = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    software = [PROBE_VERSION, sorted(device.versions.items()), told, [check.name for check in wanted]]
    return f"hardware-{device.fingerprint}-{hashlib.sha256(msgspec.json.encode(software)).hexdigest()[:12]}.json"


def _read(path: Path) -> Hardware | None:
    """None where there is no such file, or only a torn one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Hardware)
    except (OSError, msgspec.DecodeError):
        return None


def _write(path: Path, hardware: Hardware) -> None:
    """A cache that cannot be written costs the next probe, not this one."""
    with contextlib.suppress(OSError):
        replace_file(path, msgspec.json.format(msgspec.json.encode(hardware), indent=1))
