"""Where profiles and caches lie, and which of them is this device's."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock
import platformdirs

from autotune.backends.base import Device
from autotune.errors import AutotuneError
from autotune.profile import Profile, read_profile


class Wanted(NamedTuple):
    """What a profile has to be for."""

    name: str
    """The workload's, as the user types it."""
    label: str
    """The workload's, as profiles have it."""
    global_batch: int
    num_parameters: int | None = None
    """Of the model; None where its name says which it is."""


def cache_dir() -> Path:
    """Probe results, tokenized data, compiled code; ``AUTOTUNE_CACHE`` moves it."""
    return Path(os.environ.get("AUTOTUNE_CACHE") or platformdirs.user_cache_dir("autotune"))


def shipped_dir() -> Path:
    """The profiles that come with autotune."""
    return Path(__file__).parent / "profiles"


def stores(profiles: Path | None = None) -> list[Path]:
    """The folders that profiles are looked for in, first to last; they are saved in the first but the shipped."""
    folders = []
    if profiles is not None:
        folders.append(profiles)
    if os.environ.get("AUTOTUNE_PROFILES"):
        folders.append(Path(os.environ["AUTOTUNE_PROFILES"]))
    if Path("profiles").is_dir():
        folders.append(Path("profiles"))
    folders.append(Path(platformdirs.user_data_dir("autotune")) / "profiles")
    return [*folders, shipped_dir()]


def folder_name(device: Device) -> str:
    """``cpu-intel-xeon-2-cores-1f2e3d4c5b6a``: for people, and unique by the fingerprint at its end."""
    words = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*", " ", device.name.lower())
    cores = [f"{device.num_cores}-cores"] if device.kind == "cpu" else []
    parts = [device.kind, *re.findall(r"[a-z0-9]+", words), *cores, device.fingerprint]
    return "-".join(parts)


def profile_path(device: Device, workload: str, profiles: Path | None = None) -> Path:
    """Where a search saves this device's profile."""
    return stores(profiles)[0] / folder_name(device) / f"{file_stem(workload)}.toml"


def find_profile(device: Device, wanted: Wanted, profiles: Path | None = None) -> tuple[Profile, Path] | None:
    """This device's profile from the first store that has one. Raises AutotuneError when that one is broken."""
    for store in stores(profiles):
        for path in sorted(store.glob(f"*-{device.fingerprint}/{file_stem(wanted.label)}.toml")):
            return read_for(path, device, wanted), path
    return None


def file_stem(workload: str) -> str:
    """A workload's name as a file or a folder may be called: without slashes and colons."""
    return re.sub(r"[^\w.-]+", "-", workload)


def all_profiles(profiles: Path | None = None) -> list[Path]:
    """Every profile file of every store, in reading order, each once."""
    paths = [path.resolve() for store in stores(profiles) for path in sorted(store.glob("*/*.toml"))]
    return list(dict.fromkeys(paths))


def read_for(path: Path, device: Device, wanted: Wanted) -> Profile:
    """A profile for this device and what is wanted. Raises AutotuneError when it is for others."""
    profile = read_profile(path)
    again = f"autotune search --model {shlex.quote(wanted.name)}"
    if profile.device.fingerprint != device.fingerprint:
        raise AutotuneError(
            f"profile {path} is for another device ({profile.device.name}, {profile.device.fingerprint}; this is "
            f"{device.name}, {device.fingerprint}); search here: {again}"
        )
    found = profile.workload
    if found.name != wanted.label:
        raise AutotuneError(f"profile {path} is for the workload {found.name}, not for {wanted.label}")
    if found.global_batch != wanted.global_batch:
        raise AutotuneError(
            f"profile {path} is for a global batch of {found.global_batch}, {wanted.label}'s recipe has "
            f"{wanted.global_batch}; search again: {again}"
        )
    if None not in (found.num_parameters, wanted.num_parameters) and found.num_parameters != wanted.num_parameters:
        raise AutotuneError(
            f"profile {path} is for a model of {found.num_parameters:,} parameters, {wanted.label}'s has "
            f"{wanted.num_parameters:,}; search again: {again}"
        )
    return profile


def caveat(profile: Profile, device: Device) -> str | None:
    """What to bear in mind where an accelerator's profile was measured beside another host; None where it was not."""
    if profile.device.num_cores == device.num_cores:
        return None
    return (
        f"the profile was measured on a host with {profile.device.num_cores} cores, this one has {device.num_cores}: "
        f"loading and launching may take another share; search again to know"
    )


def latest_profile(device: Device, profiles: Path | None = None) -> tuple[Profile, Path] | None:
    """This device's that was saved last, whatever it is for; broken ones are passed over. None where there is none."""
    found = []
    for path in all_profiles(profiles):
        with contextlib.suppress(AutotuneError):
            profile = read_profile(path)
            if profile.device.fingerprint == device.fingerprint:
                found.append((profile, path))
    return max(found, key=lambda one: one[0].created, default=None)


def nearest_profile(device: Device, label: str, profiles: Path | None = None) -> Profile | None:
    """A profile to start a search from: this device's own, else its for another workload, else another device's of the
    kind, those of the same workload and architecture first. None where there is none; broken ones are passed over."""
    found = []
    for path in all_profiles(profiles):
        with contextlib.suppress(AutotuneError):
            profile = read_profile(path)
            if profile.device.kind == device.kind:
                found.append(profile)

    def distance(profile: Profile) -> tuple[bool, bool, bool]:
        its = profile.device
        is_other = profile.workload.name != label
        return its.fingerprint != device.fingerprint, is_other, its.architecture != device.architecture

    return min(found, key=distance, default=None)


def tested_profile(path: Path, device: Device, wanted: Wanted) -> Profile | None:
    """The profile for this that is there, where it has passed its last test."""
    try:
        found = read_for(path, device, wanted)
    except AutotuneError:
        return None
    return found if found.evidence.soak_steps > 0 else None


def profile_of_another(path: Path, device: Device, wanted: Wanted) -> Profile | None:
    """The profile that is there, where it is for another workload of that name, as of a script in another folder."""
    try:
        found = read_profile(path)
    except AutotuneError:
        return None
    with contextlib.suppress(AutotuneError):
        read_for(path, device, wanted)
        return None
    return found


def check_writable(path: Path, option: str = "--profiles") -> None:
    """Raises AutotuneError when a file could not be written at ``path``; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="."):
            pass
    except OSError as exc:
        raise AutotuneError(
            f"nothing can be saved in {path.parent}: {exc.strerror or exc}; name another place with {option}"
        ) from exc


@contextlib.contextmanager
def device_lock(device: Device) -> Iterator[None]:
    """Held while a search measures: two at once on one device would spoil each other's timings. Hosts that share a
    cache folder have locks of their own.

    Raises AutotuneError when another process holds it; a lock whose holder died is free.
    """
    lock = filelock.FileLock(cache_dir() / "locks" / f"{device.fingerprint}-{file_stem(platform.node())}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except OSError as exc:
        if isinstance(exc, filelock.Timeout):
            raise AutotuneError(
                "another search is measuring on this device, and two at once would spoil each other's timings; wait "
                "for it"
            ) from None
        raise AutotuneError(
            f"the cache folder {cache_dir()} cannot be written: {exc.strerror or exc}; name another with AUTOTUNE_CACHE"
        ) from exc
    try:
        yield
    finally:
        lock.release()
