"""`qplug quantize`: from full precision into any layout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import (
    Folder,
    check_bits,
    format_name,
    group_size,
    json_option,
    max_shard_option,
    new_folder,
)
from .signals import leaving

if TYPE_CHECKING:
    from qplug_converters.format import Format

    from ..quantizers import QuantizeReport

MOST_NAMES = 3


@click.command()
@click.argument("src", type=Folder())
@click.argument("dst", type=Folder())
@click.option(
    "--to", "target", callback=format_name, metavar="FORMAT", required=True, help="Format of DST."
)
@click.option(
    "--method",
    type=click.Choice(["rtn"]),
    default="rtn",
    show_default=True,
    help="rtn: round to nearest.",
)
@click.option("--bits", type=click.IntRange(1, 8), default=4, show_default=True)
@click.option(
    "--group-size",
    type=int,
    callback=group_size,
    default=128,
    show_default=True,
    help="-1: one per row.",
)
@click.option("--sym/--asym", "sym", default=False, help="Zeros at the midpoint, or per group.")
@click.option(
    "--allow-dense",
    is_flag=True,
    help="Leave dense what the group size does not fit, however much.",
)
@max_shard_option
@json_option
def command(
    src: Path,
    dst: Path,
    target: Format,
    method: str,
    bits: int,
    group_size: int,
    sym: bool,
    allow_dense: bool,
    max_shard: int,
    as_json: bool,
) -> None:
    """Quantize the full-precision checkpoint in SRC into the new folder DST.

    Heads, routers and towers for images and sound stay dense, and so does a linear whose shape
    the target cannot hold.
    """
    if target.capacity is None:
        raise click.BadParameter(f"{target.name} holds no codes", param_hint="--to")
    check_bits(target, bits)
    if bits == 1 and sym:
        raise click.BadParameter("1 bit cannot be symmetric", param_hint="--bits")
    dst = new_folder(src, dst)

    from qplug_converters.checkpoint import open_checkpoint

    from ..quantizers import QUANTIZERS, quantize

    checkpoint = open_checkpoint(src)
    started = time.perf_counter()
    with leaving(dst), render.progress("quantize") as progress:
        report = quantize(
            checkpoint,
            dst,
            target,
            QUANTIZERS[method],
            bits=bits,
            group_size=group_size,
            sym=sym,
            allow_dense=allow_dense,
            progress=progress,
            max_shard=max_shard,
        )
    if as_json:
        render.data(_answer(report, dst, target.name, method, started))
    else:
        _show(report, dst, method, started)


def _answer(
    report: QuantizeReport, dst: Path, target: str, method: str, started: float
) -> dict[str, Any]:
    """Return a report as JSON values."""
    return {
        "output": str(dst),
        "format": target,
        "method": method,
        "scheme": report.scheme,
        "linears": len(report.errors),
        "left_dense": [
            {"kind": left.kind, "reason": left.reason, "linears": list(left.linears)}
            for left in report.dense
        ],
        "relative_error": round(report.relative_error, 6),
        "worst": {"module": report.worst, "relative_error": round(report.errors[report.worst], 6)},
        "seconds": round(time.perf_counter() - started, 3),
    }


def _show(report: QuantizeReport, dst: Path, method: str, started: float) -> None:
    """Print a report, and warn of what the target could not hold."""
    kinds = [f"{len(left.linears)} {left.kind}" for left in report.dense]
    render.record(
        {
            "wrote": dst,
            "linears": f"{len(report.errors)} x {report.scheme} by {method}",
            "left dense": ", ".join(kinds) or "none",
            "relative error": f"{report.relative_error:.4f} "
            f"(worst {report.errors[report.worst]:.4f}, {report.worst})",
            "time": render.seconds(started),
        }
    )
    for left in report.dense:
        if left.kind in ("shapes", "dtypes"):
            names = ", ".join(left.linears[:MOST_NAMES])
            more = len(left.linears) - MOST_NAMES
            names += f" and {more} more" if more > 0 else ""
            render.warn(f"{len(left.linears)} linears left dense: {left.reason} ({names})")
