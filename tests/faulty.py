"""A tiny workload whose model or data goes wrong in a scripted way, in a real trial process.

What is scripted is the ref's ``folder``: the fault's name. It strikes in training, where the micro batch is ``FAULTY``;
all other settings are healthy, and ``BEST`` is the fastest of them by far (the time is slept, so that it is the same on
every machine). Named ``tests.faulty:WORKLOAD``.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.backends import fake
from autotune.data.batching import Indices
from autotune.workloads.base import Recipe, Workload, WorkloadRef, num_correct

BASELINE, BEST, FAULTY = 8, 4, 2
LONGEST = 16
SLEEP_S = {8: 0.006, 4: 0.001, 2: 0.002, 1: 0.008}
"""Per sample, by micro batch. So far apart that no hiccup of a loaded machine turns them round."""
DROWSY = 4
"""So much longer all sleep where the faulty setting is to be the fastest: it has the most forwards, each of which takes
a loaded machine some milliseconds beside its sleep."""
RECIPE = Recipe(learning_rate=1e-2, weight_decay=0.0, warmup_steps=1, clip_norm=1.0, global_batch=BASELINE, epochs=1)
NAME = "tests.faulty:WORKLOAD"


class FaultyWorkload:
    """What autotune.workloads asks of a workload's module."""

    RECIPE = RECIPE

    def prepare(self, data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
        """``data`` is the fault's name."""
        return WorkloadRef(name=NAME, folder=str(data or "none"), source="made up")

    def open_workload(self, ref: WorkloadRef) -> Workload:
        data = Data(ref.folder)
        return Workload(
            name="faulty",
            recipe=RECIPE,
            source=ref.source,
            build_model=lambda: Model(ref.folder),
            loss=lambda output, targets: F.cross_entropy(output, targets, reduction="sum"),
            num_correct=num_correct,
            train=data,
            test=Data("none"),
            max_tokens=LONGEST,
        )


WORKLOAD = FaultyWorkload()


class Data:
    """64 short sequences."""

    def __init__(self, fault: str) -> None:
        generator = np.random.default_rng(0)
        self.fault = LOADER_FAULTS.get(fault)
        self.lengths: Indices = np.concatenate([generator.integers(2, 8, 56), np.full(8, LONGEST)])
        self.labels: Indices = generator.integers(0, 2, 64)

    def ids(self, index: int) -> NDArray[np.uint16]:
        if self.fault is not None and torch.utils.data.get_worker_info() is not None:
            self.fault()
        return np.full(self.lengths[index], 1 + self.labels[index], dtype=np.uint16)


class Model(nn.Module):
    """Embeds, pools, classifies; sleeps; and at its seventh faulty micro batch does what it is told to."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        torch.set_num_threads(1)  # on a busy machine two threads wait for each other longer than they compute
        self.fault = MODEL_FAULTS.get(fault)
        self.calls = 0
        self.width = 0
        self.num_longest = 0
        self.held: list[object] = []
        self.embedding = nn.Embedding(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        size, self.width = ids_BT.shape
        wins_trials = self.fault in (leaks, learns_nothing)
        sleep_s = SLEEP_S[BEST] / 2 if wins_trials and size == FAULTY else SLEEP_S[size]
        time.sleep(size * sleep_s * (DROWSY if wins_trials else 1))
        embedded_BTC = self.embedding(ids_BT) * mask_BT[..., None]
        output = self.head(embedded_BTC.sum(1) / mask_BT.sum(1, keepdim=True))
        if self.training and size == FAULTY and self.fault is not None:
            self.calls += 1
            if self.calls >= 7:
                output = self.fault(self, output)
        assert isinstance(output, Tensor)
        return output


def allocates_too_much(model: Model, output: Tensor) -> Tensor:
    return torch.empty(2**52)


def python_allocates_too_much(model: Model, output: Tensor) -> Tensor:
    model.held.append(bytearray(2**60))
    return output


def bad_alloc(model: Model, output: Tensor) -> Tensor:
    raise RuntimeError("std::bad_alloc")  # as pybind11 words what a C++ library threw


def grows_over_the_budget(model: Model, output: Tensor) -> Tensor:
    while True:
        model.held.append(b"x" * (32 * 2**20))
        time.sleep(0.05)


def leaks(model: Model, output: Tensor) -> Tensor:
    """Where the longest samples come again and again, as only the soak has them."""
    model.num_longest = model.num_longest + 1 if model.width == LONGEST else 0
    if model.num_longest > 8:
        model.held.append(b"x" * (64 * 2**20))
    return output


def grandchild_grows(model: Model, output: Tensor) -> Tensor:
    if os.fork() == 0:
        grows_over_the_budget(model, output)
    time.sleep(600)
    return output


def fake_device_is_full(model: Model, output: Tensor) -> Tensor:
    fake.limit_memory(1)
    return output


def fake_device_hangs(model: Model, output: Tensor) -> Tensor:
    fake.script(lambda: time.sleep(600))
    return output


def fake_device_is_lost(model: Model, output: Tensor) -> Tensor:
    def lost() -> None:
        raise OSError("device lost")

    fake.script(lost)
    return output


def is_killed(number: int) -> Callable[[Model, Tensor], Tensor]:
    def strike(model: Model, output: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return output

    return strike


def segfaults(model: Model, output: Tensor) -> Tensor:
    ctypes.string_at(0)
    return output


def spins(model: Model, output: Tensor) -> Tensor:
    while True:
        pass


def sleeps(model: Model, output: Tensor) -> Tensor:
    time.sleep(600)
    return output


def exits(model: Model, output: Tensor) -> Tensor:
    os._exit(3)


def leaves_politely(model: Model, output: Tensor) -> Tensor:
    sys.exit(4)


def aborts(model: Model, output: Tensor) -> Tensor:
    os.abort()


def raises(error: Exception) -> Callable[[Model, Tensor], Tensor]:
    def strike(model: Model, output: Tensor) -> Tensor:
        raise error

    return strike


def is_no_number(model: Model, output: Tensor) -> Tensor:
    step = 1 + (model.calls - 1) * FAULTY // RECIPE.global_batch
    return output * math.nan if step == 7 else output


def has_no_gradient(model: Model, output: Tensor) -> Tensor:
    return output + torch.sqrt(output * 0)  # the loss is fine, its gradient is 0 / 0


def learns_nothing(model: Model, output: Tensor) -> Tensor:
    return output.detach() + 0 * output


def asks_for_a_refused_kernel(model: Model, output: Tensor) -> Tensor:
    query = torch.zeros(1, 1, 4, 4, requires_grad=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return output + F.scaled_dot_product_attention(query, query, query).sum()


def floods_stderr(model: Model, output: Tensor) -> Tensor:
    if model.calls == 7:
        for _ in range(100):
            os.write(2, b"complaint\n" * (2**20 // 10))
    return output


def floods_stderr_and_dies(model: Model, output: Tensor) -> Tensor:
    floods_stderr(model, output)
    os.write(2, b"the last line\n")
    os._exit(1)


def leaves_a_daemon(model: Model, output: Tensor) -> Tensor:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
    time.sleep(0.2)
    os._exit(5)


def forks_many(model: Model, output: Tensor) -> Tensor:
    for _ in range(20):
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
    raise KeyError("after twenty forks")


def leaves_a_thread(model: Model, output: Tensor) -> Tensor:
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise KeyError("with a thread left over")


def breaks_the_pipe(model: Model, output: Tensor) -> Tensor:
    os.closerange(3, 256)
    time.sleep(600)
    return output


def sends_garbage(model: Model, output: Tensor) -> Tensor:
    for connection in [found for found in gc.get_objects() if isinstance(found, Connection) and not found.closed]:
        if connection.writable and connection.readable:
            connection.send_bytes(b"this is no pickle")
    time.sleep(600)
    return output


def sets_the_clock(model: Model, output: Tensor) -> Tensor:
    """A stand-in: the machine's own clock is not ours to set."""
    jump_s = (-1) ** model.calls * 86_400.0
    now_s = time.clock_gettime(time.CLOCK_REALTIME)
    time.time = lambda: now_s + jump_s
    return output


MODEL_FAULTS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "an allocation that torch cannot serve": allocates_too_much,
    "an allocation that Python cannot serve": python_allocates_too_much,
    "std::bad_alloc": bad_alloc,
    "resident memory over the budget": grows_over_the_budget,
    "a grandchild's memory over the budget": grandchild_grows,
    "a leak that shows in the soak": leaks,
    "SIGKILL, as by the kernel's OOM killer": is_killed(signal.SIGKILL),
    "fake device: full": fake_device_is_full,
    "fake device: hangs in synchronize": fake_device_hangs,
    "fake device: lost": fake_device_is_lost,
    "while True": spins,
    "sleeps for ever": sleeps,
    "SIGSTOP": is_killed(signal.SIGSTOP),
    "os._exit(3)": exits,
    "sys.exit(4)": leaves_politely,
    "SIGSEGV": segfaults,
    "SIGABRT": aborts,
    "an exception that is not torch's": raises(KeyError("no such key")),
    "an exception with a message of 10 MB": raises(KeyError("x" * 10_000_000)),
    "NaN at step 7": is_no_number,
    "a gradient that is no number": has_no_gradient,
    "a model that learns nothing": learns_nothing,
    "a kernel that torch refuses": asks_for_a_refused_kernel,
    "100 MB of stderr": floods_stderr,
    "100 MB of stderr, then death": floods_stderr_and_dies,
    "a daemon that outlives the trial": leaves_a_daemon,
    "twenty forks in sessions of their own": forks_many,
    "a thread that never ends": leaves_a_thread,
    "a broken pipe": breaks_the_pipe,
    "garbage in the pipe": sends_garbage,
    "a clock that jumps": sets_the_clock,
}


def loader_raises() -> None:
    raise KeyError("no such review")


def loader_hangs() -> None:
    time.sleep(600)


def loader_dies() -> None:
    """Once torch watches it: a death before that is noticed when torch looks again after five seconds, and these
    searches, unlike any other, take three seconds of silence for a hang."""
    time.sleep(0.3)
    os._exit(7)


LOADER_FAULTS: dict[str, Callable[[], None]] = {
    "an exception in a loader worker": loader_raises,
    "a loader worker that hangs": loader_hangs,
    "a loader worker that dies": loader_dies,
}
