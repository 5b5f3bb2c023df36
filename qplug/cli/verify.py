"""`qplug verify`: whether two checkpoints hold the same weights, from their bytes alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import render
from .options import json_option, zero_rule_option
from .source import Place, open_source

if TYPE_CHECKING:
    from qplug_converters.verify import Certificate

    from ..repository import Repository

MOST_LINES = 20


@click.command()
@click.argument("a", type=Place())
@click.argument("b", type=Place())
@click.option(
    "--allow",
    type=click.Choice(["exact", "rounded"]),
    default="exact",
    show_default=True,
    help="`rounded`: equal once rounded to the narrower dtype is good enough.",
)
@zero_rule_option
@json_option
def command(
    a: Path | Repository, b: Path | Repository, allow: str, zero_rule: str | None, as_json: bool
) -> int:
    """Compare checkpoints A and B, in whatever layouts; exit 3 if they differ.

    Either is a folder, or owner/name[@revision] on the Hub, fetched into the Hub's cache.
    --zero-rule is about A: what `qplug convert --zero-rule` took for its source.
    """
    from qplug_converters.plan import Verdict
    from qplug_converters.verify import verify

    started = time.perf_counter()
    first, second = open_source(a, zero_rule), open_source(b)
    for side in (first, second):
        side.source.need([shard.name for shard in side.shards])
    with render.progress("verify") as progress:
        proof = verify(first, second, progress=progress)
    if as_json:
        render.data(proof.as_json())
    else:
        show(proof, started)
    good = proof.verdict <= Verdict[allow.upper()] and not proof.problems
    return 0 if good else 3


def show(proof: Certificate, started: float) -> None:
    """Print a certificate: the differences first, the answer last."""
    different = [r for r in proof.linears if r.differing]
    if different:
        render.table(
            ("linear", "verdict", "weights that differ", "max", "mean"),
            [
                (r.module, r.verdict.name, r.differing, f"{r.max_abs:.3g}", f"{r.mean_abs:.3g}")
                for r in different[:MOST_LINES]
            ],
        )
        if len(different) > MOST_LINES:
            render.line(f"and {len(different) - MOST_LINES} more linears")
    for problem in proof.problems[:MOST_LINES]:
        render.line(f"differs: {problem}")
    if len(proof.problems) > MOST_LINES:
        render.line(f"and {len(proof.problems) - MOST_LINES} more differences")
    for note in proof.notes:
        render.warn(note)
    what = (
        f"{len(proof.linears)} linears, {proof.weights:,} weights, "
        f"{proof.tensors_equal} other tensors"
    )
    if proof.same:
        render.line(f"EXACT: {what}: every weight bit-equal ({render.seconds(started)})")
    else:
        render.line(
            f"{proof.verdict.name}: {what}: {len(different)} linears and "
            f"{len(proof.problems)} other things differ ({render.seconds(started)})"
        )
