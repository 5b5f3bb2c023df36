"""`qplug inspect`: what a checkpoint holds, from headers and config alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import Folder, format_name, json_option, zero_rule_option

if TYPE_CHECKING:
    from qplug_converters.format import Format


@click.command()
@click.argument("src", type=Folder())
@click.option(
    "--from",
    "source",
    callback=format_name,
    metavar="FORMAT",
    help="Format of SRC (default: detected).",
)
@click.option("--zeros", is_flag=True, help="Read the zeros too: symmetric or not, which rule.")
@zero_rule_option
@json_option
def command(
    src: Path, source: Format | None, zeros: bool, zero_rule: str | None, as_json: bool
) -> None:
    """Show format, schemes, act order and contradictions of the checkpoint in SRC."""
    from qplug_converters.checkpoint import open_checkpoint
    from qplug_converters.survey import survey

    checkpoint = open_checkpoint(src, zero_rule)
    stored = sum(spec.nbytes for spec in checkpoint.headers.values())
    found = checkpoint.detect(source)
    answer: dict[str, Any] = {
        "folder": str(src),
        "format": found.name,
        "architecture": _architecture(checkpoint.config.get("architectures")),
        "shards": len(checkpoint.shards),
        "tensors": len(checkpoint.headers),
        "bytes": stored,
    }
    if found.read is None:
        if as_json:
            render.data(answer)
        else:
            render.record({**answer, "bytes": render.size(stored)})
        return
    found, model = checkpoint.scheme(found)
    if zeros:
        model = survey(checkpoint, found, model)
    weights = sum(s.numel for s in model.linears.values())
    packed = sum(
        spec.nbytes
        for name, scheme in model.linears.items()
        for spec in found.layout(scheme).specs(scheme.sizes).values()
    )
    schemes = Counter(scheme.describe() for scheme in model.linears.values())
    in_order = sum(s.act_order for s in model.linears.values())
    answer |= {
        "config": checkpoint.block_where,
        "producer": model.producer,
        "quantized_linears": len(model.linears),
        "weights": weights,
        "bits_per_weight": round(8 * packed / weights, 3),
        "schemes": dict(schemes),
        "act_order": f"{in_order} of {len(model.linears)} linears",
        "zero_rules": dict(Counter(s.zero_rule for s in model.linears.values())),
        "dense": list(model.dense),
        "notes": list(model.notes),
    }
    if zeros:
        facts = [s.zeros for s in model.linears.values() if s.zeros is not None]
        answer["zeros"] = {
            "lowest": min(f.lowest for f in facts),
            "highest": max(f.highest for f in facts),
            "at_midpoint": sum(f.midpoint for f in facts),
            "stored_as_maxq": sum(f.at_maxq for f in facts),
            "count": sum(f.count for f in facts),
        }
    if as_json:
        render.data(answer)
        return
    shown = dict(answer)
    shown["bytes"] = render.size(stored)
    shown["weights"] = f"{weights:,}"
    shown["schemes"] = ", ".join(f"{n} x {text}" for text, n in schemes.items())
    shown["zero_rules"] = ", ".join(f"{n} x {r}" for r, n in answer["zero_rules"].items())
    shown["dense"] = f"{len(model.dense)} modules: {', '.join(model.dense[:3])}" + (
        " …" if len(model.dense) > 3 else ""
    )
    if zeros:
        shown["zeros"] = ", ".join(f"{k} {v}" for k, v in answer["zeros"].items())
    del shown["notes"]
    render.record({k.replace("_", " "): v for k, v in shown.items() if v != ""})
    for note in model.notes:
        render.warn(note)


def _architecture(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and value else "unknown"
