"""`qplug inspect`: what a checkpoint holds and who takes it, from headers and config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import Folder, format_name, json_option, zero_rule_option
from .source import Place, open_source

if TYPE_CHECKING:
    from qplug_converters.format import Format
    from qplug_converters.scheme import ModelScheme

    from ..engines import Answer
    from ..repository import Repository

MOST_NAMED = 3
"""Dense modules that are named."""


@click.command()
@click.argument("src", type=Place(), required=False)
@click.option(
    "--config",
    "configs",
    type=Folder(),
    multiple=True,
    metavar="FILE",
    help="Judge a config alone, without SRC: config.json, a side file, a bare block. Several may "
    "be given: do they agree?",
)
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
    src: Path | Repository | None,
    configs: tuple[Path, ...],
    source: Format | None,
    zeros: bool,
    zero_rule: str | None,
    as_json: bool,
) -> None:
    """Show format, schemes, act order and contradictions of the checkpoint in SRC.

    SRC is a folder, or owner/name[@revision] on the Hub: then its headers alone are read. A table
    says what stock engines do with it, version by version, and what they do with qplug.
    With --config, what a config alone tells; what only tensors decide is said.
    """
    from qplug_converters.survey import histogram, survey

    from ..engines import ENGINES, judge, of_checkpoint

    if (src is None) is not bool(configs):
        raise click.UsageError("one of SRC and --config says what to inspect")
    if src is None:
        if source is not None or zeros or zero_rule is not None:
            raise click.UsageError("--from, --zeros and --zero-rule are about tensors, not configs")
        _judge(configs, as_json)
        return
    checkpoint = open_source(src, zero_rule)
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
    answer |= _of_linears(found, model)
    answer["config"] = checkpoint.block_where
    if zeros and (counts := _zeros(model)):
        answer["zeros"] = counts | {"histogram": histogram(checkpoint, found, model)}
    facts = of_checkpoint(checkpoint, model)
    where = str(src) if isinstance(src, Path) else src.name
    answers = [a for engine in ENGINES for a in judge(engine, facts, where)]
    if as_json:
        render.data(answer | {"engines": [one.as_json() for one in answers]})
        return
    _show(answer)
    show_engines(answers)
    for note in model.notes:
        render.warn(note)


def _judge(configs: tuple[Path, ...], as_json: bool) -> None:
    """Show what configs say, judged without tensors."""
    from qplug_converters.judge import judge as judge_configs
    from qplug_converters.shards import read_json

    from ..engines import ENGINES, judge, of_config

    found = judge_configs({path.name: read_json(path) for path in configs})
    base = found.claim.base
    answer = {
        "config": found.where,
        "format": found.format.name,
        "producer": found.claim.producer,
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": base.sym,
        "desc_act": base.desc_act and base.group_size != -1,
        "lm_head": found.claim.lm_head,
        "notes": list(found.notes),
    }
    facts = of_config(found.claim, found.block, found.where)
    answers = [one for engine in ENGINES for one in judge(engine, facts)]
    if as_json:
        render.data(answer | {"engines": [one.as_json() for one in answers]})
        return
    shown = {k: v for k, v in answer.items() if k != "notes" and v is not None and v != ""}
    render.record({k.replace("_", " "): _plain(v) for k, v in shown.items()})
    show_engines(answers)
    for note in found.notes:
        render.warn(note)


def _plain(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _of_linears(found: Format, model: ModelScheme) -> dict[str, Any]:
    """Return what headers and config say of the quantized linears."""
    linears = model.linears.values()
    weights = sum(scheme.numel for scheme in linears)
    packed = sum(spec.nbytes for s in linears for spec in found.layout(s).specs(s.sizes).values())
    in_order = sum(scheme.act_order for scheme in linears)
    return {
        "config": "",
        "producer": model.producer,
        "quantized_linears": len(model.linears),
        "weights": weights,
        "bits_per_weight": round(8 * packed / weights, 3),
        "schemes": dict(Counter(scheme.describe() for scheme in linears)),
        "act_order": f"{in_order} of {len(model.linears)} linears",
        "zero_rules": dict(Counter(scheme.zero_rule for scheme in linears)),
        "dense": list(model.dense),
        "notes": list(model.notes),
    }


def _zeros(model: ModelScheme) -> dict[str, Any]:
    """Return what the zeros are, of all linears together; nothing on grids without zeros."""
    facts = [s.zeros for s in model.linears.values() if s.zeros is not None]
    if not facts:
        return {}
    return {
        "lowest": min(f.lowest for f in facts),
        "highest": max(f.highest for f in facts),
        "at_midpoint": sum(f.midpoint for f in facts),
        "stored_as_maxq": sum(f.at_maxq for f in facts),
        "count": sum(f.count for f in facts),
    }


def _show(answer: Mapping[str, Any]) -> None:
    """Print what is in a checkpoint."""
    shown = {name: value for name, value in answer.items() if name != "notes"}
    shown["bytes"] = render.size(answer["bytes"])
    shown["weights"] = f"{answer['weights']:,}"
    shown["schemes"] = ", ".join(f"{n} x {text}" for text, n in answer["schemes"].items())
    shown["zero_rules"] = ", ".join(f"{n} x {r}" for r, n in answer["zero_rules"].items())
    dense = answer["dense"]
    named = f"{len(dense)} modules: {', '.join(dense[:MOST_NAMED])}"
    shown["dense"] = named + (" …" if len(dense) > MOST_NAMED else "")
    if "zeros" in shown:
        facts = dict(shown.pop("zeros"))
        counts = facts.pop("histogram")
        shown["zeros"] = ", ".join(f"{k} {v}" for k, v in facts.items())
        for bits, times in counts.items():
            shown[f"{bits}-bit zeros"] = ", ".join(f"{z}: {n}" for z, n in times.items())
    render.record({k.replace("_", " "): v for k, v in shown.items() if v != ""})


def show_engines(answers: list[Answer]) -> None:
    """Print what engines do: the command where it runs, else why not."""
    if not answers:
        return
    render.line()
    render.table(
        ("engine", "versions", "answer", "with, or why"),
        [
            (
                one.engine.title,
                one.versions,
                one.outcome.value,
                " - ".join(part for part in (one.command, one.why) if part),
            )
            for one in answers
        ],
    )


def _architecture(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and value else "unknown"
