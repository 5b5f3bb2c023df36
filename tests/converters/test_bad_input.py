"""Bad input: one clear line, exit code 1, nothing left behind.

Every case is a copy of a real checkpoint with one thing wrong. It is met twice: as the
`QplugError` that the library raises, and as what the command line does with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from builders import (
    GOLDEN,
    Command,
    Draft,
    Q,
    Stored,
    convert,
    header_of,
    shard_bytes,
    write_index,
)

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.verify import verify

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


NEWLINE = f"{Q}.scales\n\x1b[31merror: not this line"
GATE = "model.layers.0.mlp.gate_proj"

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

CONFIGS = [
    Bad("broken", GPTQ, config_text('{"a": '), "config.json", "no JSON"),
    Bad("empty", GPTQ, config_text(""), "config.json", "no JSON"),
    Bad("no text", GPTQ, config_text(b"\xff\xfe\x00{"), "config.json", "no JSON"),
    Bad("a list", GPTQ, config_text("[1]"), "config.json", "a JSON list"),
    Bad("null", GPTQ, config_text("null"), "config.json", "a JSON"),
    Bad("nested", GPTQ, config_text('{"a":' * 100_000), "config.json", "no JSON"),
    Bad("nested whole", GPTQ, config_text("[" * 99_999 + "]" * 99_999), "config.json", "no JSON"),
    Bad("a key twice", GPTQ, config_text('{"a": 1, "a": 2}'), "config.json", "two entries named"),
    Bad("a folder", GPTQ, folder_as_config, "config.json", "no regular file"),
    Bad("block is text", GPTQ, lambda d, f: (d.config.update(quantization_config="gptq"),
        d.save(f)), "config.json quantization_config", "'gptq'"),
    Bad("side bits", GPTQ, side(SIDE, bits=8), "configs", "bits 4 in config.json"),
    Bad("side groups", GPTQ, side(SIDE, group_size=32), "configs", "group_size"),
    Bad("side sym", GPTQ, side(SIDE, sym=True), "configs", "sym False"),
    Bad("side v2", GPTQ, side(SIDE, checkpoint_format="gptq_v2"), "configs",
        "checkpoint_format 'gptq'"),
    Bad("side method", GPTQ, side(SIDE, quant_method="awq"), "configs",
        "quant_method 'gptq'"),
    Bad("side alias", AWQ, side("quant_config.json", bits=None, w_bit=3), "configs", "bits 4"),
    Bad("side version", AWQ, side("quant_config.json", version="GEMV"), "configs", "version"),
    Bad("side broken", GPTQ, lambda d, f: (d.save(f),
        (f / "quantize_config.json").write_text("{")), "quantize_config.json", "no JSON"),
]  # fmt: skip

CONTRADICTIONS = [
    Bad("8 bits", GPTQ, keys(bits=8), f"{GATE}.qweight", "I32[16, 128]"),
    Bad("3 bits", GPTQ, keys(bits=3), f"{GATE}.qweight", "I32[16, 128]"),
    Bad("5 bits", GPTQ, keys(bits=5), "quantization_config.bits", "5"),
    Bad("0 bits", GPTQ, keys(bits=0), "quantization_config.bits", "0"),
    Bad("no bits", GPTQ, lambda d, f: d.drop("bits").save(f), "bits", "no such key"),
    Bad("bits as text", GPTQ, keys(bits="4"), "quantization_config.bits", "'4'"),
    Bad("bits as a fraction", GPTQ, keys(bits=4.0), "quantization_config.bits", "4.0"),
    Bad("bits as true", GPTQ, keys(bits=True), "quantization_config.bits", "True"),
    Bad("bits as a list", GPTQ, keys(bits=[4]), "quantization_config.bits", "[4]"),
    Bad("two bits", GPTQ, keys(w_bit=8), "bits and w_bit", "4 and 8"),
    Bad("group too large", GPTQ, keys(group_size=128), f"{GATE}.qzeros", "I32[2, 16]"),
    Bad("group too small", GPTQ, keys(group_size=32), f"{GATE}.qzeros", "I32[2, 16]"),
    Bad("channelwise", GPTQ, keys(group_size=-1), f"{GATE}.qzeros", "I32[2, 16]"),
    Bad("group 0", GPTQ, keys(group_size=0), "quantization_config.group_size", "0"),
    Bad("group -2", GPTQ, keys(group_size=-2), "quantization_config.group_size", "-2"),
    Bad("group as text", GPTQ, keys(group_size="64"), "quantization_config.group_size", "'64'"),
    Bad("sym as text", GPTQ, keys(sym="false"), "quantization_config.sym", "'false'"),
    Bad("sym as a number", GPTQ, keys(sym=0), "quantization_config.sym", "0"),
    Bad("desc_act as text", GPTQ, keys(desc_act="no"), "quantization_config.desc_act", "'no'"),
    Bad("words", GPTQ, keys(pack_dtype="int16"), "quantization_config.pack_dtype", "'int16'"),
    Bad("dynamic a list", GPTQ, keys(dynamic=[1]), "quantization_config.dynamic", "[1]"),
    Bad("dynamic no regex", GPTQ, keys(dynamic={"+:(": {}}), "quantization_config.dynamic", "+:("),
    Bad("dynamic no object", GPTQ, keys(dynamic={"+:.*": 4}), "quantization_config.dynamic", "4"),
    Bad("dynamic text", GPTQ, keys(dynamic={"+:.*": {"bits": "4"}}), "dynamic for model", "'4'"),
    Bad("dynamic bits", GPTQ, keys(dynamic={"+:.*": {"bits": 7}}), f"{GATE}.bits", "7"),
    Bad("dynamic group", GPTQ, keys(dynamic={"+:.*": {"group_size": 0}}), GATE, "group_size 0"),
    Bad("dynamic skip", GPTQ, keys(dynamic={"-:.*q_proj": {}}), f"{Q}.qweight", "a quantized lin"),
    Bad("marlin", GPTQ, keys(checkpoint_format="marlin", format="marlin"), "format", "'marlin'"),
    Bad("marlin flag", GPTQ, keys(is_marlin_format=True), "format", "'marlin'"),
    Bad("odd format", GPTQ, keys(checkpoint_format="v9", format="v9"), "format", "'v9'"),
    Bad("format number", GPTQ, keys(checkpoint_format=2, format=2), "checkpoint_format", "2"),
    Bad("two formats", GPTQ, keys(format="gptq_v2"), "checkpoint_format and format", "'gptq' and"),
    Bad("v1 called v2", SYM, keys(checkpoint_format="gptq_v2", format="gptq_v2"),
        f"{GATE}.qzeros", "zeros of a symmetric v1 file", data=True),
    Bad("v2 called v1", SYM, v2_written_as_v1, f"{GATE}.qzeros", "a symmetric v2 file", data=True),
    Bad("planar", "gptq_p-3b-sym-g128", lambda d, f: d.save(f), "checkpoint_format", "'gptq_p'"),
    Bad("unknown method", GPTQ, keys(quant_method="hqq", method="hqq"), "", "quant_method 'hqq'"),
    Bad("method number", GPTQ, keys(quant_method=5, method=5), "", "quant_method 5"),
    Bad("AWQ called GPTQ", AWQ, keys(quant_method="gptq"), "quant_method", "stored as 'gemm'"),
    Bad("GPTQ called AWQ", GPTQ, keys(quant_method="awq", method="awq", format="gemm",
        checkpoint_format=None), "quant_method", "stored as 'gptq'"),
    Bad("gemv tensors as gemm", "awq-gemv-g64", keys(version="gemm"), "version", "as 'gemv'"),
    Bad("gemm called gemv", AWQ, keys(version="gemv"), "quantization_config.version", "'gemv'"),
    Bad("awq 8 bits", AWQ, keys(bits=8), "quantization_config.bits", "8"),
    Bad("awq bits as text", AWQ, keys(bits="4"), "quantization_config.bits", "'4'"),
    Bad("awq group", AWQ, keys(group_size=64), f"{GATE}.qzeros", "I32[1, 16]"),
    Bad("awq odd group", AWQ, keys(group_size=96), f"{GATE}.qweight", "group_size 96"),
    Bad("awq group 0", AWQ, keys(group_size=0), "quantization_config.group_size", "0"),
    Bad("awq group -2", AWQ, keys(group_size=-2), "quantization_config.group_size", "-2"),
    Bad("awq zero_point", AWQ, keys(zero_point="true"), "quantization_config.zero_point", "'true'"),
    Bad("awq skip text", AWQ, keys(modules_to_not_convert="lm_head"), "not_convert", "'lm_head'"),
    Bad("awq no config", AWQ, lambda d, f: d.drop(*d.block).set(quant_method="awq").save(f),
        "quantization_config.bits", "no such key"),
]  # fmt: skip

TENSORS = [
    *(
        Bad(f"{golden}: no {part}", golden, without(f"{Q}.{part}"), f"{Q}.{part}", "no such tensor")
        for golden, parts in (
            (GPTQ, ("qweight", "qzeros", "scales", "g_idx")),
            (AWQ, ("qweight", "qzeros", "scales")),
        )
        for part in parts
    ),
    Bad("no qweight at all", GPTQ, lambda d, f: ([d.tensors.pop(n) for n in list(d.tensors)
        if n.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))], d.save(f)),
        "headers", "no `*.qweight` tensor"),
    Bad("short qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a[:-1]), Q, "I32[15, 128]"),
    Bad("narrow qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a[:, :-8]), Q, "I32[2, 16]"),
    Bad("flat qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a.ravel()), Q, "I32[2048]"),
    Bad("empty qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a[:0]), Q, "I32[0, 128]"),
    Bad("short qzeros", GPTQ, tensor(f"{Q}.qzeros", lambda a: a[:-1]), f"{Q}.qzeros", "I32[1, 16]"),
    Bad("flat qzeros", GPTQ, tensor(f"{Q}.qzeros", lambda a: a.ravel()), f"{Q}.qzeros", "I32[32]"),
    Bad("short scales", GPTQ, tensor(f"{Q}.scales", lambda a: a[:-1]), Q, "F16[1, 128]"),
    Bad("short g_idx", GPTQ, tensor(f"{Q}.g_idx", lambda a: a[:-8]), Q, "I32[16, 128]"),
    Bad("wide qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a.astype(np.int64)), Q, "I64[16"),
    Bad("float qzeros", GPTQ, tensor(f"{Q}.qzeros", lambda a: a.astype(np.float32)), Q, "F32[2"),
    Bad("double scales", GPTQ, tensor(f"{Q}.scales", lambda a: a.astype(np.float64)), Q, "F64[2"),
    Bad("int scales", GPTQ, tensor(f"{Q}.scales", lambda a: a.view(np.int16)), Q, "I16[2, 128]"),
    Bad("wide g_idx", GPTQ, tensor(f"{Q}.g_idx", lambda a: a.astype(np.int64)), Q, "I64[128]"),
    Bad("g_idx too large", GPTQ, poke(f"{Q}.g_idx", (5,), 2), f"{Q}.g_idx", "from 0 to 2"),
    Bad("g_idx negative", GPTQ, poke(f"{Q}.g_idx", (5,), -1), f"{Q}.g_idx", "from -1 to 1"),
    Bad("awq short", AWQ, tensor(f"{Q}.qweight", lambda a: a[:-1]), f"{Q}.qweight", "127 inputs"),
    Bad("awq narrow", AWQ, tensor(f"{Q}.scales", lambda a: a[:, :-8]), Q, "F16[1, 120]"),
    Bad("awq flat", AWQ, tensor(f"{Q}.qzeros", lambda a: a.ravel()), f"{Q}.qzeros", "I32[16]"),
    Bad("awq int scales", AWQ, tensor(f"{Q}.scales", lambda a: a.view(np.int16)), Q, "I16[1, 128]"),
    *(
        Bad(f"{golden}: scale {value}", golden, poke(f"{Q}.scales", (0, 5), value),
            f"{Q}.scales", "1 scales that are NaN or infinite", data=True)
        for golden in (GPTQ, AWQ)
        for value in (float("nan"), float("inf"), float("-inf"))
    ),
]  # fmt: skip

FOLDERS = [
    Bad("no folder", GPTQ, lambda d, f: None, "", "no such folder"),
    Bad("a file", GPTQ, lambda d, f: f.write_text("x"), "", "a file"),
    Bad("empty folder", GPTQ, lambda d, f: f.mkdir(), "config.json", "no such file"),
    Bad("config only", GPTQ, lambda d, f: d.save_small(f), SHARD, "no such file"),
    Bad("pickles only", GPTQ, pickles, "", "a pickle, which can run any code"),
]

HOSTILE = [*DAMAGED, *INDEXES, *CONFIGS, *CONTRADICTIONS, *TENSORS, *FOLDERS]


def check(error: QplugError, bad: Bad, source: Path) -> None:
    """Hold one error to what every error must be."""
    everything = [error, *error.others]
    # repr: what cannot be printed is escaped in the one line.
    assert any(bad.where in one.where and bad.found in str(one) for one in everything), [
        (one.where, str(one)) for one in everything
    ]
    for one in everything:
        assert one.where
        assert one.fix, f"what to do about: {one}"
        assert str(one).isprintable()
        assert one.fix.isprintable()
        assert not str(one).endswith(".")


@pytest.mark.parametrize("bad", [b for b in HOSTILE if not b.data], ids=lambda b: b.name)
def test_library(bad: Bad, tmp_path: Path) -> None:
    """Opening or reading the scheme, headers only, raises the one error."""
    source = tmp_path / "source"
    bad.write(Draft.of(bad.golden), source)
    with pytest.raises(QplugError) as caught:
        open_checkpoint(source).scheme()
    check(caught.value, bad, source)


@pytest.mark.parametrize("bad", HOSTILE, ids=lambda b: b.name)
def test_command_line(bad: Bad, tmp_path: Path, qplug: Command) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    bad.write(Draft.of(bad.golden), source)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
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
    assert not (tmp_path / "new").exists()
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_all_problems_at_once(tmp_path: Path, qplug: Command) -> None:
    """Ten are shown and the rest counted."""
    draft = Draft.of("gptq-moe-mixtral-4b-g64")
    for name in list(draft.tensors):
        if name.endswith(".qzeros"):
            del draft.tensors[name]
    ran = qplug("inspect", draft.save(tmp_path / "source"))
    assert ran.code == 1
    assert len(ran.errors) == 10
    count = sum(name.endswith(".qweight") for name in draft.tensors)
    assert f"and {count - 10} more problems" in ran.err
    ran = qplug("inspect", tmp_path / "source", "--json")
    assert ran.error["count"] == count


def test_the_copy_that_changes_nothing_is_good(tmp_path: Path) -> None:
    """The cases above fail for what they change, not for how they are written."""
    for golden in (GPTQ, SYM, AWQ):
        Draft.of(golden).save(tmp_path / golden)
        convert(tmp_path / golden, tmp_path / f"{golden}-out")
        assert verify(open_checkpoint(GOLDEN / golden), open_checkpoint(tmp_path / golden)).same
    Draft.of(GPTQ).save_sharded(tmp_path / "sharded", 3)
    assert verify(open_checkpoint(GOLDEN / GPTQ), open_checkpoint(tmp_path / "sharded")).same


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


def test_a_copied_linear_is_read_before_it_is_believed(tmp_path: Path, qplug: Command) -> None:
    source = tmp_path / "source"
    poke(f"{Q}.scales", (0, 5), float("nan"))(Draft.of(GPTQ), source)
    ran = qplug("convert", source, tmp_path / "target", "--to", "gptq")
    assert ran.code == 1
    assert not (tmp_path / "target").exists()


# The canonical form ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canonical") / "out"
    convert(GOLDEN / "gptq-4b-sym-g64-actorder", folder)
    return folder


def entry_of(draft: Draft) -> dict[str, object]:
    found: dict[str, object] = draft.block["modules"][Q]
    return found


def change(how: Callable[[Draft], object]) -> Write:
    return lambda draft, folder: (how(draft), draft.save(folder))


CANONICAL = [
    Bad("version 2", "", keys(version=2), "quantization_config.version", "2"),
    Bad("version as text", "", keys(version="1"), "quantization_config.version", "'1'"),
    Bad("no modules", "", keys(modules={}), "modules", "no entry"),
    Bad("modules a list", "", keys(modules=[1]), "quantization_config.modules", "[1]"),
    Bad("no entry", "", change(lambda d: d.block["modules"].pop(Q)), f"modules.{Q}", "no entry"),
    Bad("no tensors", "", change(lambda d: d.block["modules"].update(x=entry_of(d))),
        "x", "no tensors"),
    Bad("entry a list", "", change(lambda d: d.block["modules"].update({Q: [4]})), Q, "[4]"),
    Bad("bits 9", "", change(lambda d: entry_of(d).update(bits=9)), Q, "9"),
    Bad("bits as text", "", change(lambda d: entry_of(d).update(bits="4")), Q, "'4'"),
    Bad("other bits", "", change(lambda d: entry_of(d).update(bits=3)), Q, "U8[128, 64]"),
    Bad("group 0", "", change(lambda d: entry_of(d).update(group_size=0)), Q, "0"),
    Bad("other group", "", change(lambda d: entry_of(d).update(group_size=32)), Q, "F16[128, 2]"),
    Bad("other inputs", "", change(lambda d: entry_of(d).update(in_features=120)), Q, "U8[128"),
    Bad("empty", "", tensor(f"{Q}.codes", lambda a: a[:0]), f"{Q}.codes", "U8[0, 64]"),
    Bad("flat", "", tensor(f"{Q}.codes", lambda a: a.ravel()), f"{Q}.codes", "U8[8192]"),
    Bad("no scales", "", without(f"{Q}.scales"), f"{Q}.scales", "no such tensor"),
    Bad("no zeros", "", without(f"{Q}.zeros"), f"{Q}.zeros", "no such tensor"),
    Bad("no codes", "", without(f"{Q}.codes"), f"{Q}.codes", "no tensors"),
    Bad("wide zeros", "", tensor(f"{Q}.zeros", lambda a: a.astype(np.int32)), Q, "I32[128, 2]"),
    Bad("g_idx", "", poke(f"{Q}.g_idx", (0,), 2), f"{Q}.g_idx", "to 2"),
]  # fmt: skip


@pytest.mark.parametrize("bad", CANONICAL, ids=lambda b: b.name)
def test_canonical(bad: Bad, canonical: Path, tmp_path: Path) -> None:
    bad.write(Draft.of(canonical), tmp_path / "source")
    with pytest.raises(QplugError) as caught:
        open_checkpoint(tmp_path / "source").scheme()
    check(caught.value, bad, tmp_path)
