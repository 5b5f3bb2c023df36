"""Conversions whose source or target is on the hub: shard by shard, and able to go on.

Source shards come when an output shard needs them and go when none does any more; an output shard
that was uploaded goes too. On the disk lie at most the two largest source shards (a linear may
reach from one into the next) and the open output shard. A journal in the work folder names the
finished shards, so that the same command after a kill makes and uploads the others only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from qplug_converters.checkpoint import Checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import Progress, Supply, conversion_key, execute
from qplug_converters.job import tasks_of
from qplug_converters.journal import Journal
from qplug_converters.plan import Plan

from .hub import HubSource, Say, Target, Uploaded
from .publish import Product


class HubSupply:
    """Fetches source shards when they are needed, and removes them when they are not."""

    def __init__(self, checkpoint: Checkpoint, source: HubSource) -> None:
        self._checkpoint, self._source = checkpoint, source
        self._begun = False

    def need(self, files: Sequence[Path]) -> None:
        """Return when these files are here, and, at first, no others of an earlier run."""
        names = [file.name for file in files]
        if not self._begun:
            self._source.sweep(names)
            self._begun = True
        self._source.need(names)

    def done(self, files: Sequence[Path]) -> None:
        """Remove files that will not be read again."""
        for file in files:
            self._checkpoint.forget(file)
        self._source.done([file.name for file in files])


def convert_to_folder(
    plan: Plan,
    checkpoint: Checkpoint,
    target: Path,
    work: Path,
    *,
    keep: bool = False,
    progress: Progress | None = None,
    max_shard: int,
) -> None:
    """Convert a checkpoint on the hub into a folder; `keep` keeps what was fetched in `work`."""
    execute(
        plan,
        checkpoint,
        target,
        progress=progress,
        max_shard=max_shard,
        supply=None if keep else _supply(checkpoint),
        journal=_journal(plan, checkpoint, work, max_shard),
    )


def convert_to_hub(
    plan: Plan,
    checkpoint: Checkpoint,
    target: Target,
    work: Path,
    *,
    progress: Progress | None = None,
    say: Say | None = None,
    max_shard: int,
) -> Product:
    """Convert a checkpoint, upload its shards, and return what is to be committed.

    Shards that the repository takes as ordinary files (it decides) stay in `work` until then.
    """
    journal = _journal(plan, checkpoint, work, max_shard)
    before = {name: Uploaded(made.sha256, made.size) for name, made in journal.finished.items()}
    journal.drop(before.keys() - target.present(before))
    if say is not None and journal.finished:
        say(f"{len(journal.finished)} shards were uploaded before")
    folder = work / "out"
    if folder.exists():  # of a run that ended between its last shard and its commit
        shutil.rmtree(folder)

    def deliver(path: Path, sha256: str) -> None:
        if say is not None:
            say(f"uploading {path.name} ({path.stat().st_size / 1e6:,.1f} MB)")
        if target.upload(path, sha256):
            path.unlink()

    execute(
        plan,
        checkpoint,
        folder,
        progress=progress,
        max_shard=max_shard,
        supply=_supply(checkpoint),
        deliver=deliver,
        journal=journal,
    )
    files = {path.name: path for path in folder.iterdir()}
    made = {name: Uploaded(one.sha256, one.size) for name, one in journal.finished.items()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    specs = (its for _, its in tasks_of(plan, checkpoint))
    return Product(
        plan.target,
        plan.goal,
        config,
        config.get("quantization_config"),
        {name: spec for its in specs for name, spec in its.items()},
        [one.size for one in made.values()],
        files,
        {name: one for name, one in made.items() if name not in files},
    )


def _supply(checkpoint: Checkpoint) -> Supply | None:
    source = checkpoint.source
    return HubSupply(checkpoint, source) if isinstance(source, HubSource) else None


def _journal(plan: Plan, checkpoint: Checkpoint, work: Path, max_shard: int) -> Journal:
    if work.is_symlink():
        raise QplugError("a link", str(work), "a folder", "remove it")
    return Journal(work / "journal", conversion_key(plan, checkpoint, max_shard))
