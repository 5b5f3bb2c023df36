"""Numbers made to mislead, where headers and config agree: scales, zeros, orders, tables, records.

Each case reaches the code that reads tensors (`peek`, survey, plan, codec) and is refused there,
with the tensor named and nothing written.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Command, Draft, Q, Stored, convert
from spoil import AWQ, GPTQ, Bad, Write, refused_on_the_way

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.verdict import Verdict
from qplug_converters.verify import verify

ORDERED = "gptq-4b-sym-g64-actorder"
V2 = "gptq_v2-4b-asym-g64"
GEMV, FAST = "awq-gemv-g64", "awq-gemv_fast-g64"
CT, CT_ORDERED, CT_CHANNEL = "ct-int4-asym-g64", "ct-int4-asym-g64-gidx", "ct-int8-sym-channel"
NF4, NESTED, FP4, INT8 = "bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"
AFTER = "bnb-nf4-after-forward"
EXPERTS = "gptq-moe-mixtral-4b-g64"
EXPERT = "model.layers.0.mlp.experts.0.gate_proj"
NAN, INF, NINF = float("nan"), float("inf"), float("-inf")
STATE = "weight.quant_state.bitsandbytes__nf4"

WIDTHS = {"F16": "<e", "F32": "<f", "I32": "<i", "I64": "<q", "U8": "<B", "I16": "<h", "I8": "<b"}


def value(part: str, number: float, at: int = 0, module: str = Q) -> Write:
    """Put one number into a tensor; bfloat16 is cut from float32."""

    def write(draft: Draft, folder: Path) -> None:
        stored = draft.tensors[f"{module}.{part}"]
        raw = bytearray(stored.data)
        if stored.dtype == "BF16":
            one = struct.pack("<f", number)[2:]
        else:
            one = struct.pack(WIDTHS[stored.dtype], number)
        raw[at * len(one) : (at + 1) * len(one)] = one
        draft.tensors[f"{module}.{part}"] = Stored(stored.dtype, stored.shape, bytes(raw))
        draft.save(folder)

    return write


def all_values(part: str, raw: bytes) -> Write:
    """Fill a tensor with one value."""

    def write(draft: Draft, folder: Path) -> None:
        stored = draft.tensors[f"{Q}.{part}"]
        data = (raw * len(stored.data))[: len(stored.data)]
        draft.tensors[f"{Q}.{part}"] = Stored(stored.dtype, stored.shape, data)
        draft.save(folder)

    return write


def put(part: str, dtype: str, shape: list[int], raw: bytes = b"") -> Write:
    """Replace a tensor by one whose header is in order."""

    def write(draft: Draft, folder: Path) -> None:
        size = int(np.prod(shape)) * {"F32": 4, "I32": 4, "I64": 8, "F16": 2, "BF16": 2}.get(
            dtype, 1
        )
        draft.tensors[f"{Q}.{part}"] = Stored(
            dtype, shape, (raw or bytes(1)) * (size // len(raw or b"x"))
        )
        draft.save(folder)

    return write


def record(**changes: Any) -> Write:
    """Change keys of a quant_state; `None` drops one."""

    def write(draft: Draft, folder: Path) -> None:
        name = f"{Q}.{STATE}"
        said = json.loads(draft.tensors[name].data) | changes
        raw = json.dumps({k: v for k, v in said.items() if v is not None}).encode()
        draft.tensors[name] = Stored("U8", [len(raw)], raw)
        draft.save(folder)

    return write


def record_text(raw: bytes) -> Write:
    return put(STATE, "U8", [len(raw)], raw)


GROUPS = [
    *(
        Bad(f"{golden}: g_idx of {number}", golden, value(part, number), f"{Q}.{part}", found)
        for golden, part in ((GPTQ, "g_idx"), (ORDERED, "g_idx"), (V2, "g_idx"))
        for number, found in ((-(1 << 31), "from -2147483648"), ((1 << 31) - 1, "to 2147483647"))
    ),
    Bad("experts: g_idx", EXPERTS, value("g_idx", 9,
        module=EXPERT), f"{EXPERT}.g_idx", "to 9"),
    Bad("ct: g_idx", CT_ORDERED, value("weight_g_idx", 2), f"{Q}.weight_g_idx", "to 2"),
    Bad("ct: g_idx of -2", CT_ORDERED, value("weight_g_idx", -2), f"{Q}.weight_g_idx", "-2"),
    Bad("ct: shape 0", CT, all_values("weight_shape", bytes(8)), f"{Q}.weight_shape", "[0, 0]"),
    Bad("ct: shape 2^63 - 1", CT, value("weight_shape", (1 << 63) - 1, 1), f"{Q}.weight_shape",
        "9223372036854775807"),
    Bad("ct: shape -128", CT, value("weight_shape", -128, 0), f"{Q}.weight_shape", "-128"),
    Bad("ct: shape of one more", CT, value("weight_shape", 129, 1), Q, "128"),
    Bad("ct: zeros above the grid", CT_CHANNEL, put("weight_zero_point", "I32", [32, 1]), Q,
        "zero points"),
]  # fmt: skip

SCALES = [
    *(
        Bad(f"{golden}: {part} {number}", golden, value(part, number), f"{Q}.{part}",
            f"1 {part} that are NaN or infinite")
        for golden, part in (
            (V2, "scales"),
            (ORDERED, "scales"),
            (AWQ, "scales"),
            (GEMV, "scales"),
            (FAST, "scales"),
            (CT, "weight_scale"),
            (CT_ORDERED, "weight_scale"),
            (CT_CHANNEL, "weight_scale"),
            (NF4, "weight.absmax"),
            (FP4, "weight.absmax"),
            (AFTER, "weight.absmax"),
            (INT8, "SCB"),
        )
        for number in (NAN, INF, NINF)
    ),
    Bad("offsets NaN", FAST, value("qzeros", NAN), f"{Q}.qzeros", "NaN or infinite"),
    Bad("offsets infinite", FAST, value("qzeros", NINF), f"{Q}.qzeros", "NaN or infinite"),
    Bad("nested absmax NaN", NESTED, value("weight.nested_absmax", NAN, 0),
        f"{Q}.weight.nested_absmax", "NaN or infinite"),
    Bad("nested absmax infinite", NESTED, value("weight.nested_absmax", INF, 0),
        f"{Q}.weight.nested_absmax", "NaN or infinite"),
    Bad("all scales NaN", GPTQ, all_values("scales", b"\xff\xff"), Q, "256 scales that"),
    Bad("table NaN", NF4, value("weight.quant_map", NAN), f"{Q}.weight.quant_map", "NaN"),
    Bad("table infinite", NF4, value("weight.quant_map", INF), f"{Q}.weight.quant_map", "infinite"),
    Bad("nested table NaN", NESTED, value("weight.nested_quant_map", NAN),
        f"{Q}.weight.nested_quant_map", "NaN"),
]  # fmt: skip

RECORDS = [
    Bad("blocks of 0", NF4, record(blocksize=0), f"{STATE}.blocksize", "0"),
    Bad("blocks of -64", NF4, record(blocksize=-64), f"{STATE}.blocksize", "-64"),
    Bad("blocks of 63", NF4, record(blocksize=63), f"{STATE}.blocksize", "63"),
    Bad("blocks of 64.0", NF4, record(blocksize=64.0), f"{STATE}.blocksize", "64.0"),
    Bad("blocks of true", NF4, record(blocksize=True), f"{STATE}.blocksize", "true"),
    Bad("blocks of 128", NF4, record(blocksize=128), f"{Q}.weight.absmax", "F32[256]"),
    Bad("another type", NF4, record(quant_type="fp4"), f"{STATE}.quant_type", "'fp4'"),
    Bad("shape of 2^62", NF4, record(shape=[1 << 62, 1 << 62]), f"{STATE}.shape", "46116860"),
    Bad("shape of 2^30", NF4, record(shape=[1 << 30, 1 << 30]), f"{Q}.weight", "U8[8192, 1]"),
    Bad("shape negative", NF4, record(shape=[-128, -128]), f"{STATE}.shape", "[-128, -128]"),
    Bad("shape 0", NF4, record(shape=[0, 128]), f"{STATE}.shape", "[0, 128]"),
    Bad("shape of three", NF4, record(shape=[2, 64, 128]), f"{STATE}.shape", "[2, 64, 128]"),
    Bad("shape text", NF4, record(shape="128"), f"{STATE}.shape", '"128"'),
    Bad("a key more", NF4, record(transform="hadamard"), f"{STATE}.transform", "an unknown key"),
    Bad("nested halfway", NF4, record(nested_blocksize=256), STATE, "no such key"),
    Bad("nested offset NaN", NESTED, record(nested_offset=NAN), f"{STATE}.nested_offset", "NaN"),
    Bad("nested offset 1e39", NESTED, record(nested_offset=1e39), f"{STATE}.nested_offset",
        "1e+39"),
    Bad("nested blocks of 0", NESTED, record(nested_blocksize=0), f"{STATE}.nested_blocksize", "0"),
    Bad("nested blocks of 64", NESTED, record(nested_blocksize=64), "nested_absmax", "F32[1]"),
    Bad("no JSON", NF4, record_text(b"{'quant_type': 'nf4'}"), STATE, "no JSON"),
    Bad("a list", NF4, record_text(b"[1, 2]"), STATE, "a JSON list"),
    Bad("a key twice", NF4, record_text(b'{"a": 1, "a": 2}'), STATE, "no JSON"),
    Bad("a pickle", NF4, record_text(b"\x80\x04\x95."), STATE, "no JSON"),
    Bad("nested lists", NF4, record_text(b"[" * 4000), STATE, "no JSON"),
    Bad("5 kB", NF4, record_text(b'{"a": "' + b"x" * 5000 + b'"}'), STATE, "U8[5009]"),
    Bad("empty", NF4, put(STATE, "U8", [0]), STATE, "U8[0]"),
    Bad("a table of 15", NF4, put("weight.quant_map", "F32", [15]), "quant_map", "F32[15]"),
    Bad("a table of bytes", NF4, put("weight.quant_map", "U8", [16]), "quant_map", "U8[16]"),
    Bad("absmax of 1", NF4, put("weight.absmax", "F32", [1]), f"{Q}.weight.absmax", "F32[1]"),
    Bad("absmax codes wide", NESTED, put("weight.absmax", "I32", [256]), "absmax", "I32[256]"),
    Bad("no table", NESTED, put("weight.nested_quant_map", "F32", [0]), "nested_quant_map",
        "F32[0]"),
    Bad("SCB short", INT8, put("SCB", "F32", [127]), f"{Q}.SCB", "F32[127]"),
    Bad("SCB square", INT8, put("SCB", "F32", [128, 1]), f"{Q}.SCB", "F32[128, 1]"),
    Bad("col_turing", INT8, put("weight_format", "U8", [], b"\2"), f"{Q}.weight_format", "2"),
    Bad("format 255", INT8, put("weight_format", "U8", [], b"\xff"), f"{Q}.weight_format", "255"),
]  # fmt: skip

SHAPES = [
    Bad("gemv: scales narrow", GEMV, put("scales", "F16", [128, 2]), f"{Q}.scales", "F16[128, 2]"),
    Bad("gemv: zeros narrow", GEMV, put("qzeros", "I32", [128, 1]), f"{Q}.qzeros", "I32[128, 1]"),
    Bad("gemv: empty", GEMV, put("qweight", "I32", [0, 16]), f"{Q}.qweight", "I32[0, 16]"),
    Bad("fast: words of 32", FAST, put("qweight", "I32", [32, 64]), f"{Q}.qweight", "I32[32, 64]"),
    Bad("fast: zeros packed", FAST, put("qzeros", "I32", [16, 128]), f"{Q}.qzeros", "I32[16, 128]"),
    Bad("fast: few scales", FAST, put("scales", "F16", [1, 128]), f"{Q}.scales", "F16[1, 128]"),
    Bad("ct: scales short", CT, put("weight_scale", "F16", [127, 2]), Q, "F16[127, 2]"),
    Bad("ct: no groups", CT, put("weight_scale", "F16", [128, 0]), Q, "F16[128, 0]"),
    Bad("ct: float64 scales", CT, put("weight_scale", "F64", [128, 0]), Q, "F64[128, 0]"),
    Bad("ct: zeros of another packing", CT, put("weight_zero_point", "I32", [128, 2]),
        f"{Q}.weight_zero_point", "I32[128, 2]"),
    Bad("ct: five axes", CT, put("weight_packed", "I32", [2, 2, 2, 2, 128]), Q, "I32[2, 2, 2,"),
]  # fmt: skip

TENSORS = [*GROUPS, *SCALES, *RECORDS, *SHAPES]


@pytest.mark.parametrize("bad", TENSORS, ids=lambda b: b.name)
def test_refused(bad: Bad, tmp_path: Path) -> None:
    refused_on_the_way(bad, tmp_path)


@pytest.mark.parametrize(
    ("golden", "to"), [(GPTQ, "gptq"), (CT, "ct"), (AWQ, "awq"), (FAST, "awq-gemv-fast")]
)
def test_a_copy_is_looked_at_too(golden: str, to: str, tmp_path: Path) -> None:
    part = "weight_scale" if golden == CT else "scales"
    bad = Bad("", golden, value(part, NAN), f"{Q}.{part}", "NaN or infinite")
    refused_on_the_way(bad, tmp_path, to)


def test_names_with_terminal_codes_are_printed_escaped(tmp_path: Path, qplug: Command) -> None:
    draft = Draft.of(GPTQ)
    evil = "model.layers.0.\x1b[2J\r\nerror: none\0.q_proj"
    for name in list(draft.tensors):
        if name.startswith(f"{Q}."):
            draft.tensors[name.replace(Q, evil)] = draft.tensors.pop(name)
    source = draft.save(tmp_path / "source")
    for command in (("inspect", source), ("convert", source, tmp_path / "target", "--to", "awq")):
        ran = qplug(*command)
        assert ran.code == 0
        shown = ran.out + ran.err
        assert all(line.isprintable() for line in shown.split("\n")), shown
        assert not any(line.startswith("error") for line in shown.splitlines())
    assert f"{evil}.qweight" in open_checkpoint(tmp_path / "target").headers


def test_a_scale_of_zero_hides_what_it_multiplies(tmp_path: Path) -> None:
    """Offsets give no zeros back then, and the weights are 0 all the same: rounded, no more."""
    value("scales", 0.0)(Draft.of(AWQ), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "target", "awq_gemv_fast")
    convert(tmp_path / "target", tmp_path / "back", "awq")
    for name in ("target", "back"):
        proof = verify(open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / name))
        assert proof.verdict is Verdict.ROUNDED
        assert not proof.problems
