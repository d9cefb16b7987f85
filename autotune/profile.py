"""The best Strategy for one Device and one Workload, with its evidence, as strict TOML. Where it lies is store.py's."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from autotune.errors import AutotuneError
from autotune.files import replace_file
from autotune.measurement import Interval, Rates
from autotune.strategy import Strategy

SCHEMA = 1
"""Raised when a profile's meaning changes; older ones are read as long as they can be."""


class ProfiledDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device that a profile was measured on."""

    fingerprint: str
    kind: str
    name: str
    architecture: str
    num_cores: int
    memory_total_bytes: int


class ProfiledWorkload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The workload that a profile was measured on."""

    name: str
    source: str
    global_batch: int
    epochs: int
    num_train: int
    num_test: int
    num_parameters: int | None = None
    """Of its model: another script of the same name has another. None in profiles from before autotune wrote it."""


class Figures(Rates, frozen=True, kw_only=True):
    """What a strategy was measured to do."""

    projected_s: float
    """The planned run: all epochs with their evaluations, warm-up and compilation counted."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Why the strategy was chosen."""

    objective: str
    search_s: float
    num_trials: int
    versions: dict[str, str]
    speedup: Interval
    """Best over baseline, measured in turns where there were rounds."""
    num_rounds: int = 0
    """Rounds that baseline and best were timed in, in turns."""
    warm_up_cached_s: float | None = None
    """Seconds of the best's warm-up where the compile cache has its work; ``best.warm_up_s`` is without."""
    soak_steps: int = 0
    """Steps, the longest samples' in a row first, that the best has lasted; none where the search was interrupted."""
    loss_deviation: float | None = None
    """Largest distance of the best's first losses from the fp32 baseline's on the same batches, as a share of them."""
    baseline_strategy: Strategy
    baseline: Figures
    best: Figures


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file's contents."""

    schema: int
    created: str
    """ISO 8601, UTC."""
    autotune: str
    """The version that wrote it."""
    device: ProfiledDevice
    workload: ProfiledWorkload
    strategy: Strategy
    evidence: Evidence


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises AutotuneError that names the file and the key at fault."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AutotuneError(f"there is no profile {path}; `autotune profiles list` shows those there are") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise AutotuneError(f"profile {path} cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise AutotuneError(f"profile {path} is not TOML: {exc}") from exc
    return parse_profile(data, str(path))


def parse_profile(data: dict[str, Any], name: str) -> Profile:
    """A profile from parsed TOML; ``name`` is what errors call it."""
    schema = data.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise AutotuneError(
            f"profile {name} has schema {schema}, this autotune reads up to {SCHEMA}; upgrade autotune, or search again"
        )
    try:
        profile = msgspec.convert(data, Profile)
    except msgspec.ValidationError as exc:
        message, _, where = str(exc).partition(" - at ")
        key = re.sub(r"[`$]", "", where).lstrip(".") or "the top level"
        raise AutotuneError(f"profile {name}, at {key}: {message}; mend it, or search again") from exc
    if profile.strategy.global_batch != profile.workload.global_batch:
        raise AutotuneError(
            f"profile {name}, at strategy: micro_batch x accumulation is {profile.strategy.global_batch}, but "
            f"workload.global_batch is {profile.workload.global_batch}; mend it, or search again"
        )
    return profile


def format_profile(profile: Profile) -> str:
    """The profile as TOML, ending in a newline."""
    data = msgspec.to_builtins(profile)
    return "# Written by autotune search. `autotune train` reads it; so does autotune.load().\n" + tomli_w.dumps(data)


def write_profile(profile: Profile, path: Path) -> None:
    """Writes or replaces the file in one move: whoever reads meanwhile gets the old one or the new one, whole.

    Raises AutotuneError when the folder or disk does not take it; an old file is then still intact.
    """
    try:
        replace_file(path, format_profile(profile).encode())
    except OSError as exc:
        raise AutotuneError(f"profile {path} cannot be written: {exc.strerror or exc}") from exc
