"""The command line: one thin file a command, one printer, exit codes in one place.

Exit codes: 0 done and as promised; 1 bad input or environment; 2 wrong usage; 3 the answer is no;
130 interrupted, 143 terminated.
Commands import their work inside the function, so that `--help` stays fast and torch is loaded
only by what needs it.
"""

from __future__ import annotations

import importlib
import io
import signal
import sys
from typing import Any

import click

from . import render
from .signals import Interrupted, Signals

COMMANDS = ("inspect", "convert", "verify", "push", "quantize", "formats", "doctor")


class _Commands(click.Group):
    """Commands by name, each in its own module, loaded when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"{__name__}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qplug")
def group() -> None:
    """Convert quantized checkpoints between layouts, and prove what changed."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names may hold what the terminal's encoding has not; stderr does this by itself.
        sys.stdout.reconfigure(errors="backslashreplace")
    signals = Signals()
    signals.watch()
    try:
        code = _run(argv)
    except BaseException as error:
        # An interrupt in the middle of an import or a callback can come out as something else.
        if not signals.met and not isinstance(error, KeyboardInterrupt | click.Abort):
            raise
        known: BaseException | None = error
        while known is not None and not isinstance(known, Interrupted):
            known = known.__cause__ or known.__context__
        render.warn("interrupted" if known is None else f"interrupted; {known}")
        code = 128 + (signals.met or signal.SIGINT)
    finally:
        if argv is None:
            signals.ignore()  # all is said and done; only Python's own end is left
        else:
            signals.forget()
    sys.exit(code)


def _run(argv: list[str] | None) -> int:
    """Run the command line and return its code."""
    from qplug_converters.errors import QplugError

    as_json = "--json" in (sys.argv[1:] if argv is None else argv)
    try:
        result: Any = group.main(args=argv, prog_name="qplug", standalone_mode=False)
    except QplugError as error:
        render.error(error, as_json=as_json)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        if as_json:
            wrong = QplugError(error.format_message(), "the command line", fix="see --help")
            render.data({"error": wrong.as_json()})
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return result if isinstance(result, int) else 0
