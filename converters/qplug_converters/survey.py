"""Facts that only zeros and scales can tell, read without torch.

Headers say how a linear is stored, not whether its zeros fit another format, which zero rule its
producer meant, or whether its scales survive in float16. A plan needs these facts; `inspect` shows
them on demand. Zeros are about 1/group_size of a checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from . import bitstream, zeros
from .errors import QplugError, raise_all
from .format import Format, Peek
from .layout import Holds, Part
from .scheme import ModelScheme, Scheme, ZeroFacts
from .shards import REPAIR


class HasPeek(Protocol):
    """A checkpoint, or the files of one."""

    @property
    def peek(self) -> Peek:
        """Read one small tensor."""


SYMMETRIC_RULES = ("plain", "legacy3", "word:2", "word:4", "word:8")
"""Rules tried, in this order, where a symmetric file does not decode to midpoints."""


def _facts(tensors: HasPeek, module: str, part: Part, scheme: Scheme, rule: str) -> ZeroFacts:
    """Read the zeros of one linear by `rule`."""
    stored = tensors.peek(f"{module}.{part.name}")
    if part.packing is None:
        return _count(stored, scheme, 0)
    count = scheme.sizes[part.stream.split()[-1]]
    rows = rearrange(stored, _swap(part.stored)) if part.stored else stored
    alike = len(rows) > 1 and bool((rows == rows[0]).all())
    if alike:  # as in a symmetric file; rows do not depend on one another under any rule
        rows, times = rows[:1], len(rows)
    found = zeros.decode(rows, part.packing, count, rule)
    at_maxq = 0
    if part.rule != "as_is":
        fields = bitstream.unpack(rows, part.packing, count)
        at_maxq = int((fields == (1 << scheme.bits) - 1).sum())
    facts = _count(found, scheme, at_maxq)
    if not alike:
        return facts
    many = {name: getattr(facts, name) * times for name in ("midpoint", "count", "at_maxq")}
    return replace(facts, **many)


def _count(found: NDArray[np.generic], scheme: Scheme, at_maxq: int) -> ZeroFacts:
    """Count decoded zeros."""
    return ZeroFacts(
        int(found.min()),
        int(found.max()),
        int((found == scheme.midpoint).sum()),
        int(found.size),
        at_maxq,
    )


def _symmetric_by(
    tensors: HasPeek, module: str, part: Part, scheme: Scheme, rule: str
) -> ZeroFacts | None:
    """Return the facts under `rule` if every zero is the midpoint then; one row is judged first."""
    if zeros.applies(rule, scheme.bits) or part.packing is None:
        return None
    count = scheme.sizes[part.stream.split()[-1]]
    first = zeros.decode(tensors.peek(f"{module}.{part.name}")[:1], part.packing, count, rule)
    if (first != scheme.midpoint).any():
        return None
    facts = _facts(tensors, module, part, scheme, rule)
    return facts if facts.symmetric else None


def _swap(pattern: str) -> str:
    left, _, right = pattern.partition("->")
    return f"{right.strip()} -> {left.strip()}"


def _fits_f16(tensors: HasPeek, module: str, part: Part) -> bool:
    """Whether every scale is representable in float16."""
    raw = tensors.peek(f"{module}.{part.name}")
    wide = (
        (raw.astype(np.uint32) << 16).view(np.float32)
        if part.dtype == "BF16"
        else raw.astype(np.float32)
    )
    with np.errstate(over="ignore"):
        return bool(np.array_equal(wide.astype(np.float16).astype(np.float32), wide))


_LABELS = {"as_is": ("gptq", "v2"), "v1": ("gptq_v2", "v1")}
"""Rules of the other `checkpoint_format`: what the config says, and what the zeros are."""


def _other_rule(
    tensors: HasPeek, module: str, part: Part, scheme: Scheme, found: Format
) -> str | None:
    """Return the rule by which the zeros of a symmetric GPTQ linear are midpoints, if there is one.

    `as_is` for a file labelled v1, or `v1` for one labelled v2, means that the label is wrong.
    """
    rules: tuple[str, ...] = ()
    if found.name == "gptq":
        rules = (*SYMMETRIC_RULES, "as_is")
    elif found.name == "gptq_v2":
        rules = ("plain",)
    for rule in rules:
        if rule != scheme.zero_rule and _symmetric_by(tensors, module, part, scheme, rule):
            return "v1" if found.name == "gptq_v2" else rule
    return None


def survey(tensors: HasPeek, found: Format, model: ModelScheme) -> ModelScheme:
    """Return `model` with the facts about zeros and scales filled in.

    A symmetric GPTQ v1 linear whose zeros are not the midpoint under the rule of its producer is
    read by the rule under which they are, and a note says so.

    Raises
    ------
    QplugError
        If a symmetric file has the zeros of the other `checkpoint_format`.
    """
    notes = list(model.notes)
    problems: list[QplugError] = []
    linears: dict[str, Scheme] = {}
    ambiguous: dict[str, int] = {}
    asymmetric, retried = [], []
    for module, scheme in model.linears.items():
        layout = found.layout(scheme)
        part, scales = layout.part(Holds.ZEROS), layout.part(Holds.SCALES)
        assert part is not None
        assert scales is not None
        rule = scheme.zero_rule
        facts = _facts(tensors, module, part, scheme, rule)
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
            other = _other_rule(tensors, module, part, scheme, found)
            if other in _LABELS:
                says, has = _LABELS[other]
                problems.append(
                    QplugError(
                        f"the zeros of a symmetric {has} file",
                        f"{module}.{part.name}",
                        f"those of checkpoint_format {says!r}",
                        "correct checkpoint_format in the config",
                    )
                )
            elif other is not None:
                rule, facts = other, _facts(tensors, module, part, scheme, other)
                retried.append((module, other))
            else:
                asymmetric.append(module)
        if facts.at_maxq:
            ambiguous[rule] = ambiguous.get(rule, 0) + facts.at_maxq
        linears[module] = replace(
            scheme,
            zero_rule=rule,
            zeros=facts,
            scales_fit_f16=scheme.scale_dtype == "F16" or _fits_f16(tensors, module, scales),
        )
    raise_all(problems)
    if asymmetric:
        notes.append(
            f"the config says symmetric, but zeros differ from the midpoint in {asymmetric[0]}"
            + (f" and {len(asymmetric) - 1} more" if len(asymmetric) > 1 else "")
        )
    if retried:
        notes.append(
            f"zeros of {len(retried)} symmetric linears are midpoints by rule `{retried[0][1]}`"
        )
    for rule, count in ambiguous.items():
        notes.append(
            f"{count} stored zeros are 2^bits - 1, which readers of GPTQ v1 decode in different "
            f"ways; read by rule `{rule}` (producer {model.producer or 'not named'}; --zero-rule "
            "overrides)"
        )
    return replace(model, linears=linears, notes=tuple(notes))
