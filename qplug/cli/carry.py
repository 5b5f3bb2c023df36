"""The work of `qplug convert` once the plan is accepted: make, prove, upload."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import render
from .push import pushed_json
from .push import show as show_push

if TYPE_CHECKING:
    from qplug_converters.checkpoint import Checkpoint
    from qplug_converters.execute import Progress
    from qplug_converters.plan import Plan
    from qplug_converters.verify import Certificate

    from ..hub import Say, Target
    from ..publish import Product
    from ..repository import Repository


def open_target(push: Repository | None, private: bool) -> Target | None:
    """Open the repository to push to; whether it may be written to is seen before any work."""
    if push is None:
        return None
    from ..hub import Target, quiet

    quiet(bars=False)
    return Target(push, private)


def carry_out(
    plan: Plan,
    checkpoint: Checkpoint,
    dst: Path | None,
    work: Path | None,
    to_hub: Target | None,
    *,
    keep: bool,
    progress: Progress | None,
    say: Say | None,
    most: int,
) -> Product | None:
    """Convert into DST, or, where there is none, upload shard by shard and return the rest."""
    if work is None:
        from qplug_converters.execute import execute

        assert dst is not None
        execute(plan, checkpoint, dst, progress=progress, max_shard=most)
        return None
    from ..stream import convert_to_folder, convert_to_hub

    if dst is not None:
        convert_to_folder(plan, checkpoint, dst, work, keep=keep, progress=progress, max_shard=most)
        return None
    assert to_hub is not None
    return convert_to_hub(
        plan, checkpoint, to_hub, work, progress=progress, say=say, max_shard=most
    )


def compare(
    plan: Plan, checkpoint: Checkpoint, dst: Path, zero_rule: str | None, as_json: bool
) -> Certificate:
    """Read both again and compare every weight."""
    from qplug_converters.checkpoint import open_checkpoint
    from qplug_converters.verify import verify

    from .verify import show

    started = time.perf_counter()
    with render.progress("verify") as progress:
        # A copy keeps the zeros, and the config that does not say how they were stored.
        kept = zero_rule if plan.copied_whole else None
        one, two = open_checkpoint(checkpoint.source, zero_rule), open_checkpoint(dst, kept)
        proof = verify(one, two, progress=progress)
    if not as_json:
        show(replace(proof, notes=()), started)  # the plan has shown them
    return proof


def upload(made: Product | Path, to_hub: Target, base: str | None, as_json: bool) -> dict[str, Any]:
    """Commit what was uploaded shard by shard, or upload a finished folder."""
    from qplug_converters.checkpoint import open_checkpoint
    from qplug_converters.errors import QplugError

    from ..publish import Product, publish

    started = time.perf_counter()
    say = None if as_json else render.say
    try:
        product = Product.of(open_checkpoint(made)) if isinstance(made, Path) else made
        pushed = publish(product, to_hub, base_model=base, say=say)
    except QplugError as error:
        if isinstance(made, Path):
            error.fix = f"{made} is complete; `qplug push {made} {to_hub.repository}` uploads it"
        raise
    if not as_json:
        show_push(pushed, started)
    return pushed_json(pushed, started)
