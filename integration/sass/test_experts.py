"""Machine code of launches over experts: indirection and routing weights are not in the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from . import gate
from .conftest import ARCHS

pytestmark = pytest.mark.sass

LIMITS = {
    "experts int4 g128 fp16 m8": (1.762, 1.816),
    "experts int4 g128 fp16 m16": (1.957, 1.898),
    "experts int4 g128 bf16 m16": (2.180, 2.117),
    "experts nf4 g64 bf16 m16": (4.145, 4.051),
    "experts rows g4096 fp16 m16": (2.180, 2.398),
}
"""Instructions per weight on sm_80 and sm_90 with the pinned Triton."""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("which", gate.PYTHONS)
def test_experts_cost_the_loop_nothing(
    which: str, arch: str, python: Callable[[str], None]
) -> None:
    python(which)
    band = 1 + (gate.PINNED_BAND if which == "pinned" else gate.BAND)
    names = []
    for row in gate.compiled(which, [arch], "sass.experts"):
        names.append(row["name"])
        limits = LIMITS.get(row["name"])
        found = gate.judge(row, limits[ARCHS.index(arch)] * band if limits else None)
        assert not found.breaches, gate.table([found])
        if "int4" in row["name"]:  # products times routing weights are stored unrounded
            assert "F2F" not in Path(row["listing"]).read_text()
    assert sorted(names) == sorted([*LIMITS, "experts combine"])
