"""AWQ GEMV as AutoAWQ 0.2.9 writes it (`version: gemv`), 4 bits.

| name      | dtype   | shape       | packed along                         |
|-----------|---------|-------------|--------------------------------------|
| `qweight` | int32   | [out, in/8] | in, fields in natural order          |
| `qzeros`  | int32   | [out, zw]   | groups, natural order; zeros as are  |
| `scales`  | float16 | [out, zw*8] | -                                    |

w[n, k] = scales[n, k // G] * (code - zero), zeros 0 to 15. zw = ceil(ceil((in/G) / 8) / m) * m, and
m is 1 for groups of 128 and more, 2 for 64, 4 for 32: groups are padded with zeros to a multiple of
8 * m. Smaller groups have no definition. in is a multiple of G and of 8, out of 8; no `g_idx`.

Traps. The number of groups cannot be read from shapes; a config without `group_size` leaves the
padding of the scales to tell. Stock vLLM never looks at `version`.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from ..block import modules_with
from ..claim import Claim
from ..errors import QplugError, raise_all
from ..format import Block, Format, Headers, Peek
from ..layout import Holds, Layout, Packing, Part
from ..scheme import ModelScheme, Scheme
from .awq import CAPACITY, check_stored, claims_kind, parse_as, read_with, stored, write_as

GROUPS = (32, 64, 128)
"""Group sizes that are written; larger ones are read."""


def padding(group_size: int) -> int:
    """Return what the number of groups is padded to a multiple of (`calculate_zeros_width`)."""
    return 8 * {32: 4, 64: 2}.get(group_size, 1)


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    padded = padding(scheme.group_size)
    return stored(
        scheme,
        (
            Part(
                name="qweight",
                holds=Holds.CODES,
                dtype="I32",
                stream="out inp -> out inp",
                packing=Packing(4),
            ),
            Part(
                name="qzeros",
                holds=Holds.ZEROS,
                dtype="I32",
                stream="out group -> out group",
                packing=Packing(4),
                multiple=padded,
            ),
            Part(
                name="scales",
                holds=Holds.SCALES,
                dtype=scheme.scale_dtype,
                stream="out group -> out group",
                multiple=padded,
            ),
        ),
    )


def with_group_size(claim: Claim, found: Layout, headers: Headers, peek: Peek) -> Claim:
    """Return the claim with the group size of the first linear, where the config names none.

    The padding of its scales is zero; `found` says on which axis.

    Raises
    ------
    QplugError
        If what is not zero is no whole number of groups.
    """
    scales, codes = found.part(Holds.SCALES), found.part(Holds.CODES)
    if claim.base.group_size is not None or scales is None or codes is None:
        return claim
    for module in modules_with(headers, "qweight"):
        where = f"{module}.{scales.name}"
        shape, spec = headers[f"{module}.{codes.name}"].shape, headers.get(where)
        if spec is None or len(spec.shape) != 2 or len(shape) != 2 or 0 in (*shape, *spec.shape):
            continue
        axis = scales.axes.index("group")
        used = np.atleast_1d(peek(where).any(axis=1 - axis))
        groups = int(used.sum())
        inp = prod(shape) * _CODES_PER_WORD[headers[f"{module}.{codes.name}"].dtype]
        inp //= spec.shape[1 - axis]
        if not used[:groups].all() or groups == 0 or inp % groups:
            raise QplugError(
                f"{groups} groups with scales, for {inp} inputs",
                where,
                "the groups first and zeros behind them, or a group_size in the config",
                "write group_size into the config",
            )
        return replace(claim, base=replace(claim.base, group_size=inp // groups))
    return claim


_CODES_PER_WORD = {"I32": 8, "I16": 4}


def check_groups(model: ModelScheme) -> ModelScheme:
    """Refuse group sizes for which the padding has no definition.

    Raises
    ------
    QplugError
        If there is one.
    """
    raise_all(
        [
            QplugError(
                f"groups of {scheme.group_size} inputs",
                module,
                "32, 64, or 128 and more",
                "correct group_size in the config",
            )
            for module, scheme in model.linears.items()
            if scheme.group_size < 128 and scheme.group_size not in GROUPS
        ]
    )
    return model


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether the config says GEMV, or names no version and the shapes do."""
    return claims_kind("gemv", block, headers)


def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
    """Read the schemes of a checkpoint; headers decide, the config must agree."""
    claim = parse(block)
    check_stored(headers, "gemv")
    claim = with_group_size(claim, layout(Scheme(32, 32, 4, 32)), headers, peek)
    return check_groups(read_with(claim, layout, headers, peek, "gemv"))


parse = parse_as("gemv", "awq_gemv")

FORMAT = Format(
    name="awq_gemv",
    aliases=("awq-gemv", "gemv"),
    title="AWQ GEMV (AutoAWQ): 4 bits, packed along the inputs",
    capacity=replace(CAPACITY, in_multiple=lambda bits: 8, group_sizes=GROUPS),
    claims=claims,
    layout=layout,
    parse=parse,
    read=read,
    write=write_as("gemv"),
)
