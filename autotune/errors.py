"""The errors a user can mend. Anything else that escapes is a bug.

An error's text states the parameter, the rule, the value and the next step, on one line.
"""


class AutotuneError(Exception):
    """An expected failure: one clear line for the user, exit status 1."""

    exit_code = 1


class UsageError(AutotuneError):
    """The call itself is wrong (an option, a name, a size): exit status 2."""

    exit_code = 2


class InterruptedSearchError(AutotuneError):
    """The user interrupted before there was anything to keep: exit status 130."""

    exit_code = 130


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean 'imdb'?`` for a near miss, else the names that there are. For the end of an error's line."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"
