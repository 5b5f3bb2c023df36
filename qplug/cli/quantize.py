"""`qplug quantize`: from full precision into any layout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import format_name, group_size, json_option, parse_size

if TYPE_CHECKING:
    from qplug_converters.format import Format


@click.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
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
@click.option("--max-shard-size", default="5GB", show_default=True, help="Cut shards at this size.")
@json_option
def command(
    src: Path,
    dst: Path,
    target: Format,
    method: str,
    bits: int,
    group_size: int,
    sym: bool,
    max_shard_size: str,
    as_json: bool,
) -> None:
    """Quantize the full-precision checkpoint in SRC into the new folder DST."""
    from qplug_converters.checkpoint import open_checkpoint

    from ..quantizers import QUANTIZERS, quantize

    checkpoint = open_checkpoint(src)
    started = time.perf_counter()
    with render.progress("quantize") as progress:
        report = quantize(
            checkpoint,
            dst,
            target,
            QUANTIZERS[method],
            bits=bits,
            group_size=group_size,
            sym=sym,
            progress=progress,
            max_shard=parse_size(max_shard_size),
        )
    answer: dict[str, Any] = {
        "output": str(dst),
        "format": target.name,
        "method": method,
        "scheme": report.scheme,
        "linears": len(report.errors),
        "left_dense": list(report.left_dense),
        "relative_error": round(report.relative_error, 6),
        "worst": {"module": report.worst, "relative_error": round(report.errors[report.worst], 6)},
        "seconds": round(time.perf_counter() - started, 3),
    }
    if as_json:
        render.data(answer)
        return
    render.record(
        {
            "wrote": dst,
            "linears": f"{len(report.errors)} x {report.scheme} by {method}",
            "left dense": ", ".join(report.left_dense) or "none",
            "relative error": f"{report.relative_error:.4f} "
            f"(worst {report.errors[report.worst]:.4f}, {report.worst})",
            "time": render.seconds(started),
        }
    )
