"""The errors a user can mend. Anything else that escapes is a bug.

An error's text states the parameter, the rule, the value and the next step, on one line.
"""

import errno

_OF_THE_SYSTEM = ("ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "EIO", "ENOMEM", "EAGAIN")


class AutotuneError(Exception):
    """An expected failure: one clear line for the user, exit status 1."""

    exit_code = 1


class UsageError(AutotuneError):
    """The call itself is wrong (an option, a name, a size): exit status 2."""

    exit_code = 2


class InterruptedSearchError(AutotuneError):
    """The user interrupted before there was anything to keep: exit status 130."""

    exit_code = 130


def words_of(error: Exception) -> str:
    """An error of the user's code in a line: its kind, the first line of its text, and where it was raised."""
    return f"{line_of(error)}{_place_of(error)}"


def is_of_the_system(error: Exception) -> bool:
    """Whether the machine has no more of something, space, memory, files or processes: no bug of ours."""
    is_known = isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _OF_THE_SYSTEM
    return is_known or str(error) == "can't start new thread"


def line_of(error: Exception) -> str:
    """An error's kind and the first line of its text; of what a loader process has sent, a traceback, the last."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if "in DataLoader worker" in lines[0] else f"{type(error).__name__}: {lines[0]}"


def _place_of(error: BaseException) -> str:
    """`` (my_train.py:12)``: where the user's code failed, for the end of an error's line; nothing where it is none.

    That is the innermost line of the first file on the way to the error that is neither autotune's nor the import
    machinery's: what a library did with that line is not the user's to mend.
    """
    import os
    import traceback
    from pathlib import Path

    own = (f"{Path(__file__).parent}{os.sep}", "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    frames = [frame for frame in frames if "importlib" not in Path(frame.filename).parts]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f" ({Path(frames[0].filename).name}:{lines[-1]})" if lines else ""


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean 'imdb'?`` for a near miss, else the names that there are. For the end of an error's line."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


def at_fault(error: Exception) -> tuple[str, str]:
    """Where msgspec found data at fault (``strategy.micro_batch``; nothing at the top), and what is wrong with it."""
    message, mark, where = str(error).rpartition(" - at ")
    if not mark:
        message, where = where, ""
    return where.replace("`", "").replace("$", "").lstrip("."), message.replace("Object contains", "there is an")


def kind_of(value: object) -> str:
    """What a value is, for an error's line: ``(Tensor, dict)``, ``(dict, dict, … 16 in all)``, ``str``."""
    if isinstance(value, list | tuple):
        names = [type(part).__name__ for part in value]
        return f"({', '.join(names if len(names) <= 4 else [*names[:2], f'… {len(names)} in all'])})"
    return type(value).__name__
