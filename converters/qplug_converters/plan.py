"""What a conversion will do to each linear, known before one weight is read.

A plan is pure: a surveyed `ModelScheme` and a target go in, a verdict, moves and a reason per
linear come out. Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import IntEnum
from math import gcd
from typing import Any

from .block import stated_group_size
from .errors import QplugError, Refused, Unsupported
from .format import Format
from .formats import dense
from .scheme import ModelScheme, Scheme, ZeroFacts


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
    """One exact change, by name (`moves.MOVES`) with its argument."""

    name: str
    argument: int | str

    def __str__(self) -> str:
        """Return e.g. `widen(4)`."""
        return f"{self.name}({self.argument})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user asked of the target beyond its format.

    `bits` and `group_size` of every linear, `sym` for symmetric zeros, `dtype` of dense weights.
    """

    bits: int | None = None
    group_size: int | None = None
    sym: bool = False
    dtype: str = "float32"

    @property
    def none(self) -> bool:
        """Whether nothing was asked that changes codes or grids."""
        return self.bits is None and self.group_size is None and not self.sym


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one linear."""

    module: str
    verdict: Verdict
    source: Scheme
    target: Scheme
    moves: tuple[Move, ...] = ()
    reason: str = ""
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints and the certificate holds."""
        return {
            "verdict": self.verdict.name,
            "from": self.source.describe(),
            "to": self.target.describe(),
            "zero_rule": self.source.zero_rule,
            "moves": [str(move) for move in self.moves],
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do."""

    source: Format
    target: Format
    model: ModelScheme
    steps: tuple[Step, ...]
    wishes: Wishes

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of any linear."""
        return max(step.verdict for step in self.steps)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many linears have which verdict."""
        return dict(sorted(Counter(step.verdict for step in self.steps).items()))

    @property
    def copied_whole(self) -> bool:
        """Whether nothing changes, so that the source's own config stays right."""
        return _copied(self.source, self.target, self.wishes, self.model)

    @property
    def goal(self) -> ModelScheme:
        """The scheme of the converted model."""
        linears = {step.module: step.target for step in self.steps}
        return replace(self.model, format=self.target.name, linears=linears)

    def refuse_above(self, allow: Verdict) -> None:
        """Raise if the plan is worse than `allow`, or needs what is not built.

        Raises
        ------
        Refused
            Exit code 3: worse than allowed, or impossible.
        Unsupported
            Requantizing was allowed, but this version cannot do it.
        """
        worst = self.verdict
        if worst is Verdict.IMPOSSIBLE or worst > allow:
            bad = [s for s in self.steps if s.verdict is worst]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            fix = bad[0].fix
            if worst is not Verdict.IMPOSSIBLE:
                need = f"--allow {worst.name.lower()}"
                built = "" if worst is not Verdict.REQUANTIZED else " (not built yet)"
                fix = f"{fix}; or {need}{built}" if fix else f"{need}{built}"
            raise Refused(f"{worst.name}: {bad[0].reason}", f"{bad[0].module}{more}", fix=fix)
        if worst is Verdict.REQUANTIZED:
            first = next(s for s in self.steps if s.verdict is worst)
            raise Unsupported(
                f"{first.reason}; requantizing is not built yet", first.module, fix=first.fix
            )


def _copied(source: Format, target: Format, wishes: Wishes, model: ModelScheme) -> bool:
    """Whether bytes and config stay: the source's config names the rule its zeros are read by."""
    stays = source is target and wishes.none and not model.forced
    return stays and all(source.current(scheme) for scheme in model.linears.values())


def make_plan(
    source: Format, model: ModelScheme, target: Format, wishes: Wishes | None = None
) -> Plan:
    """Decide what happens to each linear of a surveyed model.

    Raises
    ------
    QplugError
        If the wishes make no sense for the target.
    """
    wishes = wishes or Wishes()
    if wishes.group_size is not None and wishes.group_size < 1 and wishes.group_size != -1:
        raise QplugError(
            f"{wishes.group_size}", "--group-size", "-1 or a positive number", "choose another size"
        )
    holds = target.capacity
    if wishes.bits is not None and (holds is None or wishes.bits not in holds.bits):
        offered = ", ".join(map(str, holds.bits)) if holds else "no number of bits"
        raise QplugError(
            f"{wishes.bits}", "--bits", f"{offered} for {target.name}", "choose what it holds"
        )
    steps = tuple(
        Step(module, Verdict.COPIED, scheme, scheme)
        if _copied(source, target, wishes, model)
        else _step(module, scheme, source, target, wishes)
        for module, scheme in model.linears.items()
    )
    if holds is not None and holds.uniform and not _copied(source, target, wishes, model):
        steps = _uniform(steps, source, target, wishes)
    return Plan(source, target, model, steps, wishes)


def _uniform(
    steps: tuple[Step, ...], source: Format, target: Format, wishes: Wishes
) -> tuple[Step, ...]:
    """Split groups further where the target's config can name one group size only."""
    fine = [step.target for step in steps if step.verdict <= Verdict.ROUNDED]
    group_of = stated_group_size(fine, ragged=False)
    if len({group_of(scheme) for scheme in fine}) <= 1:
        return steps
    common = replace(wishes, group_size=gcd(*(scheme.group_size for scheme in fine)))
    return tuple(
        _step(s.module, s.source, source, target, common) if s.verdict <= Verdict.ROUNDED else s
        for s in steps
    )


def _step(module: str, scheme: Scheme, source: Format, target: Format, wishes: Wishes) -> Step:
    """Find the cheapest sequence of exact moves to what the target can hold."""
    if target.capacity is None:
        goal = replace(target.adopt(scheme), scale_dtype=dense.DTYPES[wishes.dtype])
        if wishes.dtype == "float32":
            return Step(module, Verdict.EXACT, scheme, goal, reason="dequantized")
        ulp = {"float16": "2^-11 (2^-25 absolute below 2^-14)", "bfloat16": "2^-9"}[wishes.dtype]
        return Step(
            module,
            Verdict.ROUNDED,
            scheme,
            goal,
            reason=f"rounded once to {wishes.dtype}: at most {ulp} of each weight",
        )
    moves: list[Move] = []
    goal, blocked = scheme, None
    for change in (_bits, _order, _groups, _zeros):
        blocked = change(goal, target, wishes, moves)
        if isinstance(blocked, Step):
            return replace(blocked, module=module, source=scheme)
        goal = blocked
    cast, rounding = _scales(goal, target, moves)
    if isinstance(cast, Step):
        return replace(cast, module=module, source=scheme)
    goal = target.adopt(cast)
    if reason := target.cannot(goal):
        return Step(module, Verdict.IMPOSSIBLE, scheme, goal, reason=reason, fix=_ways_out(scheme))
    verdict = Verdict.ROUNDED if rounding else Verdict.EXACT
    reason = rounding or ", ".join(map(str, moves)) or "repacked"
    return Step(module, verdict, scheme, goal, tuple(moves), reason)


def _blocked(scheme: Scheme, verdict: Verdict, reason: str, fix: str) -> Step:
    return Step("", verdict, scheme, scheme, reason=reason, fix=fix)


def _ways_out(scheme: Scheme) -> str:
    """Return which formats hold a scheme that the target does not."""
    both = scheme.scale_dtype == "F16" and scheme.bits in (2, 3, 4, 8)
    return "--to gptq_v2 or canonical keep it" if both else "--to canonical keeps it"


def _bits(goal: Scheme, target: Format, wishes: Wishes, moves: list[Move]) -> Scheme | Step:
    """Widen to the wished bits, or to the fewest the target has."""
    assert target.capacity is not None
    wider = [b for b in target.capacity.bits if b >= goal.bits]
    bits = wishes.bits if wishes.bits is not None else min(wider, default=0)
    if bits < goal.bits:
        wanted = bits or max(target.capacity.bits)
        return _blocked(
            goal,
            Verdict.REQUANTIZED,
            f"{goal.bits}-bit codes do not fit {wanted} bits",
            _ways_out(goal),
        )
    if bits > goal.bits:
        symmetric = wishes.sym or (goal.zeros is not None and goal.symmetric)
        # A symmetric grid stays symmetric when it is widened: engines that take only symmetric
        # files would otherwise refuse what was one before.
        name = "symmetrize" if symmetric else "widen"
        moves.append(Move(name, bits))
        facts = goal.zeros
        if facts is not None and symmetric:
            mid = 1 << (bits - 1)
            facts = ZeroFacts(mid, mid, facts.count, facts.count)
        elif facts is not None:
            facts = replace(facts, midpoint=0, at_maxq=0)
        return replace(goal, bits=bits, zeros=facts, sym=symmetric)
    return goal


def _order(goal: Scheme, target: Format, wishes: Wishes, moves: list[Move]) -> Scheme | Step:
    """Act order is kept, or there is no exact way."""
    assert target.capacity is not None
    if goal.act_order and not target.capacity.act_order:
        return _blocked(
            goal,
            Verdict.REQUANTIZED,
            f"columns are in act order, and {target.name} has no g_idx",
            _ways_out(goal),
        )
    return goal


def _groups(goal: Scheme, target: Format, wishes: Wishes, moves: list[Move]) -> Scheme | Step:
    """Split groups to the wished size, or a ragged last group to whole ones."""
    assert target.capacity is not None
    inp = goal.in_features
    size = goal.group_size
    if wishes.group_size is not None:
        size = inp if wishes.group_size == -1 else min(wishes.group_size, inp)
    elif not target.capacity.ragged and inp % size:
        size = gcd(size, inp)
    if size == goal.group_size:
        return goal
    if goal.act_order:
        return _blocked(
            goal,
            Verdict.IMPOSSIBLE,
            f"groups in act order cannot be split to {size} inputs",
            "leave out --group-size",
        )
    if goal.group_size % size and not (goal.groups == 1 and size < inp):
        return _blocked(
            goal,
            Verdict.REQUANTIZED,
            f"groups of {goal.group_size} inputs are not groups of {size}",
            f"a --group-size that divides {gcd(goal.group_size, inp)}",
        )
    moves.append(Move("split_groups", size))
    return replace(goal, group_size=size)


def _zeros(goal: Scheme, target: Format, wishes: Wishes, moves: list[Move]) -> Scheme | Step:
    """Bring zeros into what every reader of the target agrees on."""
    assert target.capacity is not None
    facts = goal.zeros
    if facts is None:
        raise ValueError("a plan needs a surveyed model")
    if wishes.sym and not facts.symmetric:
        return _blocked(
            goal,
            Verdict.REQUANTIZED,
            f"zeros differ from the midpoint, and {goal.bits}-bit codes leave no room to shift",
            "--bits 8 with --sym is exact" if goal.bits == 4 else "leave out --sym",
        )
    low, high = target.capacity.zeros(goal.bits)
    if facts.lowest >= low and facts.highest <= high:
        return replace(goal, sym=facts.symmetric)
    widened = next((n for n, m in enumerate(moves) if m.name == "widen"), None)
    if widened is not None:
        # The codes are being widened anyway: shifting them to the midpoint always fits then.
        moves[widened] = Move("symmetrize", goal.bits)
        mid = goal.midpoint
        return replace(goal, sym=True, zeros=ZeroFacts(mid, mid, facts.count, facts.count))
    out = facts.lowest if facts.lowest < low else facts.highest
    wider = [b for b in target.capacity.bits if b > goal.bits]
    ways = ["--to canonical"]
    if facts.highest < 1 << goal.bits and goal.scale_dtype == "F16":
        ways.insert(0, "--to gptq_v2")
    if wider:
        ways.insert(0, f"--bits {wider[0]}")
    return _blocked(
        goal,
        Verdict.REQUANTIZED if not wider else Verdict.IMPOSSIBLE,
        f"some zeros are {out}, and {target.name} holds {low} to {high} at {goal.bits} bits",
        " or ".join(ways) + (" is" if len(ways) == 1 else " are") + " exact",
    )


def _scales(goal: Scheme, target: Format, moves: list[Move]) -> tuple[Scheme | Step, str]:
    """Cast scales where the target's readers take another dtype; return what it costs."""
    assert target.capacity is not None
    allowed = target.capacity.scale_dtypes
    if goal.scale_dtype in allowed:
        return goal, ""
    moves.append(Move("cast_scales", allowed[0]))
    cast = replace(goal, scale_dtype=allowed[0])
    if goal.scales is None:
        raise ValueError("a plan needs a surveyed model")
    if goal.scales.exact:
        return cast, ""
    if not goal.scales.kept:
        reason = f"some {goal.scale_dtype} scales overflow {allowed[0]}, or become 0 in it"
        return _blocked(goal, Verdict.IMPOSSIBLE, reason, "--to canonical keeps them"), ""
    bound = "2^-11 of each scale, 2^-25 absolute below 2^-14"
    return cast, f"{goal.scale_dtype} scales rounded to {allowed[0]}: at most {bound}"
