"""`qplug doctor`: what works in this environment, and why something does not."""

from __future__ import annotations

import click

from . import render
from .options import json_option


@click.command()
@json_option
def command(as_json: bool) -> int:
    """Show versions, engines, registrations and the kernels that would run."""
    from ..doctor import examine

    found = examine(None if as_json else render.say)
    if as_json:
        render.data(found.as_json())
        return 1 if found.problems else 0
    plugins = {f"in {name}": text for name, text in found.engines.items()}
    render.record(found.versions | found.machine | plugins)
    render.line()
    render.table(
        ("weights", "activations", "kernel", "why"),
        [(k["weights"], k["activations"], k["kernel"], k["why"]) for k in found.kernels],
    )
    for problem in found.problems:
        render.warn(problem)
    return 1 if found.problems else 0
