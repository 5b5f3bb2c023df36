"""Facts that only zeros and scales can tell, read without torch.

Headers say how a linear is stored, not whether its zeros fit another format, which zero rule its
producer meant, or whether its scales survive in float16. A plan needs these facts; `inspect` shows
them on demand. Zeros are about 1/group_size of a checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from einops import rearrange

from . import bitstream, zeros
from .checkpoint import Checkpoint
from .errors import QplugError, raise_all
from .format import Format
from .layout import Holds, Part
from .scheme import ModelScheme, Scheme, ZeroFacts

SYMMETRIC_RULES = ("plain", "legacy3", "word:2", "word:4", "word:8")
"""Rules tried, in this order, where a symmetric file does not decode to midpoints."""


def _facts(checkpoint: Checkpoint, module: str, part: Part, scheme: Scheme, rule: str) -> ZeroFacts:
    """Read the zeros of one linear by `rule`."""
    stored = checkpoint.peek(f"{module}.{part.name}")
    at_maxq = 0
    if part.packing is None:
        found = stored
    else:
        count = scheme.sizes[part.stream.split()[-1]]
        rows = rearrange(stored, _swap(part.stored)) if part.stored else stored
        found = zeros.decode(rows, part.packing, count, rule)
        if part.rule != "as_is":
            fields = bitstream.unpack(rows, part.packing, count)
            at_maxq = int((fields == (1 << scheme.bits) - 1).sum())
    return ZeroFacts(
        int(found.min()),
        int(found.max()),
        int((found == scheme.midpoint).sum()),
        int(found.size),
        at_maxq,
    )


def _swap(pattern: str) -> str:
    left, _, right = pattern.partition("->")
    return f"{right.strip()} -> {left.strip()}"


def _fits_f16(checkpoint: Checkpoint, module: str, part: Part) -> bool:
    """Whether every scale is representable in float16."""
    raw = checkpoint.peek(f"{module}.{part.name}")
    wide = (
        (raw.astype(np.uint32) << 16).view(np.float32)
        if part.dtype == "BF16"
        else raw.astype(np.float32)
    )
    with np.errstate(over="ignore"):
        return bool(np.array_equal(wide.astype(np.float16).astype(np.float32), wide))


def survey(checkpoint: Checkpoint, found: Format, model: ModelScheme) -> ModelScheme:
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
        facts = _facts(checkpoint, module, part, scheme, rule)
        if scheme.sym and not facts.symmetric:
            stored_as_other = "plain" if found.name == "gptq_v2" else "as_is"
            if found.name == "gptq":
                for other in SYMMETRIC_RULES:
                    if other == rule or zeros.applies(other, scheme.bits):
                        continue
                    again = _facts(checkpoint, module, part, scheme, other)
                    if again.symmetric:
                        facts, rule = again, other
                        retried.append((module, other))
                        break
            if (
                not facts.symmetric
                and found.name.startswith("gptq")
                and rule != stored_as_other
                and _facts(checkpoint, module, part, scheme, stored_as_other).symmetric
            ):
                says, has = ("gptq_v2", "v1") if found.name == "gptq_v2" else ("gptq", "v2")
                problems.append(
                    QplugError(
                        f"the zeros of a symmetric {has} file",
                        f"{module}.{part.name}",
                        f"those of checkpoint_format {says!r}",
                        "correct checkpoint_format in the config",
                    )
                )
            elif not facts.symmetric:
                asymmetric.append(module)
        if facts.at_maxq:
            ambiguous[rule] = ambiguous.get(rule, 0) + facts.at_maxq
        linears[module] = replace(
            scheme,
            zero_rule=rule,
            zeros=facts,
            scales_fit_f16=scheme.scale_dtype == "F16" or _fits_f16(checkpoint, module, scales),
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
