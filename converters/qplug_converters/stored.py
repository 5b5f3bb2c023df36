"""Reading one stored linear from headers: they decide, and the config must agree.

Formats say where things lie (their `layout`) and what their config claims (`Stated`); what follows
from shapes is the same for all of them and is worked out here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from .block import INCOMPLETE, parts_of
from .claim import Claim, Stated
from .errors import QplugError, raise_all
from .format import Headers, Peek
from .layout import FLOATS, Holds, Layout, Part, TensorSpec
from .scheme import Scheme


def read_linears(
    claim: Claim,
    modules: Iterable[str],
    layout: Callable[[Scheme], Layout],
    headers: Headers,
    peek: Peek,
    problems: list[QplugError],
) -> dict[str, Scheme]:
    """Return the schemes of `modules`, each held against what the config claims.

    What is wrong with one is added to `problems`, and the others are read all the same.
    """
    linears = {}
    for module in modules:
        try:
            linears[module] = read_linear(module, claim.of(module), layout, headers, peek)
        except QplugError as error:
            problems += [error, *error.others]
    return linears


def read_linear(
    module: str,
    stated: Stated,
    layout: Callable[[Scheme], Layout],
    headers: Headers,
    peek: Peek,
) -> Scheme:
    """Return the scheme of one linear.

    Raises
    ------
    QplugError
        Everything that is missing, of a wrong shape or dtype, or in contradiction to the config.
    """
    ordered = layout(Scheme(32, 32, stated.bits, 32, has_g_idx=True)).part(Holds.G_IDX)
    g_idx = ordered.name if ordered and f"{module}.{ordered.name}" in headers else ""
    blank = Scheme(32, 32, stated.bits, 32, has_g_idx=bool(g_idx))
    parts = {part.holds: part for part in layout(blank)}
    stored = parts_of(headers, module, [part.name for part in parts.values()])
    _present(module, parts.values(), stored)
    codes, scales = parts[Holds.CODES], parts[Holds.SCALES]
    found = stored[scales.name]
    if found.dtype not in FLOATS:
        raise QplugError(str(found), f"{module}.{scales.name}", " or ".join(FLOATS), INCOMPLETE)
    groups = 1 if scales.shared else found.shape[scales.axes.index("group")]
    length = stored[g_idx].shape[0] if g_idx else None
    where, shape = f"{module}.{codes.name}", stored[codes.name]
    out = _length(where, codes, shape, "out")
    inp = stated.in_features or _length(where, codes, shape, "inp", length)
    scheme = Scheme(
        out,
        inp,
        stated.bits,
        _group_size(f"{module}.{codes.name}", stated, inp, groups),
        sym=stated.sym,
        desc_act=stated.desc_act,
        has_g_idx=bool(g_idx),
        scale_dtype=found.dtype,
    )
    said = f"the config says {stated.bits} bits, group_size {stated.group_size}"
    raise_all(layout(scheme).check(module, scheme.sizes, stored, f"{said}; the tensors must agree"))
    return _ordered(f"{module}.{g_idx}", scheme, peek) if g_idx else scheme


def _present(module: str, parts: Iterable[Part], stored: dict[str, TensorSpec]) -> None:
    """Refuse parts that are not there, empty, or of another number of dimensions."""
    problems = []
    for part in parts:
        where, wanted = f"{module}.{part.name}", f"a {len(part.axes)}-D tensor"
        if part.name not in stored:
            problems.append(QplugError("no such tensor", where, wanted, INCOMPLETE))
            continue
        spec = stored[part.name]
        if len(spec.shape) != len(part.axes) or 0 in spec.shape:
            problems.append(QplugError(str(spec), where, f"{wanted}, not empty", INCOMPLETE))
    raise_all(problems)


def _length(where: str, codes: Part, found: TensorSpec, axis: str, g_idx: int | None = None) -> int:
    """Work out in_features or out_features from the shape of the codes.

    A `g_idx` must have as many entries as its axis.
    """
    at = next(n for n, names in enumerate(codes.axes) if axis in names.split())
    size = found.shape[at]
    if codes.packing is not None and codes.packed_axis == at:
        bits, word = codes.packing.bits, codes.packing.word_bits
        if g_idx is not None and size * word != g_idx * bits:
            likely = next((b for b in range(1, 9) if size * word == g_idx * b), None)
            raise QplugError(
                str(found),
                where,
                f"{codes.packing.words(g_idx)} words for {bits} bits and a g_idx of {g_idx}",
                f"the file looks like {likely}-bit" if likely else "the shard is damaged",
            )
        if size * word % bits:
            raise QplugError(
                str(found), where, f"whole words of {bits} bits", "correct bits in the config"
            )
        size = size * word // bits
    inner, cut = codes.cut(axis)
    if size % inner:
        raise QplugError(str(found), where, f"a multiple of {inner} codes along {axis}", INCOMPLETE)
    return size // inner * cut


def _group_size(where: str, stated: Stated, inp: int, groups: int) -> int:
    """Return inputs per group: what the config says, or what the number of groups leaves."""
    size = stated.group_size
    if size is None:
        if inp % groups:
            raise QplugError(
                "no such key",
                "quantization_config.group_size",
                "a positive number",
                "correct the config",
            )
        return inp // groups
    if size == -1:
        return inp
    if size < 1:
        raise QplugError(
            f"group_size {size}", where, "-1 or a positive number", "correct the config"
        )
    if not stated.ragged and inp % size:
        raise QplugError(
            f"group_size {size} for {inp} inputs",
            where,
            "a divisor of in_features",
            "correct group_size in the config",
        )
    return min(size, inp)


def _ordered(where: str, scheme: Scheme, peek: Peek) -> Scheme:
    """Read `g_idx`: whether the columns really are in act order."""
    g_idx = peek(where)
    if g_idx.min() < 0 or g_idx.max() >= scheme.groups:
        raise QplugError(
            f"values from {g_idx.min()} to {g_idx.max()}",
            where,
            f"0 to {scheme.groups - 1}",
            INCOMPLETE,
        )
    regular = np.arange(scheme.in_features) // scheme.group_size
    return replace(
        scheme,
        act_order=not np.array_equal(g_idx, regular),
        sortable=np.array_equal(np.sort(g_idx), regular),
    )
