"""The device families, in order of preference. Nothing here touches a device until it is asked to."""

from autotune.backends import cpu, cuda, fake, mps
from autotune.backends.base import Backend
from autotune.errors import UsageError, nearest

# The CPU is always there, so what stands after it is found by name only.
_BACKENDS: dict[str, Backend] = {"cuda": cuda, "mps": mps, "cpu": cpu, "fake": fake}


def names() -> tuple[str, ...]:
    """Every backend's name, in order of preference."""
    return tuple(_BACKENDS)


def get(name: str) -> Backend:
    """The backend of that name, whether this machine has such a device or not. Raises UsageError."""
    if name not in _BACKENDS:
        raise UsageError(f"no device is called {name!r}{nearest(name, list(_BACKENDS))}")
    return _BACKENDS[name]


def find() -> Backend:
    """The first backend whose device this machine has."""
    return next(backend for backend in _BACKENDS.values() if backend.unavailable() is None)
