"""GPTQ v2 (`checkpoint_format: gptq_v2`, GPTQModel): GPTQ with zeros stored as they are.

Tensors, shapes and config are those of `gptq`; a stored zero is the value subtracted, 0 to
2^bits - 1, so every zero that a quantizer makes can be held and all readers agree.
"""

from __future__ import annotations

from ..format import Block, Capacity, Format, Headers
from ..scheme import Scheme
from . import gptq


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether the config says v2; nothing in the tensors can tell."""
    return bool(block) and gptq.claims_kind(block, headers) == "gptq_v2"


def adopt(scheme: Scheme) -> Scheme:
    """Restate a scheme as GPTQ v2 writes it."""
    return gptq.adopt(scheme, "as_is")


_parse = gptq.parse_as("gptq_v2", "gptq_v2")

FORMAT = Format(
    name="gptq_v2",
    aliases=("gptq-v2",),
    title="GPTQ v2 (GPTQModel): zeros stored as they are",
    capacity=Capacity(
        bits=gptq.BITS,
        zeros=lambda bits: (0, (1 << bits) - 1),
        act_order=True,
        ragged=True,
        scale_dtypes=("F16",),
        in_multiple=gptq.multiple,
        out_multiple=gptq.multiple,
    ),
    claims=claims,
    layout=gptq.layout,
    parse=_parse,
    read=gptq.read_as(_parse, lambda *_: "as_is"),
    adopt=adopt,
    write=gptq.write_as("gptq_v2"),
    foreign_rules=(("plain", "v1"),),
)
