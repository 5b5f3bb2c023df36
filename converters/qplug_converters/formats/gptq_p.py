"""GPTQ planar (`checkpoint_format: gptq_p`, GPTQModel 7.7.0): 3-bit codes in two planes.

Tensors, shapes and config are those of `gptq_v2`. Of 32 codes along `in` (zeros: along `out`) the
two low bits come first, as two words, and then the high bits, as one; each plane is a bit stream
of its own, lowest bit first. 2, 4 and 8 bits have one plane: their words are those of `gptq_v2`.
in and out are multiples of 32 at 3 bits.

Traps. 5, 6 and 7 bits are planar too, whatever `checkpoint_format` GPTQModel writes, and are not
read; AutoRound's files of these widths, under the same names, are the plain bit stream.
"""

from __future__ import annotations

from dataclasses import replace

from ..format import Block, Capacity, Format, Headers
from ..layout import Layout
from ..scheme import Scheme
from . import gptq, gptq_v2

PLANES = (2, 1)
"""Widths of the planes of 3-bit codes, the low bits first."""


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether the config says planar; nothing in the tensors can tell."""
    return bool(block) and gptq.claims_kind(block, headers) == "gptq_p"


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    plain = gptq.layout(scheme)
    if scheme.bits != 3:
        return plain
    return Layout(
        tuple(
            part
            if part.packing is None
            else replace(part, packing=replace(part.packing, planes=PLANES))
            for part in plain
        )
    )


def multiple(bits: int) -> int:
    """Return what in_features and out_features must be multiples of: whole planes."""
    return 32 if bits == 3 else gptq.multiple(bits)


_parse = gptq.parse_as("gptq_p", "gptq_p")

FORMAT = Format(
    name="gptq_p",
    aliases=("gptq-p", "planar"),
    title="GPTQ planar (GPTQModel): 3 bits in two planes",
    capacity=Capacity(
        bits=gptq.BITS,
        zeros=lambda bits: (0, (1 << bits) - 1),
        act_order=True,
        ragged=True,
        scale_dtypes=("F16",),
        in_multiple=multiple,
        out_multiple=multiple,
    ),
    claims=claims,
    layout=layout,
    parse=_parse,
    read=gptq.read_as(_parse, lambda *_: "as_is", layout),
    adopt=gptq_v2.adopt,
    write=gptq.write_as("gptq_p"),
    foreign_rules=(("plain", "v1"),),
)
