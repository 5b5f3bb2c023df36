"""The only printer: data to stdout, talk to stderr, colour only where somebody looks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from qplug_converters.errors import MOST_SHOWN, one_line

if TYPE_CHECKING:
    from qplug_converters.errors import QplugError
    from qplug_converters.execute import Progress


def _echo(text: str, *, err: bool = False) -> None:
    # click leaves colour out where nobody looks, and does not know NO_COLOR (no-color.org).
    click.echo(text, err=err, color=False if os.environ.get("NO_COLOR") else None)


def data(value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout, in ASCII: names in a file need not be proper text."""
    _echo(json.dumps(value, indent=2))


def line(text: str = "") -> None:
    """Print one line of data to stdout."""
    _echo(one_line(text))


def record(pairs: Mapping[str, object]) -> None:
    """Print names and values, aligned."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        _echo(f"{click.style(name.ljust(width), dim=True)}  {one_line(str(value))}")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with aligned columns."""
    cells = [[one_line(str(c)) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(head), *cells]) for i in range(len(head))]
    text = "  ".join(h.ljust(w) for h, w in zip(head, widths, strict=True)).rstrip()
    _echo(click.style(text, bold=True))
    for row in cells:
        _echo("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def say(text: str) -> None:
    """Say something on stderr."""
    _echo(one_line(text), err=True)


def warn(text: str) -> None:
    """Warn on stderr."""
    _echo(f"{click.style('warning:', fg='yellow')} {one_line(text)}", err=True)


def hint(text: str) -> None:
    """Say on stderr what to do."""
    _echo(f"{click.style('hint:', fg='cyan')} {one_line(text)}", err=True)


def error(problem: QplugError, *, as_json: bool = False) -> None:
    """Print an error: one line and a hint, further problems of the same checkpoint after it."""
    if as_json:
        data({"error": problem.as_json()})
    shown = [problem, *problem.others][:MOST_SHOWN]
    for one in shown:
        alone = str(one).removesuffix(f" (and {len(one.others)} more)")
        _echo(f"{click.style('error:', fg='red', bold=True)} {alone}", err=True)
    left = 1 + len(problem.others) - len(shown)
    if left:
        _echo(f"       and {left} more problems", err=True)
    for fix in dict.fromkeys(one.fix for one in shown if one.fix):
        hint(fix)


@contextmanager
def progress(title: str) -> Iterator[Progress | None]:
    """Show a bar on stderr while the body runs; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, what="")
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, what=escape(one_line(what))
        )


def seconds(since: float) -> str:
    """Return the time since `since` (of `time.perf_counter`), e.g. `1.3 s`."""
    return f"{time.perf_counter() - since:.1f} s"


def size(nbytes: int) -> str:
    """Return e.g. `114.9 MB`."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
