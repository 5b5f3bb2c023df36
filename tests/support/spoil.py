"""Spoilt checkpoints: a copy of a real one with one thing wrong, and what must be said of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from builders import Command, Draft, Q, Stored, convert, header_of, shard_bytes, write_index

from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.plan import make_plan
from qplug_converters.survey import survey

GPTQ = "gptq-4b-asym-g64"
SYM = "gptq-4b-sym-g128"
AWQ = "awq-gemm-g128"
SHARD = "model.safetensors"
SIDE = "quantize_config.json"

Write = Callable[[Draft, Path], object]


@dataclass(frozen=True)
class Bad:
    """One thing wrong: how it is written, and what is said of it."""

    name: str
    golden: str
    write: Write
    where: str
    found: str
    data: bool = False
    """Only reading the tensors can tell."""


# Ways to write something wrong -------------------------------------------------------------------


def keys(**values: object) -> Write:
    """Quantization config keys, in both places."""
    return lambda draft, folder: draft.set(**values).save(folder)


def without(*names: str) -> Write:
    """Drop tensors."""

    def write(draft: Draft, folder: Path) -> None:
        for name in names:
            del draft.tensors[name]
        draft.save(folder)

    return write


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray], dtype: str = "") -> Write:
    """Change one tensor."""

    def write(draft: Draft, folder: Path) -> None:
        draft.tensors[name] = Stored.of(change(draft.tensors[name].array), dtype)
        draft.save(folder)

    return write


def poke(name: str, at: tuple[int, ...], value: float) -> Write:
    """Change one number."""

    def change(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return tensor(name, change)


def raw_shard(change: Callable[[bytes], bytes]) -> Write:
    """Change the bytes of the shard."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save_small(folder)
        (folder / SHARD).write_bytes(change(draft.shard()))

    return write


