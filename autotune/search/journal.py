"""The search on disk: every trial is in the journal when it ends, so that a search that was killed goes on.

The journal is an Optuna study in a file beside the profile. One search is one study, named by all that its figures
depend on; a search that differs in any of it does not take over the trials of another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import msgspec

from autotune.errors import AutotuneError
from autotune.measurement import Trial
from autotune.strategy import Strategy

if TYPE_CHECKING:
    import optuna

MAX_STARTS = 2
"""A setting that was under way as often when the search itself died is not tried again."""
_RECORD, _FINISHED, _SPENT, _UNDER_WAY = "record", "finished", "spent_s", "under_way"


class _UnderWay(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    """The trial's."""
    strategy: Strategy
    starts: int


class Journal:
    """One search's trials: those of an earlier, unfinished run of the same search, and what this run adds."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self._close_open_trials()
        attributes = study.user_attrs
        self.spent_s = float(attributes.get(_SPENT, 0.0))
        """Seconds that the search has taken so far, all its runs together."""
        records = [trial.user_attrs[_RECORD] for trial in study.trials if _RECORD in trial.user_attrs]
        self.trials = sorted((msgspec.convert(record, Trial) for record in records), key=lambda trial: trial.number)
        """The finished trials, in order."""
        left = attributes.get(_UNDER_WAY)
        self._under_way = msgspec.convert(left, _UnderWay) if left else None
        if self._under_way and self._under_way.number < len(self.trials):
            self._under_way = None  # it has ended

    @property
    def name(self) -> str:
        """The search's, in the journal."""
        return self.study.study_name

    @property
    def interrupted(self) -> tuple[Strategy, int] | None:
        """The setting that was under way when the search died, and how often it has been started."""
        return None if self._under_way is None else (self._under_way.strategy, self._under_way.starts)

    def start(self, strategy: Strategy) -> None:
        """A trial is about to start. Raises AutotuneError where the disk does not take it, as ``record`` does."""
        before = self._under_way.starts if self._under_way and self._under_way.strategy == strategy else 0
        self._under_way = _UnderWay(number=len(self.trials), strategy=strategy, starts=before + 1)
        self.study.set_user_attr(_UNDER_WAY, msgspec.to_builtins(self._under_way))

    def stop(self) -> None:
        """The user interrupts: the trial under way is not to blame."""
        if self._under_way is not None:
            self._under_way = None
            self.study.set_user_attr(_UNDER_WAY, None)

    def record(self, trial: Trial, asked: optuna.trial.Trial, spent_s: float) -> None:
        """A trial has ended; it is on disk, and in ``trials``, when this returns."""
        asked.set_user_attr(_RECORD, msgspec.to_builtins(trial))
        self.study.set_user_attr(_SPENT, spent_s)
        self.trials.append(trial)
        self._under_way = None

    def finish(self) -> None:
        """The search is done: the next one starts anew."""
        self.study.set_user_attr(_FINISHED, True)

    def _close_open_trials(self) -> None:
        """What Optuna believes to be running or waiting is not: this is the only process that asks."""
        import optuna

        while any(trial.state == optuna.trial.TrialState.WAITING for trial in self.study.trials):
            self.study.tell(self.study.ask(), state=optuna.trial.TrialState.FAIL)
        for trial in self.study.trials:
            if trial.state == optuna.trial.TrialState.RUNNING:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


@contextlib.contextmanager
def open_journal(path: Path, identity: dict[str, Any], *, is_fresh: bool = False) -> Iterator[Journal]:
    """The journal of the search with this identity, an unfinished one's if there is one and ``is_fresh`` is not set.

    ``identity`` is all that the search's figures depend on, as plain data. Raises AutotuneError when another search
    has the file open, when it is not a journal, or when the disk does not take it.
    """
    name = hashlib.sha256(msgspec.json.encode(identity, order="deterministic")).hexdigest()[:12]
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise AutotuneError(f"another search is writing to {path}; wait for it, or name another --profiles") from None
    except OSError as exc:
        raise _not_written(path, exc) from exc
    try:
        with _quiet():
            yield Journal(_open_study(path, name, is_fresh=is_fresh))
    finally:
        lock.release()


def recorded_trials(path: Path, name: str) -> list[Trial]:
    """The trials of the search of that name in a journal, in order; none where they are not there any more."""
    import optuna

    if not name or not path.is_file():
        return []
    try:
        with _quiet():
            study = optuna.load_study(study_name=name, storage=_storage(path))
            records = [trial.user_attrs[_RECORD] for trial in study.trials if _RECORD in trial.user_attrs]
        return sorted((msgspec.convert(record, Trial) for record in records), key=lambda trial: trial.number)
    except (ValueError, KeyError, TypeError, OSError, msgspec.ValidationError):
        return []


def _open_study(path: Path, name: str, *, is_fresh: bool) -> optuna.Study:
    import optuna

    _mend(path)
    try:
        storage = _storage(path)
        known = {study.study_name: study.user_attrs for study in optuna.get_all_study_summaries(storage)}
    except (ValueError, KeyError, TypeError) as exc:
        if not is_fresh:
            raise AutotuneError(f"{path} is not a journal of autotune's; move it away, or search with --fresh") from exc
        known = {}
    is_over = is_fresh or bool(known.get(name, {}).get(_FINISHED))
    if is_over and all(attributes.get(_FINISHED) for other, attributes in known.items() if other != name):
        _truncate(path)  # nothing in it will be needed: a journal only grows otherwise
        storage = _storage(path)
    elif is_over and name in known:
        optuna.delete_study(study_name=name, storage=storage)
    return optuna.create_study(study_name=name, storage=storage, load_if_exists=True)


def _storage(path: Path) -> Any:
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    class File(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            """As Optuna's, but only what a trial found waits for the disk: a proposal takes ten lines."""
            lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            try:
                with path.open("ab") as file:
                    file.write(lines.encode())
                    if f'"{_RECORD}"' in lines:
                        file.flush()
                        os.fsync(file.fileno())
            except OSError as exc:
                raise _not_written(path, exc) from exc

    class HeldAlready:
        """The search holds a lock that dies with it; Optuna's own would outlive a kill and be waited for."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None: ...

    return JournalStorage(File(str(path), lock_obj=HeldAlready()))  # type: ignore[arg-type]


def _mend(path: Path) -> None:
    """Takes off a last line that was cut when its writer was killed: what is appended would make it unreadable."""
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("rb+") as file:
                file.truncate(len(whole))
    except OSError as exc:
        raise _not_written(path, exc) from exc


def _truncate(path: Path) -> None:
    try:
        path.write_bytes(b"")
    except OSError as exc:
        raise _not_written(path, exc) from exc


def _not_written(path: Path, exc: OSError) -> AutotuneError:
    return AutotuneError(
        f"the search's journal {path} cannot be written: {exc.strerror or exc}; free some space there, or name another "
        "folder with --profiles"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
