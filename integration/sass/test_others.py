"""Machine code of kernels without tensor cores: no spills, wide loads, the conversions expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import gate, measure

pytestmark = pytest.mark.sass
Rows = list[dict[str, Any]]

TARGETS = {"pinned": ("sm_75", "sm_80", "sm_90"), "installed": ("sm_75", "sm_90")}

LIMITS = {
    "int2 g128 fp16 m1": 5.1, "int3 g128 fp16 m1": 5.3, "int4 g128 fp16 m1": 4.9,
    "int8 g128 fp16 m1": 5.9, "int2 g128 fp16 m4": 13.2, "int3 g128 fp16 m4": 13.4,
    "int4 g128 fp16 m4": 11.7, "int8 g128 fp16 m4": 14.1,
}  # fmt: skip
"""Instructions per weight on sm_75 with the pinned Triton."""


@pytest.fixture(scope="module")
def rows(python: Callable[[str], None]) -> Callable[[str], Rows]:
    """Return a function that compiles all of them with one Triton, once."""
    known: dict[str, Rows] = {}

    def of(which: str) -> Rows:
        python(which)
        if which not in known:
            known[which] = gate.compiled(which, TARGETS[which], "sass.others")
        return known[which]

    return of


def code_of(row: dict[str, Any]) -> measure.Code:
    return measure.parse(Path(row["listing"]).read_text())


def loop_of(code: measure.Code) -> list[str]:
    """Return the names of the instructions of the loop with the most multiply-adds."""
    loops = [
        [one.op for one in code.instructions[code.labels[branch.target] : at + 1]]
        for at, branch in enumerate(code.instructions)
        if branch.target in code.labels and code.labels[branch.target] <= at
    ]
    return max(loops, key=lambda ops: sum(op.startswith("FFMA") for op in ops))


@pytest.mark.parametrize("which", TARGETS)
def test_all_compile_without_spills(which: str, rows: Callable[[str], Rows]) -> None:
    found = rows(which)
    assert {row["arch"] for row in found} == set(TARGETS[which])
    assert not [row["error"] for row in found if "error" in row]
    assert not [row for row in found if measure.spills(code_of(row))]
    assert max(row["shared"] for row in found) <= 1024


@pytest.mark.parametrize("which", TARGETS)
def test_keys_and_values_are_read_at_full_width(which: str, rows: Callable[[str], Rows]) -> None:
    for row in rows(which):
        if not row["name"].startswith("kv"):
            continue
        ops = Counter(one.op.removesuffix(".SYS") for one in code_of(row).instructions)
        amd = row["arch"].startswith("gfx")
        kind = "buffer" if any(op.startswith("buffer") for op in ops) else "global"
        load, store = f"{kind}_load_dwordx4", f"{kind}_store_dwordx2"
        assert ops[load if amd else "LDG.E.128"] == 2, (row, ops)
        assert ops[store if amd else "STG.E.64"] == 2, (row, ops)


@pytest.mark.parametrize("which", TARGETS)
def test_floats_are_rounded_once(which: str, rows: Callable[[str], Rows]) -> None:
    """From sm_89 on one conversion for two numbers, out of float32; elsewhere none."""
    for row in rows(which):
        if not row["name"].startswith("kv"):
            continue
        ops = [one.op for one in code_of(row).instructions]
        converts = int(row["arch"][3:]) >= 89 if row["arch"].startswith("sm_") else False
        name = {"float8_e4m3fn": "E4M3", "float8_e5m2": "E5M2"}.get(row["name"].split()[1])
        wanted = f"F2FP.SATFINITE.{name}.F32.PACK_AB_MERGE_C"
        assert ops.count(wanted) == (8 if converts and name else 0), row
        other = [op for op in ops if op.startswith(("F2F", "I2F")) and op != wanted]
        assert not other, (row, other)


@pytest.mark.parametrize("which", TARGETS)
def test_products_without_tensor_cores(which: str, rows: Callable[[str], Rows]) -> None:
    found = [row for row in rows(which) if row["name"].startswith("int")]
    assert len(found) == 8
    for row in found:
        ops = loop_of(code_of(row))
        per_weight = len(ops) * 32 * row["warps"] / row["weights"]
        band = 1 if which == "pinned" else 1 + gate.BAND
        assert per_weight <= LIMITS[row["name"]] * band, (row, per_weight)
        kinds = Counter(op.split(".")[0] for op in ops)
        assert not kinds["I2F"] + kinds["STS"] + kinds["BAR"], (row, kinds)
