"""Options that several commands share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qplug_converters.format import Format

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")


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


def parse_size(text: str) -> int:
    """Read `5GB`, `500MB` or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", text)
    if not found or float(found[1]) <= 0:
        raise click.BadParameter(f"{text!r} is no size; write e.g. 5GB", param_hint="size")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))
