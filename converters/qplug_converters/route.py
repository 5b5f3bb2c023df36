"""How one linear gets from its scheme to what a target can hold: the cheapest exact moves.

The scheme goes in, a `Step` comes out: moves, a verdict and its reason. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any

from .format import Capacity, Format
from .formats import dense
from .scheme import Kind, ScaleFacts, Scheme, ZeroFacts
from .verdict import ALONE, Move, Place, Step, Verdict, Wishes

Look = Callable[[str, int, int], bool]
"""`(module, lowest, highest) -> bool`: whether shifting codes brings every zero between both."""

ROW_PARALLEL = re.compile(
    r"(^|\.)(o_proj|down_proj|w2|out_proj|dense|dense_4h_to_h|fc2|fc_out|c_proj|wo|proj_out)$"
)
"""Linears whose inputs tensor parallelism splits, by the names in use; others split outputs."""

DEFAULT_GROUP = 128
"""Inputs per group where a requantized linear had no groups of its own."""


SMALLEST_GROUP = 32
"""The smallest groups that a split between ranks may leave: engines have no kernels for others."""


def divides(features: int, group_size: int, ranks: int, words: int) -> bool:
    """Whether each rank gets whole words of features, and groups that are not tiny."""
    each, rest = divmod(features, ranks)
    small = min(group_size, SMALLEST_GROUP)
    return rest == 0 and each % words == 0 and gcd(group_size, each) >= small


class Blocked(Exception):
    """No exact way: the verdict, why, and what else to do."""

    def __init__(self, verdict: Verdict, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.verdict, self.reason, self.fix = verdict, reason, fix


class Route:
    """The way of one linear: where it is, by which moves, and what was rounded."""

    def __init__(
        self, module: str, scheme: Scheme, target: Format, wishes: Wishes, look: Look | None
    ) -> None:
        assert target.capacity is not None
        self.module, self.target, self.wishes, self.look = module, target, wishes, look
        self.holds: Capacity = target.capacity
        self.goal = scheme
        self.moves: list[Move] = []
        self.roundings: list[str] = []

    def move(self, name: str, argument: int | str, **changes: Any) -> None:
        """Take a move; `changes` are what it does to the scheme."""
        self.moves.append(Move(name, argument))
        self.goal = replace(self.goal, **changes)

    def take(self, place: Place) -> Scheme:
        """Take every move there is to take, and return where it ends.

        Raises
        ------
        Blocked
            If there is no way without new codes.
        """
        if self.goal.kind in self.holds.also:
            self._keep()
            return self.target.adopt(self.goal)
        if self.goal.kind is Kind.CODEBOOK:
            self._codebook()
        elif self.goal.kind is Kind.ROWS and self.holds.kind is not Kind.ROWS:
            self._rows()
        elif self.goal.kind is Kind.OFFSET and self.holds.kind is not Kind.OFFSET:
            self._recover_zeros()
        if self.holds.kind in (Kind.CODEBOOK, Kind.ROWS):
            if self.goal.kind is not self.holds.kind:
                raise Blocked(
                    Verdict.REQUANTIZED,
                    f"{self.goal.describe()} codes lie on no grid of {self.target.name}",
                    ways_out(self.goal),
                )
            return self.target.adopt(self.goal)
        if self.goal.kind is Kind.OFFSET:
            return self.target.adopt(self.goal)
        if place.absorbed:
            self.move("sort_columns", "g_idx", act_order=False, has_g_idx=False)
        self._bits()
        self._order()
        if place.in_features:
            self.move("pad_columns", place.in_features, in_features=place.in_features)
        if place.out_features:
            self.goal = replace(self.goal, out_features=place.out_features)
        self._groups()
        self._zeros()
        self._scales()
        if self.holds.kind is Kind.OFFSET:
            if not self.goal.symmetric:
                self.roundings.append("-scale * zero rounded to F16: at most 0.0074 of each scale")
            self.move("to_offsets", "F16", kind=Kind.OFFSET)
        return self.target.adopt(self.goal)

    def _keep(self) -> None:
        """Keep a grid that the target holds as it is; absmax is stored plainly."""
        wishes, book = self.wishes, self.goal.codebook
        if (wishes.bits or self.goal.bits) != self.goal.bits or wishes.group_size or wishes.sym:
            raise Blocked(
                Verdict.REQUANTIZED,
                f"{self.goal.describe()} codes keep their bits and groups",
                "leave out --bits, --group-size and --sym",
            )
        if book is not None and book.nesting is not None:
            self.move("unnest", "absmax")

    # Grids ------------------------------------------------------------------------------------

    def _codebook(self) -> None:
        """Keep the table, store absmax plainly, split blocks."""
        book, size = self.goal.codebook, self.wishes.group_size or self.goal.group_size
        assert book is not None
        own = self.target.adopt(replace(self.goal, codebook=None)).codebook
        if self.holds.kind is not Kind.CODEBOOK or own is None or own.name != book.name:
            raise Blocked(
                Verdict.REQUANTIZED,
                f"values of {book.name} are no multiples of a step",
                f"--to bnb-{book.name} keeps them, --to dense too",
            )
        if book.nesting is not None:
            self.move("unnest", "absmax", codebook=replace(book, nesting=None))
        if book.transposed or self.goal.scale_dtype != "F32":
            book = replace(book, nesting=None, transposed=False)
            self.goal = replace(self.goal, codebook=book, scale_dtype="F32")
        if size != self.goal.group_size:
            if size < 1 or self.goal.group_size % size:
                raise Blocked(
                    Verdict.REQUANTIZED,
                    f"blocks of {self.goal.group_size} weights are not blocks of {size}",
                    f"a --group-size that divides {self.goal.group_size}",
                )
            self.move("split_blocks", size, group_size=size)

    def _rows(self) -> None:
        """LLM.int8 as 8-bit codes with one scale a row: SCB / 127 is rounded."""
        if 8 not in self.holds.bits:
            raise Blocked(
                Verdict.REQUANTIZED,
                f"{self.target.name} has no 8-bit codes",
                ways_out(self.goal),
            )
        dtype = "F32" if "F32" in self.holds.scale_dtypes else self.holds.scale_dtypes[0]
        bound = {
            "F32": "1.5 ulp of each weight",
            "F16": "2^-11 of each weight, 2^-25 of each code absolute below 2^-14",
            "BF16": "2^-9 of each weight",
        }[dtype]
        self.roundings.append(f"absmax / 127 rounded to {dtype}: at most {bound}")
        rows = self.goal.out_features
        self.move(
            "to_channel",
            dtype,
            kind=Kind.AFFINE,
            scale_dtype=dtype,
            zeros=ZeroFacts(128, 128, rows, rows),
            scales=ScaleFacts(exact=True, kept=True),
            sym=True,
        )

    def _recover_zeros(self) -> None:
        """Integer zeros from offsets."""
        facts = self.goal.scales
        if facts is None or self.goal.zeros is None:
            raise Blocked(
                Verdict.REQUANTIZED, "offsets that are no multiples of scales", ways_out(self.goal)
            )
        if not facts.products:
            self.roundings.append(
                "offsets are -scale * zero rounded to F16, and zeros are exact: at most 0.0074 of "
                "each scale"
            )
        self.move("to_zeros", "offsets", kind=Kind.AFFINE)

    # Codes ------------------------------------------------------------------------------------

    def _bits(self) -> None:
        """Widen to the wished bits, or to the fewest the target has."""
        goal, wishes = self.goal, self.wishes
        wider = [b for b in self.holds.bits if b >= goal.bits]
        bits = wishes.bits if wishes.bits is not None else min(wider, default=0)
        if bits < goal.bits:
            wanted = bits or max(self.holds.bits)
            raise Blocked(
                Verdict.REQUANTIZED,
                f"{goal.bits}-bit codes do not fit {wanted} bits",
                ways_out(goal) if wishes.bits is None else f"--bits {goal.bits} keeps them",
            )
        if bits == goal.bits:
            return
        facts = goal.zeros
        symmetric = wishes.sym or (facts is not None and goal.symmetric)
        # A symmetric grid stays symmetric when it is widened: engines that take only symmetric
        # files would otherwise refuse what was one before.
        if facts is not None and symmetric:
            mid = 1 << (bits - 1)
            facts = ZeroFacts(mid, mid, facts.count, facts.count)
        elif facts is not None:
            facts = replace(facts, midpoint=0, at_maxq=0)
        name = "symmetrize" if symmetric else "widen"
        self.move(name, bits, bits=bits, zeros=facts, sym=symmetric)

    def _order(self) -> None:
        """Act order is kept, or there is no exact way."""
        if self.goal.act_order and not self.holds.act_order:
            raise Blocked(
                Verdict.REQUANTIZED,
                f"columns are in act order, and {self.target.name} has no g_idx",
                ways_out(self.goal),
            )

    def _groups(self) -> None:
        """Split groups to the wished size, a ragged last group to whole ones, or between ranks."""
        goal, wished = self.goal, self.wishes.group_size
        inp = goal.in_features
        size = goal.group_size
        if wished is not None:
            size = inp if wished == -1 else min(wished, inp)
        elif not self.holds.ragged and inp % size:
            size = gcd(size, inp)
        size = self._ranks(size)
        if self.holds.group_sizes and size not in self.holds.group_sizes:
            size = max((g for g in self.holds.group_sizes if size % g == 0), default=size)
        if size == goal.group_size:
            return
        if goal.act_order:
            raise Blocked(
                Verdict.IMPOSSIBLE,
                f"groups in act order cannot be split to {size} inputs",
                "leave out --group-size and --tp",
            )
        if goal.group_size % size and not (goal.groups == 1 and size < inp):
            raise Blocked(
                Verdict.REQUANTIZED,
                f"groups of {goal.group_size} inputs are not groups of {size}",
                f"a --group-size that divides {gcd(goal.group_size, inp)}",
            )
        self.move("split_groups", size, group_size=size)

    def _ranks(self, size: int) -> int:
        """Return a group size with which every rank has whole groups and whole words."""
        tp, inp = self.wishes.tp, self.goal.in_features
        if tp == 1 or not ROW_PARALLEL.search(self.module):
            return size
        if self.goal.act_order:
            raise Blocked(
                Verdict.IMPOSSIBLE,
                f"columns in act order do not split between {tp} ranks",
                "leave out --tp",
            )
        if not divides(inp, size, tp, self.holds.in_multiple(self.goal.bits)):
            raise Blocked(
                Verdict.IMPOSSIBLE,
                f"{inp} inputs do not split between {tp} ranks",
                "a --tp that divides them",
            )
        return gcd(size, inp // tp)

    def _zeros(self) -> None:
        """Bring zeros into what every reader of the target agrees on."""
        goal = self.goal
        facts = goal.zeros
        if facts is None:
            raise ValueError("a plan needs a surveyed model")
        if self.wishes.sym and not facts.symmetric:
            if self.look is None or not self.look(self.module, goal.midpoint, goal.midpoint):
                raise Blocked(
                    Verdict.REQUANTIZED,
                    f"zeros differ from the midpoint, and {goal.bits}-bit codes leave no room to "
                    "shift",
                    "--bits 8 with --sym is exact" if goal.bits == 4 else "leave out --sym",
                )
            self._shift(goal.midpoint, goal.midpoint)
            return
        low, high = self.holds.zeros(goal.bits)
        if facts.lowest >= low and facts.highest <= high:
            self.goal = replace(goal, sym=facts.symmetric)
            return
        widened = next((n for n, m in enumerate(self.moves) if m.name == "widen"), None)
        if widened is not None:
            # The codes are being widened anyway: shifting them to the midpoint always fits then.
            self.moves[widened] = Move("symmetrize", goal.bits)
            mid = goal.midpoint
            facts = ZeroFacts(mid, mid, facts.count, facts.count)
            self.goal = replace(goal, sym=True, zeros=facts)
            return
        if self.look is not None and self.look(self.module, low, high):
            self._shift(low, high)
            return
        out = facts.lowest if facts.lowest < low else facts.highest
        wider = [b for b in self.holds.bits if b > goal.bits]
        ways = ["--to canonical"]
        if facts.highest < 1 << goal.bits and goal.scale_dtype == "F16":
            ways.insert(0, "--to gptq_v2")
        if wider:
            ways.insert(0, f"--bits {wider[0]}")
        elif goal.bits < 8 and goal.scale_dtype == "F16":
            ways.insert(0, "--to gptq_v2 --bits 8")
        raise Blocked(
            Verdict.REQUANTIZED,
            f"some zeros are {out}, and {self.target.name} holds {low} to {high} at {goal.bits} "
            "bits",
            " or ".join(ways) + (" is" if len(ways) == 1 else " are") + " exact",
        )

    def _shift(self, low: int, high: int) -> None:
        facts = self.goal.zeros
        assert facts is not None
        mid = facts.count if low == high else 0
        facts = ZeroFacts(max(low, facts.lowest), min(high, facts.highest), mid, facts.count)
        self.move("shift_zeros", f"{low}..{high}", zeros=facts, sym=facts.symmetric)

    def _scales(self) -> None:
        """Cast scales where the target's readers take another dtype; say what it costs."""
        goal, dtype = self.goal, self.holds.scale_dtypes[0]
        if goal.scale_dtype in self.holds.scale_dtypes:
            return
        if goal.scales is None:
            raise ValueError("a plan needs a surveyed model")
        # The survey looks at float16; float32 holds all others, and bfloat16 none as it is.
        if dtype == "F16" and not goal.scales.kept:
            raise Blocked(
                Verdict.IMPOSSIBLE,
                f"some {goal.scale_dtype} scales overflow {dtype}, or become 0 in it",
                "--to canonical keeps them",
            )
        if dtype == "BF16" or (dtype == "F16" and not goal.scales.exact):
            self.roundings.append(
                f"{goal.scale_dtype} scales rounded to {dtype}: at most {_ROUNDED_TO[dtype]}"
            )
        self.move("cast_scales", dtype, scale_dtype=dtype)


