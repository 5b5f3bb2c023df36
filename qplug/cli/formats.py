"""`qplug formats`: what qplug reads and writes."""

from __future__ import annotations

import click

from . import render
from .options import json_option


@click.command()
@click.option(
    "--matrix", "pairs", is_flag=True, help="What becomes of each format in each other one."
)
@json_option
def command(pairs: bool, as_json: bool) -> None:
    """List the formats; every one answers to NAME and NAME-layout."""
    from qplug_converters.formats import FORMATS

    if pairs:
        _matrix(as_json)
        return
    if as_json:
        render.data(
            {
                f.name: {
                    "aliases": list(f.aliases),
                    "title": f.title,
                    "reads": f.read is not None,
                    "writes": True,
                    "bits": list(f.capacity.bits) if f.capacity else [],
                    "act_order": bool(f.capacity and f.capacity.act_order),
                    "ragged": bool(f.capacity and f.capacity.ragged),
                }
                for f in FORMATS
            }
        )
        return
    rows = []
    for f in FORMATS:
        holds = f.capacity
        bits = ", ".join(map(str, holds.bits)) if holds else "-"
        if holds and len(holds.bits) == 8:
            bits = "1 to 8"
        rows.append(
            (
                f.name,
                ", ".join(f.aliases),
                "read, write" if f.read else "write",
                bits,
                "yes" if holds and holds.act_order else "no",
                f.title,
            )
        )
    render.table(("format", "also", "can", "bits", "act order", ""), rows)


def _matrix(as_json: bool) -> None:
    """Print what happens to linears of each format in each other one."""
    from qplug_converters.matrix import grid, matrix

    found = matrix()
    if as_json:
        cells = [
            {
                "from": source,
                "to": target,
                "verdicts": {verdict.name: names for verdict, names in cell.items()},
            }
            for (source, target), cell in found.items()
        ]
        render.data({"pairs": cells})
        return
    heads, rows = grid()
    render.table(tuple(heads), rows)
    render.say(
        "the usual linear, then the worst of others: C copied, E exact, R rounded, Q requantized "
        "(needs --allow), I impossible; which others: --json, or docs/matrix.md"
    )
