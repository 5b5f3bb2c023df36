"""Bad headers, indexes, links and folders: one clear line, nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from builders import GOLDEN, Command, Draft, Q, convert, shard_bytes
from spoil import (
    GPTQ,
    SHARD,
    Bad,
    entry,
    fifo,
    header,
    hole,
    index,
    leaving_config,
    leaving_link,
    looping_link,
    overlap,
    pickles,
    points_at,
    raw_shard,
    refused_by_command,
    refused_by_library,
    twice_in_one_header,
    twice_in_two_shards,
)

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.verify import verify

NEWLINE = f"{Q}.scales\n\x1b[31merror: not this line"

DAMAGED = [
    Bad("one byte short", GPTQ, raw_shard(lambda b: b[:-1]), SHARD, "truncated"),
    Bad("one byte long", GPTQ, raw_shard(lambda b: b + b"\0"), SHARD, "truncated or padded"),
    Bad("cut in the header", GPTQ, raw_shard(lambda b: b[:100]), SHARD, "in a file of 100"),
    Bad("cut in the length", GPTQ, raw_shard(lambda b: b[:4]), SHARD, "in a file of 4"),
    Bad("empty shard", GPTQ, raw_shard(lambda b: b""), SHARD, "in a file of 0"),
    Bad(
        "header longer than the file",
        GPTQ,
        raw_shard(lambda b: (1 << 40).to_bytes(8, "little") + b[8:]),
        SHARD,
        "a header of 1099511627776 bytes",
    ),
    Bad(
        "header longer than anything",
        GPTQ,
        raw_shard(lambda b: b"\xff" * 8 + b[8:]),
        SHARD,
        "a header of 18446744073709551615 bytes",
    ),
    Bad("a git pointer", GPTQ, raw_shard(lambda b: b"version https://git-lfs"), SHARD, "a header"),
    Bad("header of noise", GPTQ, header(lambda _: b"\x00\xff{{{{"), SHARD, "no JSON header"),
    Bad("header is a list", GPTQ, header(lambda _: [1]), SHARD, "no object"),
    Bad("header nested", GPTQ, header(lambda _: b"[" * 200_000), SHARD, "no JSON header"),
    Bad(
        "header in UTF-16",
        GPTQ,
        header(lambda lies: json.dumps(lies).encode("utf-16-le")),
        SHARD,
        "no JSON header",
    ),
    Bad("one name twice", GPTQ, twice_in_one_header, SHARD, f"two entries named '{Q}.scales'"),
    Bad("one name in two shards", GPTQ, twice_in_two_shards, "model.", "in a.safetensors and b."),
    Bad("overlap", GPTQ, header(overlap), SHARD, "data from byte 0"),
    Bad("overlap of equal size", GPTQ, entry(f"{Q}.scales", data_offsets=[0, 512]), "", "byte 0"),
    Bad("hole", GPTQ, header(hole), SHARD, "data from byte"),
    Bad("past the end", GPTQ, entry("model.norm.weight", data_offsets=[1 << 40, (1 << 40) + 256]),
        SHARD, "data from byte"),
    Bad("backwards", GPTQ, entry(f"{Q}.scales", data_offsets=[512, 0]), f"{Q}.scales", "-512"),
    Bad("negative", GPTQ, entry(f"{Q}.scales", data_offsets=[-512, 0]), f"{Q}.scales", "damaged"),
    Bad("fractional", GPTQ, entry(f"{Q}.scales", data_offsets=[0.0, 512.0]), Q, "damaged entry"),
    Bad("three offsets", GPTQ, entry(f"{Q}.scales", data_offsets=[0, 1, 2]), Q, "damaged entry"),
    Bad("true as a size", GPTQ, entry(f"{Q}.scales", shape=[True, 256]), Q, "damaged entry"),
    Bad("text as a size", GPTQ, entry(f"{Q}.scales", shape="22"), Q, "damaged entry"),
    Bad("another size", GPTQ, entry(f"{Q}.scales", shape=[4, 128]), f"{Q}.scales", "512 bytes"),
    Bad("unknown dtype", GPTQ, entry(f"{Q}.scales", dtype="F7"), f"{Q}.scales", "dtype 'F7'"),
    Bad("no dtype", GPTQ, entry(f"{Q}.scales", dtype=None), f"{Q}.scales", "damaged entry"),
    Bad("dtype list", GPTQ, entry(f"{Q}.scales", dtype=["F16"]), f"{Q}.scales", "damaged entry"),
    Bad("entry is a number", GPTQ, header(lambda lies: lies.update({Q: 5})), Q, "damaged entry"),
    Bad("name of two lines", GPTQ, header(lambda lies: lies.update({NEWLINE: {}})), Q, "damaged"),
    Bad("name no text", GPTQ, header(lambda lies: lies.update({"\ud800": {}})), SHARD, "damaged"),
]  # fmt: skip

INDEXES = [
    Bad("to the parent", GPTQ, points_at("../x.safetensors"), "index", "'../x.safetensors'"),
    Bad("absolute", GPTQ, points_at("/etc/passwd"), "index", "'/etc/passwd'"),
    Bad("to a subfolder", GPTQ, points_at("a/b.safetensors"), "index", "'a/b.safetensors'"),
    Bad("to the parent itself", GPTQ, points_at(".."), "index", "'..'"),
    Bad("to nothing", GPTQ, points_at(""), "index", "''"),
    Bad("zero byte", GPTQ, points_at("a\0b.safetensors"), "index", "'a\\x00b.safetensors'"),
    Bad("too long", GPTQ, points_at("x" * 5000), "xxxx", "File name too long"),
    Bad("no text", GPTQ, points_at("\ud800.safetensors"), "index", "'\\ud800.safetensors'"),
    Bad("to a missing file", GPTQ, points_at("no.safetensors"), "no.safetensors", "no such file"),
    Bad("to the config", GPTQ, points_at("config.json"), "config.json", "a header of"),
    Bad("to the other shard", GPTQ, points_at("model-00002-of-00002.safetensors"), Q, "in model-"),
    Bad("not a name", GPTQ, index(lambda m, _: m.update({Q: 5})), "index.json", "weight_map"),
    Bad("a list", GPTQ, index(lambda m, _: [1]), "index.json", "weight_map"),
    Bad("empty", GPTQ, index(lambda m, _: {}), "index.json", "weight_map"),
    Bad("more", GPTQ, index(lambda m, _: m.update({"x.y": m[f"{Q}.g_idx"]})), "x.y", "no such"),
    Bad("less", GPTQ, index(lambda m, _: m.pop(f"{Q}.g_idx") and None), Q, "not in the index"),
    Bad(
        "shard gone",
        GPTQ,
        index(lambda _, f: (f / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors",
        "no such file",
    ),
    Bad(
        "two",
        GPTQ,
        index(lambda _, f: (f / "x.safetensors.index.json").write_text("{}") and None),
        "",
        "model.safetensors.index.json and x.safetensors.index.json",
    ),
    Bad(
        "none",
        GPTQ,
        lambda d, f: (d.save_sharded(f), (f / "model.safetensors.index.json").unlink()),
        "",
        "2 safetensors files and no index",
    ),
    Bad("link that leaves", GPTQ, leaving_link, "model-00002-of-00002", "a link to"),
    Bad("config link that leaves", GPTQ, leaving_config, "config.json", "a link to"),
    Bad("link to itself", GPTQ, looping_link, SHARD, "link"),
    Bad("a pipe", GPTQ, fifo, SHARD, "no regular file"),
]

FOLDERS = [
    Bad("no folder", GPTQ, lambda d, f: None, "", "no such folder"),
    Bad("a file", GPTQ, lambda d, f: f.write_text("x"), "", "a file"),
    Bad("empty folder", GPTQ, lambda d, f: f.mkdir(), "config.json", "no such file"),
    Bad("config only", GPTQ, lambda d, f: d.save_small(f), SHARD, "no such file"),
    Bad("pickles only", GPTQ, pickles, "", "a pickle, which can run any code"),
]

ALL = [*DAMAGED, *INDEXES, *FOLDERS]


@pytest.mark.parametrize("bad", [b for b in ALL if not b.data], ids=lambda b: b.name)
def test_library(bad: Bad, tmp_path: Path) -> None:
    refused_by_library(bad, tmp_path)


@pytest.mark.parametrize("bad", ALL, ids=lambda b: b.name)
def test_command_line(bad: Bad, tmp_path: Path, qplug: Command) -> None:
    refused_by_command(bad, tmp_path, qplug)


def test_cache_links_may_leave(tmp_path: Path) -> None:
    """The cache of huggingface_hub: snapshots/<revision>/x links to ../../blobs/<hash>."""
    model = tmp_path / "models--a--b"
    snapshot, blobs = model / "snapshots" / "abc", model / "blobs"
    Draft.of(GPTQ).save_sharded(snapshot)
    blobs.mkdir()
    for number, file in enumerate(list(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    assert verify(open_checkpoint(GOLDEN / GPTQ), open_checkpoint(snapshot)).same
    convert(snapshot, tmp_path / "out")
    # A link out of that cache is no better than any other.
    shard = snapshot / "model-00001-of-00002.safetensors"
    outside = tmp_path / "outside"
    outside.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to("../../../outside")
    with pytest.raises(QplugError, match="a link to"):
        open_checkpoint(snapshot)


def test_a_shard_larger_than_the_memory(tmp_path: Path) -> None:
    """A sparse file: the system must not be asked to reserve memory for all of it."""
    free = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    size = 1024 * sum(int(free[key].split()[0]) for key in ("MemTotal", "SwapTotal")) + (1 << 30)
    start = {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}
    rest = {"dtype": "U8", "shape": [size], "data_offsets": [8, 8 + size]}
    raw = shard_bytes({"start": start, "rest": rest}, b"\1\0\0\0\2\0\0\0")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SHARD).write_bytes(raw)
    try:
        os.truncate(tmp_path / SHARD, len(raw) + size)
    except OSError:
        pytest.skip("this file system holds no such file")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.peek("start").tolist() == [1, 2]
    assert checkpoint.tensor("rest")[-2:].tolist() == [0, 0]