_ROUNDED_TO = {
    "F16": "2^-11 of each scale, 2^-25 absolute below 2^-14",
    "BF16": "2^-9 of each scale, 2^-134 absolute below 2^-126",
}


def ways_out(scheme: Scheme) -> str:
    """Return which formats hold a scheme that the target does not."""
    if scheme.kind is not Kind.AFFINE:
        return "--to dense keeps the weights"
    both = scheme.scale_dtype == "F16" and scheme.bits in (2, 3, 4, 8)
    return "--to gptq_v2 or canonical keep it" if both else "--to canonical keeps it"


def find_route(
    module: str,
    scheme: Scheme,
    target: Format,
    wishes: Wishes,
    look: Look | None = None,
    place: Place = ALONE,
) -> Step:
    """Find the cheapest sequence of exact moves to what the target can hold."""
    if target.capacity is None:
        goal = replace(target.adopt(scheme), scale_dtype=dense.DTYPES[wishes.dtype])
        if wishes.dtype == "float32":
            return Step(module, Verdict.EXACT, scheme, goal, reason="dequantized")
        ulp = {"float16": "2^-11 (2^-25 absolute below 2^-14)", "bfloat16": "2^-9"}[wishes.dtype]
        reason = f"rounded once to {wishes.dtype}: at most {ulp} of each weight"
        return Step(module, Verdict.ROUNDED, scheme, goal, reason=reason)
    route = Route(module, scheme, target, wishes, look)
    try:
        goal = route.take(place)
    except Blocked as blocked:
        if blocked.verdict is Verdict.REQUANTIZED:
            goal, moves = refitted(scheme, target, wishes)
            if place.in_features or place.out_features:
                blocked.reason = f"{blocked.reason}; new codes are not padded between ranks"
                goal = scheme
            if (unfit := target.cannot(goal)) is None:
                return Step(
                    module,
                    Verdict.REQUANTIZED,
                    scheme,
                    goal,
                    moves,
                    blocked.reason,
                    blocked.fix,
                    place.rows_from,
                )
            blocked.reason = f"{blocked.reason}; {unfit}"
        return Step(
            module, Verdict.IMPOSSIBLE, scheme, scheme, reason=blocked.reason, fix=blocked.fix
        )
    if (unfit := target.cannot(goal)) is not None:
        return Step(module, Verdict.IMPOSSIBLE, scheme, goal, reason=unfit, fix=ways_out(scheme))
    verdict = Verdict.ROUNDED if route.roundings else Verdict.EXACT
    reason = "; ".join(route.roundings) or ", ".join(map(str, route.moves)) or "repacked"
    moves = tuple(route.moves)
    return Step(module, verdict, scheme, goal, moves, reason, rows_from=place.rows_from)


