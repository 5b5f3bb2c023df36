"""The words of a plan: what was asked, what may happen to a linear, and by which changes.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .scheme import Scheme


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user asked of the target beyond its format.

    `bits` and `group_size` of every linear, `sym` for symmetric zeros, `dtype` of dense weights,
    `tp` ranks between which row-parallel linears must split.
    """

    bits: int | None = None
    group_size: int | None = None
    sym: bool = False
    dtype: str = "float32"
    tp: int = 1

    @property
    def none(self) -> bool:
        """Whether nothing was asked that changes codes or grids."""
        return (self.bits, self.group_size, self.sym, self.tp) == (None, None, False, 1)


@dataclass(frozen=True, slots=True)
class Place:
    """What a linear owes to the linears around it.

    `absorbed`: those before it take over its act order; `rows_from`: the linear whose act order
    its rows take over; `in_features` and `out_features`: what it is padded to with zeros (0: not).
    """

    absorbed: bool = False
    rows_from: str = ""
    in_features: int = 0
    out_features: int = 0


ALONE = Place()


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one linear.

    `rows_from` names the linear whose `g_idx` gives the order of this one's output rows, where
    that one's act order is absorbed [X5b]. `name` is what readers of the target call the linear,
    where that is another name.
    """

    module: str
    verdict: Verdict
    source: Scheme
    target: Scheme
    moves: tuple[Move, ...] = ()
    reason: str = ""
    fix: str = ""
    rows_from: str = ""
    name: str = ""

    @property
    def written(self) -> str:
        """The name under which the linear is written."""
        return self.name or self.module

    @property
    def padding(self) -> int:
        """Output rows of zeros that are added at the end [X9]."""
        return self.target.out_features - self.source.out_features

    @property
    def refits(self) -> bool:
        """Whether codes and grid are chosen anew."""
        return self.verdict is Verdict.REQUANTIZED

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints and the certificate holds."""
        found: dict[str, Any] = {
            "verdict": self.verdict.name,
            "from": self.source.describe(),
            "to": self.target.describe(),
            "zero_rule": self.source.zero_rule,
            "moves": [str(move) for move in self.moves],
            "reason": self.reason,
        }
        if self.name:
            found["name"] = self.name
        if self.rows_from:
            found["rows_from"] = self.rows_from
        if self.padding:
            found["rows_of_zeros"] = self.padding
        return found
