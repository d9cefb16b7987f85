"""The built-in workloads by name: prepared once, opened in any process."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from autotune.errors import UsageError, nearest, words_of
from autotune.store import Wanted
from autotune.workloads import cifar10, imdb, lm
from autotune.workloads.base import Recipe, Workload, WorkloadRef
from autotune.workloads.custom import Custom
from autotune.workloads.named import hugging_face, timm_model
from autotune.workloads.resized import Resized


class WorkloadModule(Protocol):
    """What a module of this package provides."""

    @property
    def RECIPE(self) -> Recipe:  # noqa: N802 - as modules name it
        """The workload's recipe."""

    def prepare(self, data: Path | None, *, limit: int | None, on_progress: Callable[[str], None]) -> WorkloadRef:
        """Makes the data ready on disk, reporting each stage."""

    def open_workload(self, ref: WorkloadRef) -> Workload:
        """The prepared workload, in milliseconds."""


REGISTRY: dict[str, WorkloadModule] = {"imdb": imdb, "lm": lm.SMALL, "lm-base": lm.BASE, "cifar10": cifar10}
LIBRARIES: dict[str, Callable[[str], Any]] = {"hf": hugging_face, "timm": timm_model}


def get(name: str) -> WorkloadModule:
    """The built-in workload of that name, ``imdb``, or ``imdb@64`` for another global batch; a library's model:
    ``hf:NAME`` or ``timm:NAME`` (workloads/named.py); or the user's own: ``my_train.py:workload`` or
    ``package.module:workload``.

    What the user's name stands for is a function (workloads/custom.py), or provides what a workload module does. Raises
    UsageError with the nearest name, or with what went wrong on the way to it.
    """
    library, _, model_name = name.partition(":")
    if library in LIBRARIES:
        return _of_library(library, model_name)
    place, colon, attribute = name.rpartition(":")
    if not colon:
        if resized := _resized(name):
            return resized
        if name not in REGISTRY:
            if name.endswith(".py"):
                raise UsageError(f"name the function in {name} that gives the workload: --model {name}:FUNCTION")
            others = " (your own model: FILE.py:FUNCTION, a library's: hf:NAME or timm:NAME)"
            raise UsageError(f"no workload is called {name!r}{nearest(name, list(REGISTRY))}{others}")
        return REGISTRY[name]
    is_file = place.endswith(".py")
    path = _path_of(place)
    try:
        module = _module_of(path) if is_file else _imported(place)
        found = getattr(module, attribute)
    except AttributeError as exc:
        own = [known for known, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        names = [known for known in own if not known.startswith("_")]
        raise UsageError(f"{place} has no {attribute!r}{nearest(attribute, names)}") from exc
    except SystemExit as exc:
        raise UsageError(
            f"{place} ends this process when it is imported: put what reads its arguments, and what trains, under "
            'if __name__ == "__main__"'
        ) from exc
    except Exception as exc:
        raise UsageError(f"no workload can be imported as {name!r}: {words_of(exc)}") from exc
    if hasattr(found, "open_workload"):
        return cast("WorkloadModule", found)
    spec = f"{path}:{attribute}" if is_file else name
    return _of_function(spec, label(name), found) if inspect.isfunction(found) else Custom(spec, label(name), found)


@functools.cache  # a process asks for a workload more than once, and what makes it may take long
def _of_function(spec: str, name: str, function: Callable[[], Any]) -> WorkloadModule:
    return Custom(spec, name, function)


@functools.cache
def _of_library(library: str, model_name: str) -> WorkloadModule:
    name = f"{library}:{model_name}"
    return Custom(name, name, functools.partial(LIBRARIES[library], model_name))


def _resized(name: str) -> WorkloadModule | None:
    """What ``imdb@64`` stands for; None for names of another form. Raises UsageError for a batch that is none."""
    plain, mark, size = name.partition("@")
    if not mark or plain not in REGISTRY:
        return None
    if not re.fullmatch("[1-9][0-9]{0,4}", size):
        raise UsageError(f"{name}: behind the @ comes the global batch, samples from 1 to 99,999")
    module = REGISTRY[plain]
    return module if int(size) == module.RECIPE.global_batch else Resized(name, module, int(size))


def label(name: str) -> str:
    """What a workload is called in profiles: a file's name does not depend on the folder it is named from, and
    ``imdb@32`` is imdb, whose recipe has that batch."""
    plain = name.partition("@")[0]
    if plain in REGISTRY and _resized(name) is REGISTRY[plain]:
        return plain
    place, colon, attribute = name.rpartition(":")
    return f"{Path(place).name}:{attribute}" if colon and place.endswith(".py") else name


def wanted(name: str) -> Wanted:
    """What a profile for the workload has to be for. Raises UsageError as ``get`` does."""
    module = get(name)
    return Wanted(name, label(name), module.RECIPE.global_batch, getattr(module, "num_parameters", None))


_left: dict[Path, Path] = {}
"""Working folders that scripts went to when they were imported, and those that they left."""


def _path_of(place: str) -> Path:
    """Where a script lies, as seen from the working folder that the command was given in."""
    folder = Path.cwd()
    return (_left.get(folder, folder) / place).resolve()


def _imported(name: str) -> ModuleType:
    """A module that is installed, or else lies in the working folder."""
    _put_last(Path.cwd())
    return importlib.import_module(name)


def _put_last(folder: Path) -> None:
    """Modules of a folder are found, behind all others of their names."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _module_of(path: Path) -> ModuleType:
    """The script as a module, once in a process; it may import what lies beside it, now and later. ``__main__`` parts
    do not run."""
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    arguments, sys.argv = sys.argv, [str(path)]  # ours are not its
    folder = Path.cwd()
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    finally:
        sys.argv = arguments
        if Path.cwd() != folder:
            _left[Path.cwd()] = _left.get(folder, folder)
        sys.path.remove(str(path.parent))
        _put_last(path.parent)
    return module


def look(ref: WorkloadRef, on_progress: Callable[[str], None]) -> WorkloadRef:
    """What trials open: the prepared workload, of whose data some samples were read, where it is the user's own. Raises
    UsageError for data that cannot be read."""
    module = get(ref.name)
    return module.look(ref, on_progress) if isinstance(module, Custom) else ref


def open_workload(ref: WorkloadRef) -> Workload:
    """A prepared workload, opened in this process."""
    return get(ref.name).open_workload(ref)