def refitted(scheme: Scheme, target: Format, wishes: Wishes) -> tuple[Scheme, tuple[Move, ...]]:
    """Return the scheme that new codes are chosen for, and the moves that follow.

    What the source says (bits, groups, symmetry) is kept where the target has it.
    """
    holds = target.capacity
    assert holds is not None
    inp = scheme.in_features
    blank = Scheme(scheme.out_features, inp, holds.bits[-1], inp, kind=holds.kind)
    if holds.kind is Kind.CODEBOOK:
        return target.adopt(replace(blank, group_size=wishes.group_size or 64)), ()
    if holds.kind is Kind.ROWS:
        return target.adopt(replace(blank, bits=8)), ()
    lower = [b for b in holds.bits if b <= scheme.bits]
    bits = wishes.bits if wishes.bits is not None else max(lower, default=holds.bits[0])
    grouped = scheme.kind in (Kind.AFFINE, Kind.OFFSET) and scheme.groups > 1
    size = scheme.group_size if grouped or bits == scheme.bits == 8 else DEFAULT_GROUP
    if wishes.group_size is not None:
        size = inp if wishes.group_size == -1 else wishes.group_size
    size = min(size, inp)
    if wishes.tp > 1 and inp % wishes.tp == 0:
        size = gcd(size, inp // wishes.tp)
    if not holds.ragged and inp % size:
        size = gcd(size, inp)
    if holds.group_sizes:
        size = max((g for g in holds.group_sizes if inp % g == 0 and g <= size), default=size)
    low, high = holds.zeros(bits)
    mid = 1 << (bits - 1)
    was = scheme.kind is Kind.ROWS or (scheme.kind is Kind.AFFINE and scheme.symmetric)
    sym = wishes.sym or was
    count = scheme.out_features * -(-inp // size)
    facts = ZeroFacts(mid, mid, count, count) if sym else ZeroFacts(low, high, 0, count)
    dtype = scheme.scale_dtype if scheme.kind is Kind.AFFINE else "F16"
    goal = replace(
        blank,
        bits=bits,
        group_size=size,
        sym=sym,
        zeros=facts,
        scale_dtype=dtype if dtype in holds.scale_dtypes else holds.scale_dtypes[0],
    )
    moves = (Move("to_offsets", "F16"),) if holds.kind is Kind.OFFSET else ()
    return target.adopt(goal), moves
