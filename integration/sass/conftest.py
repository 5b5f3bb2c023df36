"""What the tests of machine code share. Without the pinned Triton, tests that need it skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import environment, gate

ARCHS = gate.TARGETS["installed"]


@pytest.fixture(scope="session")
def python() -> Callable[[str], None]:
    """Return a function that skips where an environment is absent."""

    def there(which: str) -> None:
        reason = environment.absent() if which == "pinned" else None
        if reason is not None:
            pytest.skip(reason)

    return there


@pytest.fixture(scope="session")
def findings(python: Callable[[str], None]) -> Callable[[str], list[gate.Finding]]:
    """Return a function that compiles all that is shipped with one Triton, once."""
    known: dict[str, list[gate.Finding]] = {}

    def of(which: str) -> list[gate.Finding]:
        python(which)
        if which not in known:
            known[which] = gate.findings(which, ARCHS)
        return known[which]

    return of


@pytest.fixture(scope="session")
def wrong(python: Callable[[str], None]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the rows of the kernels of `wrong.py`, by target and name."""
    python("pinned")
    rows = gate.compiled("pinned", ARCHS, "sass.wrong")
    return {(row["arch"], row["name"]): row for row in rows}
