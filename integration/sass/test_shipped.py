"""The machine code of everything that is shipped, for cards of the two most common kinds."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from . import gate
from .conftest import ARCHS

pytestmark = pytest.mark.sass


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("which", gate.PYTHONS)
def test_shipped_kernels_are_within_their_limits(
    which: str, arch: str, findings: Callable[[str], list[gate.Finding]]
) -> None:
    found = [one for one in findings(which) if one.row["arch"] == arch]
    assert found
    assert not any(one.breaches for one in found), "\n" + gate.table(found)


def test_no_more_are_shipped_than_can_be_compiled_in_time(
    findings: Callable[[str], list[gate.Finding]],
) -> None:
    for arch in ARCHS:
        assert len([one for one in findings("pinned") if one.row["arch"] == arch]) <= 25


def test_no_stored_limit_passes_what_was_promised(
    findings: Callable[[str], list[gate.Finding]],
) -> None:
    stored = json.loads(gate.LIMITS.read_text())[gate.PINNED]
    capped = 0
    for one in findings("pinned"):
        highest = gate.ceiling(one.row) if one.row["bits"] else None
        if highest is not None:
            capped += 1
            limit = stored[one.row["arch"]][one.row["name"]]["instructions_per_weight"]
            assert round(limit, 2) <= highest, one.row
    assert capped