def header(change: Callable[[dict[str, dict[str, object]]], object]) -> Write:
    """Lie in the header of the shard."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save_small(folder)
        lies, data = header_of(draft.tensors)
        changed = change(lies)
        (folder / SHARD).write_bytes(shard_bytes(lies if changed is None else changed, data))

    return write


def entry(name: str, **fields: object) -> Write:
    """Lie about one tensor."""
    return header(lambda lies: lies[name].update(fields))


def index(change: Callable[[dict[str, object], Path], object]) -> Write:
    """Write two shards, then another index."""

    def write(draft: Draft, folder: Path) -> None:
        weight_map: dict[str, object] = dict(draft.save_sharded(folder))
        changed = change(weight_map, folder)
        write_index(folder, weight_map if changed is None else changed)

    return write


def points_at(name: str) -> Write:
    """An index entry that names another file."""
    return index(lambda weight_map, _: weight_map.update({f"{Q}.qweight": name}))


def config_text(text: str | bytes) -> Write:
    """Replace config.json."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save(folder)
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def side(name: str, **values: object) -> Write:
    """Another opinion in a side file."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save(folder)
        (folder / name).write_text(json.dumps({**(draft.side or draft.block), **values}))

    return write


def leaving_link(draft: Draft, folder: Path) -> None:
    draft.save_sharded(folder)
    elsewhere = folder.parent / "elsewhere.safetensors"
    (folder / "model-00002-of-00002.safetensors").rename(elsewhere)
    (folder / "model-00002-of-00002.safetensors").symlink_to(elsewhere)


def looping_link(draft: Draft, folder: Path) -> None:
    draft.save_small(folder)
    (folder / SHARD).symlink_to(folder / SHARD)


def leaving_config(draft: Draft, folder: Path) -> None:
    draft.save(folder)
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def pickles(draft: Draft, folder: Path) -> None:
    draft.save_small(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def fifo(draft: Draft, folder: Path) -> None:
    draft.save_small(folder)
    os.mkfifo(folder / SHARD)


def folder_as_config(draft: Draft, folder: Path) -> None:
    draft.save(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def twice_in_two_shards(draft: Draft, folder: Path) -> None:
    draft.save_small(folder)
    first, second = list(draft.tensors)[:20], list(draft.tensors)[19:]
    (folder / "a.safetensors").write_bytes(draft.shard(first))
    (folder / "b.safetensors").write_bytes(draft.shard(second))
    write_index(
        folder, dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    )


def twice_in_one_header(draft: Draft, folder: Path) -> None:
    draft.save_small(folder)
    lies, data = header_of(draft.tensors)
    name = f"{Q}.scales"
    text = json.dumps(lies)[:-1] + f", {json.dumps(name)}: {json.dumps(lies[name])}}}"
    (folder / SHARD).write_bytes(shard_bytes(text.encode(), data))


def overlap(lies: dict[str, dict[str, object]]) -> None:
    lies[f"{Q}.qzeros"]["data_offsets"] = [0, 128]


def hole(lies: dict[str, dict[str, object]]) -> None:
    del lies[f"{Q}.g_idx"]


def v2_written_as_v1(draft: Draft, folder: Path) -> None:
    for name, stored in draft.tensors.items():
        if name.endswith(".qzeros"):
            words = np.full(stored.shape, 0x88888888, np.uint32).view(np.int32)
            draft.tensors[name] = Stored.of(words)
    draft.save(folder)


GATE = "model.layers.0.mlp.gate_proj"


# Meeting them -------------------------------------------------------------------------------------


def check(error: QplugError, bad: Bad) -> None:
    """Hold one error to what every error must be."""
    everything = [error, *error.others]
    # repr: what cannot be printed is escaped in the one line.
    assert any(bad.where in one.where and bad.found in str(one) for one in everything), [
        (one.where, str(one)) for one in everything
    ]
    for one in everything:
        assert one.where
        assert one.fix, f"what to do about: {one}"
        assert len(str(one)) < 1100
        assert str(one).isprintable()
        assert one.fix.isprintable()
        assert not str(one).endswith(".")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what is below a folder, with sizes and times, links as links."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path)] = (state.st_size, 0 if path.is_dir() else state.st_mtime_ns)
    return found


def refused_on_the_way(bad: Bad, folder: Path, to: str = "canonical") -> None:
    """Opening, reading, surveying, planning or converting raises the one error; nothing is made."""
    bad.write(Draft.of(bad.golden), folder / "source")
    before = listing(folder)
    with pytest.raises(QplugError) as caught:
        convert(folder / "source", folder / "target", to)
    check(caught.value, bad)
    assert listing(folder) == before


def refused_by_library(bad: Bad, folder: Path) -> None:
    """Opening or reading the scheme, headers only, raises the one error."""
    source = folder / "source"
    bad.write(Draft.of(bad.golden), source)
    with pytest.raises(QplugError) as caught:
        open_checkpoint(source).scheme()
    check(caught.value, bad)


def refused_by_command(bad: Bad, folder: Path, qplug: Command) -> None:
    """The command says it in one line, with exit code 1, and leaves nothing behind."""
    source, target = folder / "source", folder / "new" / "target"
    bad.write(Draft.of(bad.golden), source)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    ran = qplug("convert", source, target, "--to", "canonical")
    assert ran.code == 1
    assert ran.out == "" or bad.data  # the plan
    assert ran.errors
    assert all(
        line.startswith(("error:", "hint:", "warning:", "       and "))
        or (bad.data and " to canonical: " in line)
        for line in ran.err.splitlines()
    )
    assert any(bad.found in line for line in ran.errors)
    as_json = qplug("convert", source, target, "--to", "canonical", "--json")
    assert as_json.code == 1
    assert set(as_json.error) >= {"found", "where", "expected", "fix"}
    # Nothing was made, not even the parent of the target, and nothing was touched.
    assert not (folder / "new").exists()
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def many_tensors(folder: Path, linears: int) -> float:
    """Read, survey and plan a checkpoint of many linears of 8 x 8; return CPU seconds."""
    draft = Draft.of(GPTQ)
    draft.save_small(folder)
    parts = {"qweight": ("I32", [1, 8], 32), "qzeros": ("I32", [1, 1], 4),
             "scales": ("F16", [1, 8], 16), "g_idx": ("I32", [8], 32)}  # fmt: skip
    lies, at = {}, 0
    for number in range(linears):
        for part, (dtype, shape, size) in parts.items():
            lies[f"{number}.down_proj.{part}"] = {
                "dtype": dtype, "shape": shape, "data_offsets": [at, at + size],
            }  # fmt: skip
            at += size
    raw = json.dumps(lies, separators=(",", ":")).encode()
    (folder / SHARD).write_bytes(shard_bytes(raw, bytes(at)))
    began = time.process_time()
    checkpoint = open_checkpoint(folder)
    found, model = checkpoint.scheme()
    assert len(model.linears) == linears
    plan = make_plan(
        found, survey(checkpoint, found, model), formats.find("awq"), headers=checkpoint.headers
    )
    assert len(plan.steps) == linears
    return time.process_time() - began
