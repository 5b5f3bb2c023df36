"""The certificate of a conversion: what was promised, and hashes of what was read and written.

Everything in it can be computed again from the files (`check`). It is sealed by the sha256 of its
own JSON (keys sorted, no spaces, without the key `sha256`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .plan import Plan
from .version import __version__
from .writer import Writer

UNCERTIFIED = ("README.md", ".gitattributes")
"""Files that may be edited: a model card is."""


def promise(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a plan promises of every linear, and of what."""
    stated = {} if plan.stated is None else {"config": dict(plan.stated)}
    return {
        "tool": f"qplug {__version__}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **stated,
        "source": {
            **checkpoint.source.origin,
            "format": plan.source.name,
            "producer": plan.model.producer,
            "files": {s.name: checkpoint.source.size(s.name) for s in checkpoint.shards},
            "sha256": source_hashes(checkpoint),
            "notes": list(plan.notes),
        },
        "target": plan.target.name,
        "verdict": plan.verdict.name,
        "renamed": {name: list(new) for name, new in plan.renamed.items()},
        "linears": {step.module: step.as_json() for step in plan.steps},
        "tensors": {},
    }


def _known(files: tuple[Path, ...]) -> dict[str, str]:
    """Return the sha256 of files that bear it as their name, as in huggingface_hub's cache."""
    names = {file.name: file.resolve().name for file in files if file.is_symlink()}
    hexadecimal = frozenset("0123456789abcdef")
    return {n: h for n, h in names.items() if len(h) == 64 and hexadecimal.issuperset(h)}


def source_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the sha256 of a source's config files, and of what its shards' headers say.

    Of a header: a line for each tensor, `name dtype[shape] offset`, in file order. Tensors have
    hashes of their own in the certificate; a repository has its revision, and in huggingface_hub's
    cache each file's hash as its name.
    """
    known = _known(checkpoint.shards)
    if checkpoint.source.origin:
        return known
    names = ("config.json", *checkpoint.side_configs)
    known |= {name: sha256_of(checkpoint.folder / name) for name in names}
    lines: dict[str, list[str]] = {shard.name: [] for shard in checkpoint.shards}
    for name, place in checkpoint.locations.items():
        lines[place.file.name].append(f"{name} {place.spec} {place.offset}\n")
    for name, said in lines.items():
        known[f"{name} header"] = hashlib.sha256("".join(said).encode()).hexdigest()
    return known


def note(promised: dict[str, Any], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Add what was found in making a shard: of linears, and of tensors carried along."""
    for name, said in records.items():
        if name in promised["linears"]:
            promised["linears"][name].update(said)
        else:
            promised["tensors"][name] = said["blake3"]


def files(writer: Writer) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file, of a shard the header's: its tensors have their own."""
    found: dict[str, dict[str, Any]] = {
        shard.path.name: {"size": shard.size, "header_sha256": shard.header_sha256()}
        for shard in writer.shards
    }
    for path in writer.small_files():
        if path.name not in UNCERTIFIED:
            found[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    return found


def sha256_of(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a certificate with its own hash."""
    return {**found, "sha256": seal_of(found)}


def seal_of(found: Mapping[str, Any]) -> str:
    """Return the hash of a certificate, whatever it says that is."""
    bare = {key: value for key, value in found.items() if key != "sha256"}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
