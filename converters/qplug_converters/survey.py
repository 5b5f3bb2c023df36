"""Facts that only zeros and scales can tell, read without torch.

Headers say how a linear is stored, not whether its zeros fit another format, which zero rule its
producer meant, or whether its scales survive in float16. A plan needs these facts; `inspect` shows
them on demand. Zeros are about 1/group_size of a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from . import bitstream, zeros
from .block import some
from .errors import QplugError, raise_all
from .format import Format, Peek
from .layout import Holds, Layout, Part, swapped
from .scheme import Kind, ModelScheme, ScaleFacts, Scheme, ZeroFacts
from .source import REPAIR

BLOCK = 1 << 18
"""Stored words read at a time: a block of decoded zeros takes at most 40 MB."""


class HasPeek(Protocol):
    """A checkpoint, or the files of one."""

    @property
    def peek(self) -> Peek:
        """Read one small tensor."""


def survey(tensors: HasPeek, found: Format, model: ModelScheme) -> ModelScheme:
    """Return `model` with the facts about zeros and scales filled in.

    A symmetric linear whose zeros are not the midpoint under the rule of its producer is read by
    the rule of the format under which they are, and a note says so; a forced rule stays.

    Raises
    ------
    QplugError
        If zeros lie outside the grid, or a file is labelled as what its zeros say it is not.
    """
    problems: list[QplugError] = []
    linears: dict[str, Scheme] = {}
    retried: Counter[str] = Counter()
    ambiguous: Counter[str] = Counter()
    asymmetric, symmetric = [], []
    for module, scheme in model.linears.items():
        layout = found.layout(scheme)
        part, scales = layout.part(Holds.ZEROS), layout.part(Holds.SCALES)
        if scheme.kind is Kind.OFFSET:
            known = _offset_facts(tensors, module, layout, scheme)
            linears[module] = known
            if scheme.sym and known.zeros is not None and not known.zeros.symmetric:
                asymmetric.append(module)
            continue
        if scheme.kind is not Kind.AFFINE:
            linears[module] = scheme
            continue
        assert scales is not None
        if part is None:  # a symmetric file that stores no zeros
            count = scheme.out_features * scheme.groups
            facts = ZeroFacts(scheme.midpoint, scheme.midpoint, count, count)
            scale_facts = _scale_facts(tensors, module, scales)
            linears[module] = replace(scheme, zeros=facts, scales=scale_facts)
            continue
        facts = _facts(tensors, module, part, scheme, scheme.zero_rule)
        if scheme.sym and not facts.symmetric and not model.forced:
            rule = _fitting(tensors, module, part, scheme, found.zero_rules)
            if rule is not None:
                retried[rule] += 1
                scheme = replace(scheme, zero_rule=rule)
                facts = _facts(tensors, module, part, scheme, rule)
            else:
                problems += _mislabelled(tensors, module, part, scheme, found)
        if facts.lowest < 0 or facts.highest > 1 << scheme.bits:
            problems.append(
                QplugError(
                    f"zeros from {facts.lowest} to {facts.highest}",
                    f"{module}.{part.name}",
                    f"0 to {1 << scheme.bits}",
                    REPAIR,
                )
            )
        if scheme.sym and not facts.symmetric:
            asymmetric.append(module)
        if scheme.sym is False and facts.symmetric:
            symmetric.append(module)
        if facts.at_maxq:
            ambiguous[scheme.zero_rule] += facts.at_maxq
        linears[module] = replace(scheme, zeros=facts, scales=_scale_facts(tensors, module, scales))
    raise_all(problems)
    notes = [*model.notes]
    if asymmetric:
        notes.append(
            f"the config says symmetric, but zeros differ from the midpoint in {some(asymmetric)}"
        )
    if symmetric and len(symmetric) == len(linears):
        notes.append(
            "the config says asymmetric, but every zero is the midpoint: engines that take only "
            "symmetric files refuse it for nothing"
        )
    notes += [
        f"zeros of {count} symmetric linears are midpoints by rule `{rule}`"
        for rule, count in retried.items()
    ]
    notes += [
        f"{count} stored zeros are 2^bits - 1, which readers of {found.name} decode in different "
        f"ways; read by rule `{rule}` (producer {model.producer or 'not named'}; --zero-rule "
        "overrides)"
        for rule, count in ambiguous.items()
    ]
    return replace(model, linears=linears, notes=tuple(notes))


def _facts(tensors: HasPeek, module: str, part: Part, scheme: Scheme, rule: str) -> ZeroFacts:
    """Read the zeros of one linear by `rule`."""
    parts = [_facts_of(rows, part, scheme, rule) for rows in _blocks(tensors, module, part)]
    return ZeroFacts(
        min(facts.lowest for facts in parts),
        max(facts.highest for facts in parts),
        sum(facts.midpoint for facts in parts),
        sum(facts.count for facts in parts),
        sum(facts.at_maxq for facts in parts),
    )


def _blocks(tensors: HasPeek, module: str, part: Part) -> Iterator[NDArray[np.generic]]:
    """Iterate over the stored zeros of one linear, a block of rows at a time."""
    stored = tensors.peek(f"{module}.{part.name}")
    if part.shared:
        stored = stored.reshape(1, 1)
    if part.shift:
        stored = stored.astype(np.int16) - np.int16(part.shift)
    if part.packing is not None and part.stored:
        stored = rearrange(stored, swapped(part.stored))
    step = max(1, BLOCK // max(1, stored.shape[1]))
    for at in range(0, len(stored), step):
        yield stored[at : at + step]


def histogram(tensors: HasPeek, found: Format, model: ModelScheme) -> dict[int, dict[int, int]]:
    """Return how often each zero occurs, by bits; linears without zeros are left out."""
    counts: dict[int, Counter[int]] = {}
    for module, scheme in model.linears.items():
        part = found.layout(scheme).part(Holds.ZEROS)
        if part is None:
            continue
        for rows in _blocks(tensors, module, part):
            if part.packing is not None:
                count = scheme.sizes[part.stream.split()[-1]]
                rows = zeros.decode(rows, part.packing, count, scheme.zero_rule)
            values, times = np.unique(rows, return_counts=True)
            counts.setdefault(scheme.bits, Counter()).update(
                dict(zip(values.tolist(), times.tolist(), strict=True))
            )
    return {bits: dict(sorted(found.items())) for bits, found in sorted(counts.items())}


def _facts_of(rows: NDArray[np.generic], part: Part, scheme: Scheme, rule: str) -> ZeroFacts:
    """Read a block of rows of stored zeros."""
    times, at_maxq, found = 1, 0, rows
    if part.packing is not None:
        if len(rows) > 1 and bool((rows == rows[0]).all()):
            # As in a symmetric file; rows do not depend on one another under any rule.
            rows, times = rows[:1], len(rows)
        count = scheme.sizes[part.stream.split()[-1]]
        found = zeros.decode(rows, part.packing, count, rule)
        if part.rule != "as_is":
            fields = bitstream.unpack(rows, part.packing, count)
            at_maxq = int((fields == (1 << scheme.bits) - 1).sum())
    return ZeroFacts(
        int(found.min()),
        int(found.max()),
        int((found == scheme.midpoint).sum()) * times,
        int(found.size) * times,
        at_maxq * times,
    )


def _fitting(
    tensors: HasPeek, module: str, part: Part, scheme: Scheme, rules: tuple[str, ...]
) -> str | None:
    """Return the first of `rules` by which every zero is the midpoint; one row is judged first."""
    if part.packing is None:
        return None
    count = scheme.sizes[part.stream.split()[-1]]
    first = tensors.peek(f"{module}.{part.name}")[:1]
    for rule in rules:
        if rule == scheme.zero_rule or zeros.applies(rule, scheme.bits):
            continue
        decoded = zeros.decode(first, part.packing, count, rule)
        one_row = bool((decoded == scheme.midpoint).all())
        if one_row and _facts(tensors, module, part, scheme, rule).symmetric:
            return rule
    return None


def _mislabelled(
    tensors: HasPeek, module: str, part: Part, scheme: Scheme, found: Format
) -> list[QplugError]:
    """Say if the zeros of a symmetric linear are those of another format of the same tensors."""
    really = dict(found.foreign_rules)
    rule = _fitting(tensors, module, part, scheme, tuple(really))
    if rule is None:
        return []
    return [
        QplugError(
            f"the zeros of a symmetric {really[rule]} file",
            f"{module}.{part.name}",
            f"those of checkpoint_format {found.name!r}",
            "correct checkpoint_format in the config",
        )
    ]


def _floats(raw: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Return stored floats, which NumPy may not know, as float32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def _offset_facts(tensors: HasPeek, module: str, layout: Layout, scheme: Scheme) -> Scheme:
    """Recover the integer zeros of a grid of offsets: zero = rint(-offset / scale).

    The weights stay the same bit for bit where every offset is -(scale * zero), and are rounded
    where it is that product rounded once. Where offsets are neither, or zeros lie outside the grid,
    there are no zeros to tell of.
    """
    parts = {part.holds: part for part in layout}
    found = {}
    for holds in (Holds.SCALES, Holds.OFFSETS):
        part = parts[holds]
        raw = rearrange(tensors.peek(f"{module}.{part.name}"), swapped(part.stream))
        found[holds] = _floats(raw[:, : scheme.groups], part.dtype)
    scales, offsets = found[Holds.SCALES], found[Holds.OFFSETS]
    with np.errstate(all="ignore"):
        exact = np.rint(-offsets / scales)
        zero = np.where(scales == 0, 0, exact)
        near = (-(scales * zero)).astype(np.float16) == offsets
    # Numbers that are none are refused, with a sentence of their own, when they are decoded.
    if not (near & (zero >= 0) & (zero <= 1 << scheme.bits)).all():
        return scheme
    products = bool((scales.astype(np.float64) * zero == -offsets).all())
    facts = ZeroFacts(
        int(zero.min()), int(zero.max()), int((zero == scheme.midpoint).sum()), int(zero.size)
    )
    scale_facts = replace(_scale_facts(tensors, module, parts[Holds.SCALES]), products=products)
    return replace(scheme, zeros=facts, scales=scale_facts)


def _scale_facts(tensors: HasPeek, module: str, part: Part) -> ScaleFacts:
    """Say whether float16 holds the scales of one linear."""
    if part.dtype == "F16":
        return ScaleFacts(exact=True, kept=True)
    raw = tensors.peek(f"{module}.{part.name}")
    wide = _floats(raw, part.dtype)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16).astype(np.float32)
    lost = ~np.isfinite(half) | ((half == 0) & (wide != 0))
    # A scale that is no number is refused when it is decoded, with its own sentence.
    kept = not bool((lost & np.isfinite(wide)).any())
    return ScaleFacts(bool(np.array_equal(half, wide)), kept)
