"""Options that several commands share."""

from __future__ import annotations

import re

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")


def parse_size(text: str) -> int:
    """Read `5GB`, `500MB` or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", text)
    if not found or float(found[1]) <= 0:
        raise click.BadParameter(f"{text!r} is no size; write e.g. 5GB", param_hint="size")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))
