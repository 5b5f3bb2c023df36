"""The words of a plan: what may happen to a linear, and by which exact changes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Verdict(IntEnum):
    """What happens to a linear, from best to worst; a model's verdict is the worst.

    COPIED: the same bytes. EXACT: other bytes, the same weights bit for bit. ROUNDED: weights
    within a stated bound. REQUANTIZED: new codes, the error measured. IMPOSSIBLE: no way.
    """

    COPIED = 0
    EXACT = 1
    ROUNDED = 2
    REQUANTIZED = 3
    IMPOSSIBLE = 4


@dataclass(frozen=True, slots=True)
class Move:
    """One change, by name (`moves.MOVES`) with its argument."""

    name: str
    argument: int | str

    def __str__(self) -> str:
        """Return e.g. `widen(4)`."""
        return f"{self.name}({self.argument})"
