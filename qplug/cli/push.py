"""`qplug push`: upload a finished checkpoint, with a card made from its files."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import Folder, json_option
from .source import Remote

if TYPE_CHECKING:
    from ..hub import Pushed
    from ..repository import Repository


def base_model_option(command: Any) -> Any:
    """Add `--base-model`."""
    return click.option(
        "--base-model",
        type=Remote(),
        help="The model that was quantized, for the card (default: what the files say).",
    )(command)


@click.command()
@click.argument("folder", metavar="DIR", type=Folder())
@click.argument("repository", type=Remote())
@click.option(
    "--private", is_flag=True, help="Make a private repository; refuse one that is public."
)
@click.option("--revision", metavar="BRANCH", help="The branch to commit to (default: main).")
@click.option("--message", help="The commit message.")
@base_model_option
@json_option
def command(
    folder: Path,
    repository: Repository,
    private: bool,
    revision: str | None,
    message: str | None,
    base_model: Repository | None,
    as_json: bool,
) -> None:
    """Upload the checkpoint in DIR to owner/name on the Hub, in one commit.

    README.md becomes its model card: what people wrote there stays, the rest is counted from the
    files. Shards and configs of another cutting are deleted in the same commit. What was uploaded
    before an interruption is not uploaded again.
    """
    from qplug_converters.checkpoint import open_checkpoint

    from ..hub import Target, quiet
    from ..publish import Product, publish

    if revision is not None:
        if repository.revision is not None:
            raise click.UsageError("--revision and @revision say the same: give one")
        repository = replace(repository, revision=revision)
    quiet(bars=sys.stderr.isatty() and not as_json)
    started = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    product = Product.of(checkpoint)
    done = publish(
        product,
        Target(repository, private),
        message=message,
        base_model=base_model.name if base_model is not None else None,
        say=None if as_json else render.say,
    )
    for name in checkpoint.left_behind:
        render.warn(f"not part of the model, and not uploaded: {name}")
    if as_json:
        render.data(pushed_json(done, started))
    else:
        show(done, started)


def pushed_json(done: Pushed, started: float) -> dict[str, Any]:
    """Return what a push did as JSON values."""
    return {
        "url": done.url,
        "commit": done.commit,
        "files": list(done.files),
        "deleted": list(done.deleted),
        "changed": done.changed,
        "seconds": round(time.perf_counter() - started, 3),
    }


def show(done: Pushed, started: float) -> None:
    """Print what a push did."""
    render.record(
        {
            "pushed": done.url,
            "commit": done.commit + ("" if done.changed else " (nothing had changed)"),
            "files": len(done.files),
            "deleted": ", ".join(done.deleted) or "none",
            "time": render.seconds(started),
        }
    )
