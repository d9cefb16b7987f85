"""Options that several verbs share, and the objects they turn into."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from autotune.backends.base import Backend
    from autotune.probe import Hardware
    from autotune.profile import Profile
    from autotune.workloads.base import Workload, WorkloadRef

F = TypeVar("F", bound=Callable[..., Any])


def model_option(function: F) -> F:
    """--model"""
    return click.option(
        "--model",
        "name",
        required=True,
        metavar="NAME",
        help="imdb, lm, lm-base, cifar10, each also with another global batch, as in imdb@64; my_train.py:FUNCTION or "
        "package.module:FUNCTION of your own; hf:NAME; timm:NAME.",
    )(function)


def data_options(function: F) -> F:
    """--data and --limit"""
    function = click.option(
        "--data",
        type=click.Path(path_type=Path),
        help="imdb: an aclImdb folder, or JSON lines or CSV with text and label, plain, .gz or .xz; default: "
        "$AUTOTUNE_DATA, then Hugging Face datasets. lm: a text file, or a folder with train and valid. cifar10: its "
        "own folder, or one with .npz files. Synthetic data where there is none.",
    )(function)
    return click.option(
        "--limit", type=click.IntRange(min=1), metavar="N", help="At most N samples of each split, drawn at random."
    )(function)


def device_option(function: F) -> F:
    """--device"""
    return click.option(
        "--device", "device_name", metavar="KIND", help="cuda, mps or cpu. Default: the first there is."
    )(function)


def profiles_option(function: F) -> F:
    """--profiles"""
    return click.option(
        "--profiles",
        type=click.Path(path_type=Path),
        callback=lambda _, __, folder: folder and folder.absolute(),  # a user's script may leave the working folder
        help="Folder of profiles. Default: $AUTOTUNE_PROFILES, ./profiles if it exists, the user data folder.",
    )(function)


def json_option(function: F) -> F:
    """--json"""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)


def find_backend(device_name: str | None) -> Backend:
    """The named backend, or the first that is available. Raises AutotuneError where it is not."""
    from autotune import backends

    if device_name is None:
        return backends.find()
    backend = backends.get(device_name)
    reason = backend.unavailable()
    if reason is not None:
        raise AutotuneError(f"device {device_name} is not available: {reason}")
    return backend


def named_profile(what: str, device_name: str | None, profiles: Path | None) -> tuple[Profile, Path]:
    """A profile by its file, or this device's by its workload's name. Raises AutotuneError where there is none."""
    from autotune import store, workloads
    from autotune.profile import read_profile

    path = Path(what)
    if path.suffix == ".toml" or path.is_file():
        return read_profile(path), path
    found = store.find_profile(find_backend(device_name).device(), workloads.wanted(what), profiles)
    if found is None:
        raise AutotuneError(f"there is no profile for {what} on this device; autotune search --model {what}")
    return found


def kind_of(what: str) -> Literal["run", "study", "profile"]:
    """What a name stands for: a training run by its folder or its metrics, a study by its record, else a profile.

    Raises AutotuneError for a path that is not there, and a JSON file that cannot be read or is neither.
    """
    from autotune.training import METRICS_FILE

    path = Path(what)
    if path.is_dir() and ((path / METRICS_FILE).is_file() or path.name != what):
        return "run"
    if path.name != what and not path.exists() and ":" not in what:
        raise AutotuneError(f"there is no file or folder {what}")
    if path.suffix != ".json" or ":" in what:
        return "profile"
    try:
        record = json.loads(path.read_bytes())
    except OSError as exc:
        raise AutotuneError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise AutotuneError(f"{path} is no record of a study or of a training run: {exc}") from exc
    if isinstance(record, dict) and "cells" in record:
        return "study"
    if isinstance(record, dict) and "epochs" in record:
        return "run"
    raise AutotuneError(f"{path} is no record of a study or of a training run")


def probed(backend: Backend, *, refresh: bool = False) -> Hardware:
    """The device with its capabilities, cached or measured, with progress on stderr."""
    from autotune.probe import probe
    from autotune.report.live import ProbeDisplay
    from autotune.store import cache_dir

    with ProbeDisplay() as display:
        return probe(
            backend,
            refresh=refresh,
            cache_dir=cache_dir() / "probe",
            on_capability=display.on_capability,
            on_start=display.on_start,
        )


def prepare(
    name: str, data: Path | None, limit: int | None, *, is_measured: bool = False
) -> tuple[WorkloadRef, Workload]:
    """The workload with its data ready, for trials where it ``is_measured``; with progress and the data's notice on
    stderr."""
    from autotune import workloads
    from autotune.report.live import StageDisplay

    module = workloads.get(name)
    with StageDisplay() as display:
        ref = module.prepare(data, limit=limit, on_progress=display.stage)
        if is_measured:
            ref = workloads.look(ref, display.stage)
    if ref.notice:
        display.console.print(ref.notice, style="yellow", markup=False)
    # whatever a workload of the user's calls itself: profiles are looked for by what is typed
    workload = copy.copy(module.open_workload(ref))
    object.__setattr__(workload, "name", workloads.label(name))
    return ref, workload
