"""What `--for` takes, and how the forms that were considered are printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from . import render

if TYPE_CHECKING:
    from ..choose_form import Form, Search
    from ..engines import Engine, Version

MOST_NEXT = 3
"""Forms that run and are printed besides the chosen one."""


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
    shown = _shown(found)
    rows = []
    for form in shown:
        more = f"{(form.nbytes - source.nbytes) / source.nbytes:+.1%}"
        rows.append((form.name, form.how, render.size(form.nbytes), more, form.says))
    left = len(found.forms) - 1 - len(shown)
    if found.best() is None:
        rows += [(name, "-", "-", "-", why) for name, why in found.unreachable.items()]
    else:
        left += len(found.unreachable)
    render.table(("form", "how", "bytes", "more", "answer"), rows)
    if left:
        render.say(f"--json has {left} more forms and formats")


def _shown(found: Search) -> list[Form]:
    """Return the chosen form, the next that run, and of each format one that is not taken.

    What nobody tested is only shown where nothing runs.
    """
    from ..engines import Outcome

    best = found.best()
    others = [form for form in found.forms[1:] if form is not best]
    refused: dict[str, Form] = {}
    for form in others:
        known = form.outcome in (Outcome.REFUSED, Outcome.WRONG)
        if not form.runs and (known or best is None):
            refused.setdefault(form.plan.target.name, form)
    running = [form for form in others if form.runs]
    return [*([] if best is None else [best]), *running[:MOST_NEXT], *refused.values()]
