"""`qplug verify`: whether checkpoints hold the same weights, or what a certificate says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import json_option, zero_rule_option
from .source import Place, open_source

if TYPE_CHECKING:
    from qplug_converters.checkpoint import Checkpoint
    from qplug_converters.verify import Certificate

    from ..repository import Repository

MOST_LINES = 20


@click.command()
@click.argument("a", type=Place())
@click.argument("b", type=Place(), required=False)
@click.option(
    "--source", "source", type=Place(), help="What A was made from: check what was done, too."
)
@click.option(
    "--allow",
    type=click.Choice(["exact", "rounded"]),
    default="exact",
    show_default=True,
    help="`rounded`: equal once rounded to the narrower dtype is good enough.",
)
@click.option(
    "--deep", "deeply", is_flag=True, help="Hash the float32 weights of each linear, too."
)
@zero_rule_option
@json_option
def command(
    a: Path | Repository,
    b: Path | Repository | None,
    source: Path | Repository | None,
    allow: str,
    deeply: bool,
    zero_rule: str | None,
    as_json: bool,
) -> int:
    """Compare checkpoints A and B, in whatever layouts; exit 3 if they differ.

    Without B, check A against the certificate in it, and with --source also against what it was
    made from: every hash is computed again, and what the certificate claims is held against the
    source. Each is a folder, or owner/name[@revision] on the Hub, fetched into the Hub's cache.
    --zero-rule is about A, or about the source: what `qplug convert --zero-rule` took.
    """
    if b is not None and source is not None:
        raise click.UsageError("--source goes with one folder: A and B are compared as they are")
    if b is None:
        if allow != "exact":
            raise click.UsageError("--allow goes with two folders: the certificate says what is")
        return _against_certificate(a, source, deeply, zero_rule, as_json)
    from qplug_converters.plan import Verdict
    from qplug_converters.verify import verify

    started = time.perf_counter()
    first, second = open_source(a, zero_rule), open_source(b)
    for side in (first, second):
        side.source.need([shard.name for shard in side.shards])
    with render.progress("verify") as progress:
        proof = verify(first, second, progress=progress)
    answer = proof.as_json()
    if not as_json:
        show(proof, started)
    if deeply:
        _show_deep({"first": first, "second": second}, proof, answer, as_json)
    if as_json:
        render.data(answer)
    good = proof.verdict <= Verdict[allow.upper()] and not proof.problems
    return 0 if good else 3


def _against_certificate(
    folder: Path | Repository,
    source: Path | Repository | None,
    deeply: bool,
    zero_rule: str | None,
    as_json: bool,
) -> int:
    """Check a folder against its certificate; return the exit code."""
    from qplug_converters.check import check

    started = time.perf_counter()
    checkpoint = open_source(folder)
    before = None if source is None else open_source(source, zero_rule)
    with render.progress("verify") as progress:
        found = check(checkpoint, before, progress=progress)
    answer = found.as_json()
    if not as_json:
        for problem in found.problems[:MOST_LINES]:
            render.line(f"wrong: {problem}")
        if len(found.problems) > MOST_LINES:
            render.line(f"and {len(found.problems) - MOST_LINES} more")
        for said in found.notes:
            render.warn(said)
        what = (
            f"{found.linears} linears, {found.tensors} tensors carried along, {found.files} files"
        )
        wrong = len(found.problems)
        count = "1 thing is wrong" if wrong == 1 else f"{wrong} things are wrong"
        holds = "holds" if found.holds else f"does not hold: {count}"
        against = "" if source is None else f" and against {source}"
        render.line(
            f"the certificate ({found.verdict}) {holds}: {what}{against} "
            f"({render.seconds(started)})"
        )
    if deeply:
        sides = {"source": before, "folder": checkpoint} if before else {"folder": checkpoint}
        _show_deep(sides, found.proof, answer, as_json)
    if as_json:
        render.data(answer)
    return 0 if found.holds else 3


def _show_deep(
    checkpoints: dict[str, Checkpoint],
    proof: Certificate | None,
    answer: dict[str, Any],
    as_json: bool,
) -> None:
    """Hash the float32 weights; add them to `answer`, or print them beside the differences."""
    from qplug_converters.verify import Side, deep

    hashes = {}
    for name, checkpoint in checkpoints.items():
        with render.progress("weights") as progress:
            hashes[name] = deep(Side.of(checkpoint), progress=progress)
    answer["weights_sha256"] = hashes
    if as_json:
        return
    reports = {r.module: r for r in proof.linears} if proof is not None else {}
    modules = dict.fromkeys(m for some in hashes.values() for m in some)
    rows = []
    for module in modules:
        report = reports.get(module)
        apart = (f"{report.max_abs:.3g}", f"{report.mean_abs:.3g}") if report else ("", "")
        rows.append((module, *apart, *(some.get(module, "")[:16] for some in hashes.values())))
    render.table(("linear", "max", "mean", *(f"sha256 of {name}" for name in hashes)), rows)


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
