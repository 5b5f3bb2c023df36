"""What `--for` takes, and how the forms that were considered are printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from . import render

if TYPE_CHECKING:
    from ..choose_form import Search
    from ..engines import Engine, Version


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stock engine and the version that is to take the output."""

    engine: Engine
    version: Version


def wanted(ctx: click.Context, param: click.Parameter, value: str | None) -> Wanted | None:
    """Read `vllm`, `vllm=0.32` and the like; without a version, the last in the table."""
    if value is None:
        return None
    from ..engines import ENGINES, version

    key, given, text = value.partition("=")
    stock = {engine.key: engine for engine in ENGINES if engine.stock}
    if key not in stock:
        raise click.BadParameter(f"no engine {key!r}: choose one of {', '.join(stock)}")
    engine = stock[key]
    if not given:
        return Wanted(engine, version(engine.last))
    try:
        at = version(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no version; write e.g. {engine.last}") from None
    if at < version(engine.first):
        raise click.BadParameter(f"nothing is known of {engine.title} before {engine.first}")
    if at > version(engine.last):
        render.warn(f"of {engine.title} {text} nothing is known: judged as {engine.last}")
        at = version(engine.last)
    return Wanted(engine, at)


def show(found: Search) -> None:
    """Print the forms that were considered, with their size."""
    source = found.source
    render.say(f"{found.engine.title} {found.version}, as it is: {source.says}")
    if source.runs:
        return
    rows = []
    seen: set[str] = set()
    for form in found.forms[1:]:
        named = form.plan.target.name
        if not form.runs and form.stated is None and named in seen:
            continue  # one refusal of a format is enough
        seen.add(named)
        more = f"{(form.nbytes - source.nbytes) / source.nbytes:+.1%}"
        rows.append((form.name, form.how, render.size(form.nbytes), more, form.says))
    rows += [(name, "-", "-", "-", why) for name, why in found.unreachable.items()]
    render.table(("form", "how", "bytes", "more", "answer"), rows)
