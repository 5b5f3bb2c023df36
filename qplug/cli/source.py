"""SRC of a command: a folder, or a repository of a model hub."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..repository import Repository
from . import render
from .options import Folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qplug_converters.checkpoint import Checkpoint


class Place(Folder):
    """A folder that exists, or else `owner/name[@revision]`."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a path, or the `Repository` that the text names where there is no such path."""
        path = super().convert(value, param, ctx)
        if os.path.lexists(path):
            return path
        return Repository.parse(str(value)) or path


class Remote(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """`owner/name[@revision]` and nothing else."""

    name = "repository"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the `Repository` that the text names."""
        found = value if isinstance(value, Repository) else Repository.parse(str(value))
        return found or self.fail(f"{value!r} is not owner/name", param, ctx)


def open_source(
    src: Path | Repository, zero_rule: str | None = None, work: Path | None = None
) -> Checkpoint:
    """Open a checkpoint wherever it lies; see `open_checkpoint`.

    Files of a repository that are needed whole are fetched into `work`, or else into the cache of
    huggingface_hub.
    """
    from qplug_converters.checkpoint import open_checkpoint

    if isinstance(src, Path):
        return open_checkpoint(src, zero_rule)
    from ..hub import HubSource, quiet

    quiet(bars=False)
    return open_checkpoint(HubSource(src, work, render.say), zero_rule)


def work_folder(src: Path | Repository, dst: Path | None, push: Repository | None) -> Path | None:
    """Return where a conversion keeps what makes it able to go on; `None`: it keeps nothing.

    Beside DST, or, where there is none, in the working directory.
    """
    if dst is None:
        assert push is not None
        return Path(f".{push.name.replace('/', '--')}.qplug-push")
    return None if isinstance(src, Path) else dst.parent / f".{dst.name}.qplug-work"


@contextlib.contextmanager
def going_on(work: Path | None) -> Iterator[None]:
    """Say of an error in the body what stays in `work`; remove that when all went well."""
    from qplug_converters.errors import QplugError

    try:
        yield
    except QplugError as error:
        if work is not None and work.exists():
            kept = f"what is finished stays in {work}, and the same command goes on"
            error.fix = f"{error.fix}; {kept}" if error.fix else kept
        raise
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
