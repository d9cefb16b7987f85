"""What tests share: a cache of their own, a few small real files, a workload made from them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from autotune import backends, store, workloads
from autotune.backends import cpu
from autotune.probe import probe
from autotune.search import races, study, trials
from autotune.search.settings import Settings
from autotune.search.task import Task
from autotune.workloads.base import Workload, WorkloadRef
from tests import factories, scripted
from tests.observing import SilentPulse

# How long an example takes says nothing here: tests run beside each other, on machines of any speed.
settings.register_profile("autotune", deadline=None)
settings.load_profile("autotune")

# A shell ignores Ctrl-C for what it starts in the background, and what that starts inherits it: not the searches here.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = {1: ["great", "moving", "superb", "funny"], 0: ["dull", "awful", "boring", "weak"]}


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's is read or written, by child processes neither."""
    patch = pytest.MonkeyPatch()
    patch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
    # Tests run beside each other; threads that wait for each other's cores would take most of the time.
    patch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    for name in ("AUTOTUNE_DATA", "AUTOTUNE_PROFILES", "COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def probed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """This machine's real probe, in the cache; the first of the suite's workers to ask has it measured. The tests
    beside these keep the machine busy, so that the command would not keep what it measures, and would probe each time.
    """
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "probe"
    with pytest.MonkeyPatch.context() as patch, FileLock(shared.with_suffix(".lock")):
        patch.setattr("autotune.contention.Load.busy_cores", lambda self, num_cores, children_s: 0.0)
        probe(backends.get("cpu"), cache_dir=shared)
        shutil.copytree(shared, store.cache_dir() / "probe", dirs_exist_ok=True)


@pytest.fixture(scope="session")
def tiny_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real .jsonl file of 137 short reviews."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    with path.open("w") as file:
        for index in range(137):
            label = index % 2
            words = generator.choices(WORDS[label] + ["the", "film", "plot", "actor"], k=generator.randint(3, 40))
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


@pytest.fixture(scope="session")
def imdb_folder() -> Path:
    """The real reviews, where this machine has them."""
    path = Path(os.environ.get("AUTOTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data") / "imdb"
    if not path.is_dir():
        pytest.skip(f"the real reviews are not at {path}; AUTOTUNE_TEST_DATA names another folder")
    return path


@pytest.fixture(scope="session")
def prepared(tiny_reviews: Path) -> tuple[WorkloadRef, Workload]:
    """The imdb workload on the short reviews."""
    module = workloads.get("imdb")
    ref = module.prepare(tiny_reviews, limit=None, on_progress=lambda _: None)
    return ref, module.open_workload(ref)


@pytest.fixture
def task(prepared: tuple[WorkloadRef, Workload]) -> Task:
    """A search of that workload on made-up hardware."""
    ref, workload = prepared
    return Task(ref=ref, workload=workload, hardware=factories.hardware(), backend=scripted.CPU, settings=Settings())


@pytest.fixture
def scripted_device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Searches run on the scripted device, whose flash kernel is not what torch chooses."""
    monkeypatch.setattr(cpu, "same_kernel", {})
    monkeypatch.setattr(trials, "run_trial", scripted.run_scripted)
    monkeypatch.setattr(races, "Race", scripted.ScriptedRace)
    monkeypatch.setattr(study, "Pulse", SilentPulse)
    monkeypatch.setattr(study, "prove", scripted.prove_scripted)
    monkeypatch.setattr(study, "reference_losses", lambda job, **_: (0.7,))
    return monkeypatch
