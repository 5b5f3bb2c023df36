"""What becomes of each format in each other one: plans of one linear, in all its varieties.

Generated from the formats' capacities by the code that plans conversions; nothing is listed by
hand. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import formats
from .format import Format
from .plan import make_plan
from .scheme import Kind, ModelScheme, ScaleFacts, Scheme, ZeroFacts
from .verdict import Verdict

_MODULE = "model.layers.0.mlp.down_proj"
_SIZE = 4096
_USUAL = "usual"


def varieties(source: Format) -> Iterator[tuple[str, Scheme]]:
    """Yield what linears of a format may be like, by name; the first is the usual one."""
    holds = source.capacity
    if holds is None or source.read is None:
        return
    usual_bits = 4 if 4 in holds.bits else max(holds.bits)
    group = 64 if holds.kind is Kind.CODEBOOK else 128
    if holds.kind is Kind.ROWS:
        group = _SIZE
    dtype = "F16" if "F16" in holds.scale_dtypes else holds.scale_dtypes[0]
    usual = replace(
        Scheme(_SIZE, _SIZE, usual_bits, group, kind=holds.kind, scale_dtype=dtype),
        zeros=_zeros(usual_bits, sym=True),
        scales=ScaleFacts(exact=True, kept=True),
    )
    usual = source.adopt(usual)
    found = [(_USUAL, usual)]
    if holds.kind in (Kind.AFFINE, Kind.OFFSET):
        low, high = holds.zeros(usual_bits)
        top = (1 << usual_bits) - 1
        # Products of scales and zeros that are not powers of two are rounded where they are stored.
        rounded = ScaleFacts(exact=True, kept=True, products=holds.kind is not Kind.OFFSET)
        asymmetric = replace(usual, zeros=_zeros(usual_bits, sym=False), scales=rounded)
        found.append(("asymmetric", asymmetric))
        for name, zero in (("zeros of 0", 0), ("zeros of 2^bits", top + 1)):
            if low <= zero <= high:
                facts = ZeroFacts(min(zero, 1), max(zero, top), 0, 1)
                found.append((name, replace(usual, zeros=facts, scales=rounded)))
        found += [
            (f"{bits}-bit", replace(usual, bits=bits, zeros=_zeros(bits, sym=True)))
            for bits in holds.bits
            if bits != usual_bits
        ]
        found.append(("channelwise", replace(usual, group_size=_SIZE)))
        found.append(("short last group", replace(usual, group_size=96)))
        if holds.act_order:
            found.append(("act order", replace(usual, act_order=True, has_g_idx=True)))
        inexact = ScaleFacts(exact=False, kept=True, products=False)
        for dtype in holds.scale_dtypes:
            if dtype != usual.scale_dtype:
                found.append((f"{dtype} scales", replace(usual, scale_dtype=dtype, scales=inexact)))
    for other in formats.FORMATS if holds.also else ():
        if other.capacity is not None and other.capacity.kind in holds.also:
            (_, scheme), *_ = varieties(other)
            found.append((f"{other.name} codes", source.adopt(scheme)))
    for name, scheme in found:
        if source.cannot(scheme) is None:
            yield name, scheme


def _zeros(bits: int, *, sym: bool) -> ZeroFacts:
    mid = 1 << (bits - 1)
    return ZeroFacts(mid, mid, 1, 1) if sym else ZeroFacts(1, (1 << bits) - 1, 0, 1)


def cell(source: Format, target: Format) -> dict[Verdict, list[str]]:
    """Return which varieties of `source` have which verdict in `target`, the best first."""
    found: dict[Verdict, list[str]] = {}
    for name, scheme in varieties(source):
        model = ModelScheme(source.name, {_MODULE: scheme})
        (step,) = make_plan(source, model, target).steps
        found.setdefault(step.verdict, []).append(name)
    return dict(sorted(found.items()))


def matrix() -> dict[tuple[str, str], dict[Verdict, list[str]]]:
    """Return every ordered pair of formats that has a source."""
    return {
        (source.name, target.name): cell(source, target)
        for source in formats.FORMATS
        if source.read is not None
        for target in formats.FORMATS
    }


def grid() -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the whole matrix as a table: the heads, and a row for each source.

    A cell has the usual verdict's first letter (Q for REQUANTIZED), and the worst of the others'.
    """
    found = matrix()
    targets = [target.name for target in formats.FORMATS]
    sources = [source.name for source in formats.FORMATS if source.read is not None]
    rows = [(name, *(_letters(found[name, target]) for target in targets)) for name in sources]
    return ["from, to:", *targets], rows


def _letters(found: dict[Verdict, list[str]]) -> str:
    usual = next(verdict for verdict, names in found.items() if _USUAL in names)
    others = [verdict for verdict in found if verdict is not usual]
    letter = {verdict: verdict.name[0] for verdict in Verdict} | {Verdict.REQUANTIZED: "Q"}
    return letter[usual] + (f" {letter[max(others)]}" if others else "")


def describe(found: dict[Verdict, list[str]]) -> str:
    """Return one cell in words: the usual verdict, then what is otherwise."""
    usual = next(verdict for verdict, names in found.items() if _USUAL in names)
    others = [f"{v.name}: {', '.join(names)}" for v, names in found.items() if v is not usual]
    return "; ".join([usual.name, *others])
