"""Bad bitsandbytes files: records, tables and shapes that lie, each told where it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laws
import numpy as np
import pytest
from builders import Draft, Q, Stored

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.formats import find
from qplug_converters.plan import make_plan

W = f"{Q}.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"


def edited(name: str, folder: Path, change: Callable[[Draft], object]) -> Path:
    """Copy a golden and change it."""
    draft = Draft.of(name)
    change(draft)
    return draft.save(folder)


def said(draft: Draft, **changes: Any) -> None:
    """Change the record of one linear; `...` drops a key."""
    name = next(n for n in draft.tensors if n.startswith(f"{W}.quant_state"))
    state = json.loads(draft.tensors[name].data) | changes
    text = json.dumps({key: value for key, value in state.items() if value is not ...})
    draft.tensors[name] = Stored.of(np.frombuffer(text.encode(), np.uint8))


@dataclass(frozen=True)
class Bad:
    """One thing wrong: how the golden is changed, and what is said of it."""

    name: str
    change: Callable[[Draft], object]
    where: str
    found: str
    golden: str = "bnb-nf4-dq"


def state(**changes: Any) -> Callable[[Draft], object]:
    return lambda draft: said(draft, **changes)


def raw(data: bytes, dtype: str = "U8") -> Callable[[Draft], object]:
    tensor = Stored(dtype, [len(data)], data)
    return lambda draft: draft.tensors.update({STATE: tensor})


def without(name: str) -> Callable[[Draft], object]:
    return lambda draft: draft.tensors.pop(name)


def put(name: str, array: np.ndarray, dtype: str = "") -> Callable[[Draft], object]:
    return lambda draft: draft.tensors.update({name: Stored.of(array, dtype)})


def moved(old: str, new: str) -> Callable[[Draft], object]:
    return lambda draft: draft.tensors.update({new: draft.tensors.pop(old)})


FUSED = "model.layers.0.mlp.experts.gate_up_proj.quant_state.bitsandbytes__nf4"
RECORDS = [
    Bad("no JSON", raw(b"{'quant_type'"), STATE, "no JSON"),
    Bad("no text", raw(b"\xff\xfe{}"), STATE, "no JSON"),
    Bad("nested", raw(b"[" * 4096), STATE, "no JSON"),
    Bad("a list", raw(b"[1]"), STATE, "a JSON list"),
    Bad("null", raw(b"null"), STATE, "a JSON NoneType"),
    Bad("empty", raw(b""), STATE, "U8[0]"),
    Bad("huge", raw(b" " * 5000 + b"{}"), STATE, "U8[5002]"),
    Bad("of another dtype", raw(b"{}", "I8"), STATE, "I8[2]"),
    Bad("a key twice", raw(b'{"shape": [1, 1], "shape": [2, 2]}'), STATE, "twice"),
    Bad("a huge number", raw(b'{"blocksize": ' + b"9" * 4000 + b"}"), STATE, "99999"),
    Bad("unknown key", state(rotation="hadamard"), f"{STATE}.rotation", "unknown key"),
    Bad("type no other", state(quant_type="af4"), f"{STATE}.quant_type", '"af4"'),
    Bad("type of another name", state(quant_type="fp4"), f"{STATE}.quant_type", "'fp4'"),
    Bad("type no text", state(quant_type=4), f"{STATE}.quant_type", "4"),
    Bad("no type", state(quant_type=...), f"{STATE}.quant_type", "no such key"),
    Bad("blocksize 0", state(blocksize=0), f"{STATE}.blocksize", "0"),
    Bad("blocksize negative", state(blocksize=-64), f"{STATE}.blocksize", "-64"),
    Bad("blocksize 96", state(blocksize=96), f"{STATE}.blocksize", "96"),
    Bad("blocksize true", state(blocksize=True), f"{STATE}.blocksize", "true"),
    Bad("blocksize text", state(blocksize="64"), f"{STATE}.blocksize", '"64"'),
    Bad("blocksize fractional", state(blocksize=64.0), f"{STATE}.blocksize", "64.0"),
    Bad("blocksize another", state(blocksize=128), f"{W}.absmax", "U8[256]"),
    Bad("no blocksize", state(blocksize=...), f"{STATE}.blocksize", "no such key"),
    Bad("dtype int8", state(dtype="int8"), f"{STATE}.dtype", '"int8"'),
    Bad("shape null", state(shape=None), f"{STATE}.shape", "null"),
    Bad("no shape", state(shape=...), f"{STATE}.shape", "null"),
    Bad("shape of three", state(shape=[2, 64, 128]), f"{STATE}.shape", "[2, 64, 128]"),
    Bad("shape negative", state(shape=[-128, -128]), f"{STATE}.shape", "[-128, -128]"),
    Bad("shape of text", state(shape="128"), f"{STATE}.shape", '"128"'),
    Bad("shape of a boolean", state(shape=[True, 16384]), f"{STATE}.shape", "[true, 16384]"),
    Bad("shape enormous", state(shape=[1 << 31, 1 << 31]), f"{STATE}.shape", "2147483648"),
    Bad("shape larger", state(shape=[129, 128]), W, "U8[8192, 1]"),
    Bad("shape smaller", state(shape=[64, 128]), W, "U8[8192, 1]"),
    Bad("nested_blocksize 100", state(nested_blocksize=100), f"{STATE}.nested_blocksize", "100"),
    Bad("nested_blocksize another", state(nested_blocksize=32), f"{W}.nested_absmax", "F32[1]"),
    Bad("nested_dtype", state(nested_dtype="float64"), f"{STATE}.nested_dtype", '"float64"'),
    Bad("no nested_dtype", state(nested_dtype=...), f"{STATE}.nested_dtype", "no such key"),
    Bad("offset NaN", state(nested_offset=float("nan")), f"{STATE}.nested_offset", "NaN"),
    Bad("offset infinite", state(nested_offset=float("inf")), f"{STATE}.nested_offset", "Inf"),
    Bad("offset 1e39", state(nested_offset=1e39), f"{STATE}.nested_offset", "1e+39"),
    Bad("offset text", state(nested_offset="0"), f"{STATE}.nested_offset", '"0"'),
    Bad("offset true", state(nested_offset=True), f"{STATE}.nested_offset", "true"),
    Bad("nested keys gone",
        state(nested_blocksize=..., nested_dtype=..., nested_offset=...), f"{W}.absmax", "U8"),
    Bad("two records", lambda d: d.tensors.update({STATE[:-3] + "fp4": d.tensors[STATE]}),
        STATE[:-3] + "fp4", "a second"),
    Bad("unknown type", moved(STATE, STATE[:-3] + "af4"), f"{STATE[:-3]}af4.quant_type", "'nf4'"),
    Bad("a fused parameter", moved(STATE, FUSED), FUSED, "no linear's weight"),
    Bad("record of nothing", moved(STATE, "weight" + STATE.removeprefix(W)), "weight", "no linear"),
    Bad("no record", without(STATE), W, "no quant_state"),
    Bad("no codes", without(W), W, "no such tensor"),
    Bad("no absmax", without(f"{W}.absmax"), f"{W}.absmax", "no such tensor"),
    Bad("no table", without(f"{W}.quant_map"), f"{W}.quant_map", "no such tensor"),
    Bad("no nested_absmax", without(f"{W}.nested_absmax"), f"{W}.nested_absmax", "no such"),
    Bad("no nested table", without(f"{W}.nested_quant_map"), f"{W}.nested_quant_map", "no such"),
    Bad("short table", put(f"{W}.quant_map", np.ones(8, np.float32)), f"{W}.quant_map", "F32[8]"),
    Bad("table of halves", put(f"{W}.quant_map", np.ones(16, np.float16)), f"{W}.quant_map", "F16"),
    Bad("table of NaN", put(f"{W}.quant_map", np.full(16, np.nan, np.float32)), f"{W}.quant_map",
        "NaN"),
    Bad("nested table of NaN", put(f"{W}.nested_quant_map", np.full(256, np.nan, np.float32)),
        f"{W}.nested_quant_map", "NaN"),
    Bad("words of int32", put(W, np.zeros((2048, 1), np.int32)), W, "I32[2048, 1]"),
    Bad("words in a square", put(W, np.zeros((128, 64), np.uint8)), W, "U8[128, 64]"),
    Bad("absmax in a square", put(f"{W}.absmax", np.ones((2, 128), np.uint8)), f"{W}.absmax",
        "U8[2, 128]"),
    Bad("absmax transposed the other way", put(f"{W}.absmax", np.ones((128, 2), np.int16), "BF16"),
        f"{W}.absmax", "BF16[128, 2]", "bnb-nf4"),
    Bad("absmax bfloat16", put(f"{W}.absmax", np.ones(256, np.int16), "BF16"), f"{W}.absmax",
        "BF16[256]", "bnb-nf4"),
    Bad("absmax and nothing else", put("model.x.weight.absmax", np.ones(4, np.float32)),
        "model.x.weight.absmax", "no quant_state"),
    Bad("int8 beside it", put("model.x.weight", np.ones((4, 4), np.uint8), "I8"), "model.x.weight",
        "no quant_state"),
    Bad("both bits", lambda d: d.set(load_in_8bit=True, _load_in_8bit=True),
        "quantization_config.load_in_8bit", "true beside load_in_4bit"),
    Bad("quant type af4", lambda d: d.set(bnb_4bit_quant_type="af4"),
        "quantization_config.bnb_4bit_quant_type", "'af4'"),
    Bad("storage int4", lambda d: d.set(bnb_4bit_quant_storage="int4"),
        "quantization_config.bnb_4bit_quant_storage", "'int4'"),
    Bad("compute dtype", lambda d: d.set(bnb_4bit_compute_dtype="fp4"),
        "quantization_config.bnb_4bit_compute_dtype", "'fp4'"),
    Bad("skip list of numbers", lambda d: d.set(llm_int8_skip_modules=[1]),
        "quantization_config.llm_int8_skip_modules", "[1]"),
    Bad("skip list of text", lambda d: d.set(llm_int8_skip_modules="lm_head"),
        "quantization_config.llm_int8_skip_modules", "'lm_head'"),
    Bad("flag as text", lambda d: d.set(load_in_4bit="true"),
        "quantization_config.load_in_4bit", "'true'"),
    *(Bad(f"tiles {value}", put(f"{W}_format", np.array(value, np.uint8)), f"{W}_format", tiles,
          "bnb-int8")
      for value, tiles in ((1, "col32"), (2, "col_turing"), (3, "col_ampere"), (9, "9"))),
    Bad("tiles as text", put(f"{W}_format", np.zeros(3, np.uint8)), f"{W}_format", "U8[3]",
        "bnb-int8"),
    Bad("no SCB", without(f"{Q}.SCB"), f"{Q}.SCB", "no such tensor", "bnb-int8"),
    Bad("SCB too long", put(f"{Q}.SCB", np.ones(129, np.float32)), f"{Q}.SCB", "F32[129]",
        "bnb-int8"),
    Bad("SCB of halves", put(f"{Q}.SCB", np.ones(128, np.float16)), f"{Q}.SCB", "F16[128]",
        "bnb-int8"),
    Bad("SCB and uint8", put(W, np.ones((128, 128), np.uint8)), W, "U8[128, 128]", "bnb-int8"),
    Bad("SCB and no weight", without(W), W, "no such tensor", "bnb-int8"),
    Bad("int8 without SCB", put("model.x.weight", np.ones((4, 4), np.uint8), "I8"), "model.x.SCB",
        "no such tensor", "bnb-int8"),
]  # fmt: skip


@pytest.mark.parametrize("bad", RECORDS, ids=lambda b: b.name)
def test_bad_records(bad: Bad, tmp_path: Path) -> None:
    folder = edited(bad.golden, tmp_path / "c", bad.change)
    with pytest.raises(QplugError) as caught:
        open_checkpoint(folder).scheme()
    problems = (caught.value, *caught.value.others)
    hits = [p for p in problems if p.where == bad.where or p.where.startswith(f"{bad.where}.")]
    assert hits, [str(p) for p in problems]
    assert any(bad.found in p.found for p in hits), [p.found for p in hits]
    assert all(p.expected and p.fix for p in problems)


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("bnb-nf4", f"{W}.absmax", np.nan),
        ("bnb-nf4", f"{W}.absmax", np.inf),
        ("bnb-nf4-dq", f"{W}.nested_absmax", np.nan),
        ("bnb-int8", f"{Q}.SCB", np.inf),
    ],
)
@pytest.mark.parametrize("target", ["same", "dense"])
def test_factors_that_are_no_numbers(
    name: str, tensor: str, value: float, target: str, tmp_path: Path
) -> None:
    def poke(draft: Draft) -> None:
        array = draft.tensors[tensor].array
        array[0] = value
        draft.tensors[tensor] = Stored.of(array)

    checkpoint, found, model = laws.surveyed(edited(name, tmp_path / "c", poke))
    plan = make_plan(found, model, found if target == "same" else find("dense"))
    with pytest.raises(QplugError, match="NaN or infinite") as caught:
        execute(plan, checkpoint, tmp_path / "out")
    assert caught.value.where == tensor
    assert not (tmp_path / "out").exists()
