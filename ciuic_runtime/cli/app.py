"""The command itself: its name, how it ends, and what is on which stream (results on stdout, all else on stderr).
Knows exit codes; commands add themselves to `app`."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ciuic_runtime.cli.output import fail
from ciuic_runtime.devices.errors import CiuicError

log = logging.getLogger("ciuic")

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


# In which a new user needs them.
ORDER = (
    "devices", "doctor", "plan", "run", "chat", "serve", "pack", "calibrate", "bench", "score", "replay", "launch",
    "jobs", "logs", "stop", "replan", "dashboard",
)  # fmt: skip


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan, run and inspect DeepSeek models on whatever hardware there is.",
)


class Stopped(CiuicError):
    """Ctrl-C came before there was anything to show; the message says how to go on."""

    exit_code = EXIT_INTERRUPTED


class Interrupted(Exception):
    """Ctrl-C came, and what there was has been shown."""


def _version(asked: bool) -> None:
    if asked:
        from ciuic_runtime import __version__

        print(f"ciuic {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; turns every failure into one line (or `{"error": ...}` with --json) and its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _set_up_streams()
    sys.exit(exit_code(arguments))


def exit_code(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="ciuic", standalone_mode=False)
        sys.stdout.flush()
    except Interrupted:
        return EXIT_INTERRUPTED
    except (KeyboardInterrupt, typer.Abort) as error:
        return fail(as_json, error, "interrupted", EXIT_INTERRUPTED)
    except CiuicError as error:
        return fail(as_json, error, str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; the last flush stays quiet
        return EXIT_FAILED
    except Exception as error:
        if explain := getattr(error, "format_message", None):  # typer's own: a wrong option or argument
            text = explain()  # empty where only the help was asked for, which is on stdout by now
            return fail(as_json, error, text and f"{text.rstrip('.')}; see ciuic --help", EXIT_BAD_INPUT)
        if os.environ.get("CIUIC_DEBUG"):
            raise
        if isinstance(error, OSError):
            return fail(as_json, error, str(error), EXIT_FAILED)
        text = f"{type(error).__name__}: {error} (a mistake of ours; CIUIC_DEBUG=1 shows where)"
        return fail(as_json, error, text, EXIT_FAILED)
    return code if isinstance(code, int) else 0


def _set_up_streams() -> None:
    """Text that the terminal cannot show becomes '?' there, and messages go nowhere where there is no stderr."""
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ciuic: %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    level = os.environ.get("CIUIC_LOG", "WARNING").upper()
    log.setLevel(level if level in logging.getLevelNamesMapping() else "WARNING")
