"""The command line: one file per verb, loaded when it is called. Here are the entry point and the error handler.

Exit status: 0 ok, 1 expected failure, 2 usage, 3 bug, 130 interrupted. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import os
import signal
import sys

import click

from autotune import __version__
from autotune.errors import AutotuneError, is_of_the_system, nearest

_VERBS = {
    "probe": ("autotune.cli.probe", "What this device can do, each line verified by running it."),
    "search": ("autotune.cli.search", "Search the fastest settings on this device and save them as a profile."),
    "train": ("autotune.cli.train", "Train with this device's profile."),
    "study": ("autotune.cli.study", "Compare techniques at several batch sizes: memory, speed, quality."),
    "report": ("autotune.cli.report", "One HTML page of a search, a study or training runs."),
    "compare": ("autotune.cli.compare", "Two training runs, profiles or studies side by side."),
    "profiles": ("autotune.cli.profiles", "List, show, verify and export profiles."),
}


class _Verbs(click.Group):
    """Verbs whose modules, and with them torch, are imported only when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            raise click.UsageError(f"no command is called {cmd_name!r}{nearest(cmd_name, list(_VERBS))}")
        command: click.Command = importlib.import_module(_VERBS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in _VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="autotune")
def cli() -> None:
    """The same training, faster: measures this device, searches the training settings that change speed and memory
    but not the training, and saves the best as a profile."""


def main() -> None:
    """Runs the command line and exits with its status. What ends jobs and terminals, SIGTERM and SIGHUP, is Ctrl-C to
    it; characters that the terminal lacks are question marks."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, functools.partial(_as_ctrl_c, os.getpid()))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    status = run(sys.argv[1:])
    gc.freeze()  # Python would look through all that torch has made on its way out, for half a second
    sys.exit(status)


def _as_ctrl_c(owner: int, number: int, _: object) -> None:
    """Once: who ends a job often says so again, while what was found is saved."""
    if os.getpid() != owner:
        os._exit(128 + number)
    signal.signal(number, signal.SIG_IGN)
    os.kill(owner, signal.SIGINT)  # which is deferred where an interrupt would be


def run(arguments: list[str]) -> int:
    """Runs the command line; returns its exit status."""
    try:
        result = cli.main(arguments, prog_name="autotune", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return _say("interrupted", 130)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return 2
    except click.ClickException as exc:
        return _say(exc.format_message(), 2)
    except AutotuneError as exc:
        return _say(str(exc), exc.exit_code)
    except BrokenPipeError:  # the reader (head, less) has gone
        _give_output_up()
        return 1
    except Exception as exc:  # noqa: BLE001 - the one place where a bug is told from what the user can mend
        if is_of_the_system(exc):
            _give_output_up()
            return _say(f"the system refuses what it is asked for: {exc}", 1)

        import traceback

        traceback.print_exc()
        return _say("this is a bug in autotune; please report it with the lines above", 3)


def _give_output_up() -> None:
    """Where it cannot be written, Python would complain once more when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or no file
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        click.echo(f"autotune: {' '.join(message.split())}", err=True)
    return status
