"""Every assertion of the gate refuses a kernel that has the fault, and only that one."""

from __future__ import annotations

from typing import Any

import pytest

from . import gate
from .conftest import ARCHS

pytestmark = pytest.mark.sass
Rows = dict[tuple[str, str], dict[str, Any]]

FAULTS = {
    "spills": "accesses to spilled registers",
    "too many stages": "bytes of shared memory of",
    "no product": "no loop has a matrix instruction",
    "half a tile": "weights, a tile has",
    "no hints": "asynchronous copies of weights",
    "no pipeline": "asynchronous copies of weights",
    "cast": "conversions to floats",
    "shifts": "PRMT per weight",
    "round trip": "stores to shared memory",
    "does not compile": "does not compile",
}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_right_kernel_has_no_fault(wrong: Rows, arch: str) -> None:
    found = gate.judge(wrong[arch, "right"], 3.0)
    assert not found.breaches
    assert found.loop is not None


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(wrong: Rows, arch: str, name: str) -> None:
    found = gate.judge(wrong[arch, name], 100.0)
    assert any(FAULTS[name] in breach for breach in found.breaches), found.breaches


@pytest.mark.parametrize("arch", ARCHS)
def test_a_count_above_its_limit_is_found(wrong: Rows, arch: str) -> None:
    row = wrong[arch, "right"]
    count = gate.judge(row, 100.0).per_weight
    assert not gate.judge(row, count).breaches
    (breach,) = gate.judge(row, count - 0.001).breaches
    assert f"{count:.3f} instructions per weight" in breach
    (breach,) = gate.judge(row, None).breaches
    assert "no limit is stored" in breach


@pytest.mark.parametrize("arch", ARCHS)
def test_no_stored_limit_excuses_more_than_was_promised(wrong: Rows, arch: str) -> None:
    row = wrong[arch, "shifts"]
    assert any("no limit may pass" in breach for breach in gate.judge(row, 100.0).breaches)
    many_tokens = {**row, "tokens": 32}
    assert gate.ceiling(many_tokens) is None


@pytest.mark.parametrize("arch", ARCHS)
def test_another_triton_may_spill_a_little(wrong: Rows, arch: str) -> None:
    other = {**wrong[arch, "spills"], "triton": "3.9.0"}
    assert any(
        "spilled registers, at most" in breach for breach in gate.judge(other, 100.0).breaches
    )
    assert not gate.judge({**wrong[arch, "right"], "triton": "3.9.0"}, 100.0).breaches


def test_the_band_depends_on_the_triton_that_limits_are_of() -> None:
    stored = {
        "3.6": {"sm_80": {"a": {"instructions_per_weight": 2.0}}},
        "3.9": {"sm_80": {"a": {"instructions_per_weight": 1.0}}},
    }

    def limit(triton: str, name: str = "a") -> float | None:
        return gate.limit_of(stored, {"triton": triton, "arch": "sm_80", "name": name})

    assert limit("3.6.0") == 2.0 * (1 + gate.PINNED_BAND)
    assert limit("3.9.1") == 1.0 * (1 + gate.BAND)
    assert limit("3.10.0") == 1.0 * (1 + gate.UNKNOWN_BAND)
    assert limit("3.6.0", "b") is None
