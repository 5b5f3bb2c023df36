"""Options that several commands share, and what is refused before any work."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qplug_converters.format import Format

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")

LARGEST = 1 << 63
"""Bytes; no file system holds a larger file."""


class Folder(click.Path):
    """A path that is not empty: `pathlib` takes "" for the working directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse the empty path."""
        if str(value) == "" or (isinstance(value, bytes) and not value):
            self.fail("an empty path", param, ctx)
        return super().convert(value, param, ctx)


def format_name(ctx: click.Context, param: click.Parameter, value: str | None) -> Format | None:
    """Find the format that a name, an alias, or either with `-layout` behind it, stands for."""
    if value is None:
        return None
    from qplug_converters import formats
    from qplug_converters.errors import QplugError

    try:
        return formats.find(value)
    except QplugError as error:
        raise click.BadParameter(f"{error.found}: choose {error.expected}") from None


def zero_rule(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse the name of a zero rule that there is not."""
    if value is not None:
        from qplug_converters.zeros import RULES

        if value not in RULES:
            raise click.BadParameter(f"no rule {value!r}: choose one of {', '.join(RULES)}")
    return value


zero_rule_option = click.option(
    "--zero-rule", metavar="RULE", callback=zero_rule, help="How GPTQ v1 zeros were stored."
)


def group_size(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """Refuse a group size that is none."""
    if value is not None and value < 1 and value != -1:
        raise click.BadParameter(f"{value} is no group size: -1 or a positive number")
    return value


def parse_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Read `5GB`, `500MB` or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", value)
    size = float(found[1]) * 1000.0 ** " KMGT".index(found[2].upper() or " ") if found else 0.0
    if not 1 <= size < LARGEST:
        shown = value if len(value) <= 40 else f"{value[:40]}…"
        raise click.BadParameter(f"{shown!r} is no size; write e.g. 5GB")
    return int(size)


max_shard_option = click.option(
    "--max-shard-size",
    "max_shard",
    default="5GB",
    show_default=True,
    callback=parse_size,
    help="Cut shards at this size.",
)


def check_bits(target: Format, bits: int) -> None:
    """Refuse bits that the target does not hold."""
    held = target.capacity.bits if target.capacity is not None else ()
    if bits not in held:
        offered = f"{', '.join(map(str, held))} bits" if held else "no codes"
        raise click.BadParameter(f"{target.name} holds {offered}, not {bits}", param_hint="--bits")


def new_folder(source: Path | None, target: Path) -> Path:
    """Return the folder to write, `x/..` taken out of it; refuse one that cannot be new.

    Raises
    ------
    QplugError
        If it exists, or lies inside the source folder, which nothing may change.
    """
    from qplug_converters.errors import QplugError

    try:
        if _goes_back(target):
            last = target.name
            target = target.resolve() if last == ".." else target.parent.resolve() / last
        if os.path.lexists(target):
            raise QplugError(
                "a file or folder that exists",
                str(target),
                "a new name",
                "remove it first, or choose another name",
            )
        real = target.parent.resolve() / target.name
        inside = source is not None and real.is_relative_to(source.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        found = (isinstance(error, OSError) and error.strerror) or "a link to itself"
        raise QplugError(found, str(target), "a new folder", "choose another place") from None
    if inside:
        raise QplugError(
            f"a place inside the source {source}",
            str(target),
            "a folder outside it",
            "the source stays as it is: choose another place",
        )
    return target


def _goes_back(path: Path) -> bool:
    """Whether a `..` follows a name, so that `mkdir` would need the folder of that name."""
    names = [part == ".." for part in path.parts]
    return True in names and False in names[: len(names) - names[::-1].index(True)]
