"""bitsandbytes 8-bit (LLM.int8) as Transformers 5.23 and bitsandbytes 0.50.2 write it.

| name            | dtype   | shape     |                                       |
|-----------------|---------|-----------|---------------------------------------|
| `weight`        | int8    | [out, in] | -127 to 127                           |
| `SCB`           | float32 | [out]     | largest magnitude of the row          |
| `weight_format` | uint8   | []        | 0: row after row; absent in old files |

w = (weight * SCB) * float32(1/127), in float32 and in this order.

Traps. `bnb_4bit_quant_type: fp4` stands in these configs and means nothing. An int8 `weight`
without `SCB` is another tool's. Outliers are found while the model runs: nothing of them is in the
file. Other values of `weight_format` are the tiles of releases before 0.45.
"""

from __future__ import annotations

from dataclasses import replace

from ..block import INCOMPLETE, Keys, modules_with, parts_of, some
from ..claim import Claim, Stated
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import Holds, Layout, Part
from ..scheme import Kind, ModelScheme, Scheme
from . import bnb

TILES = {1: "col32", 2: "col_turing", 3: "col_ampere"}
"""Values of `weight_format` that bitsandbytes releases before 0.45 wrote on some GPUs."""


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    parts = (
        Part(name="weight", holds=Holds.CODES, dtype="I8", stream="out inp -> out inp", shift=-128),
        Part(
            name="SCB",
            holds=Holds.SCALES,
            dtype=scheme.scale_dtype,
            stream="out group -> (out group)",
        ),
        Part(name="weight_format", holds=Holds.CONSTANT, dtype="U8", constant=b"\0"),
    )
    return Layout(tuple(part for part in parts if part.name not in scheme.lacks))


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether linears have an `SCB`, or nothing but the config says anything, and says 8 bits."""
    said = bnb.bits_said(block)
    if said is None or any(bnb.MARK in name for name in headers):
        return False
    return said == 8 or any(name.endswith(".SCB") for name in headers)


def parse(block: Block | None) -> Claim:
    """Judge the config; its `bnb_4bit_*` keys are defaults that mean nothing here."""
    keys = Keys(block)
    skip, lm_head = bnb.common(keys)
    raise_all(keys.problems)
    return Claim(
        format="bnb-int8",
        base=Stated(8, None, sym=True),
        skip=skip,
        lm_head=lm_head,
        block=keys.block,
    )


def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
    """Read the linears: those with an `SCB`."""
    claim = parse(block)
    problems: list[QplugError] = []
    linears: dict[str, Scheme] = {}
    for module in modules_with(headers, "SCB", "weight_format"):
        try:
            linears[module] = _linear(module, headers, peek)
        except QplugError as error:
            problems += [error, *error.others]
    dense = bnb.dense_but(headers, linears)
    problems += [
        QplugError(
            "no such tensor",
            f"{module}.SCB",
            "the scales of an int8 weight",
            "if another tool wrote the file, name it in quant_method",
        )
        for module in dense
        if headers[f"{module}.weight"].dtype == "I8"
        and not any(problem.where.startswith(f"{module}.") for problem in problems)
    ]
    if not linears and not problems:
        problems.append(bnb.nothing(headers, "SCB"))
    raise_all(problems)
    notes = bnb.notes(8, claim.block, claim.skip, linears)
    without = [module for module, scheme in linears.items() if scheme.lacks]
    if 0 < len(without) < len(linears):
        notes.append(f"{some(without)} lacks weight_format, which other linears have")
    return ModelScheme("bnb-int8", linears, dense, "", tuple(notes), claim.block)


def _linear(module: str, headers: Headers, peek: Peek) -> Scheme:
    """Read one linear from its shapes."""
    stored = parts_of(headers, module, ("weight", "SCB", "weight_format"))
    weight = stored.get("weight")
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2 or 0 in weight.shape:
        found = "no such tensor" if weight is None else str(weight)
        raise QplugError(found, f"{module}.weight", "I8[out_features, in_features]", INCOMPLETE)
    out, inp = weight.shape
    lacks = () if "weight_format" in stored else ("weight_format",)
    scheme = Scheme(out, inp, 8, inp, sym=True, scale_dtype="F32", kind=Kind.ROWS, lacks=lacks)
    raise_all(layout(scheme).check(module, scheme.sizes, stored, INCOMPLETE))
    if not lacks and (value := int(peek(f"{module}.weight_format"))) != 0:
        tiles = f"{value} ({TILES[value]} tiles)" if value in TILES else f"{value}"
        raise QplugError(
            tiles,
            f"{module}.weight_format",
            "0: row after row",
            "load it in bitsandbytes 0.44 on a GPU and save it again",
        )
    return scheme


def adopt(scheme: Scheme) -> Scheme:
    """Restate a scheme as LLM.int8; one on another grid becomes what can be quantized to."""
    return replace(
        scheme,
        bits=8,
        group_size=scheme.in_features,
        sym=True,
        desc_act=False,
        act_order=False,
        has_g_idx=False,
        scale_dtype="F32",
        zero_rule="as_is",
        zeros=None,
        scales=None,
        kind=Kind.ROWS,
        codebook=None,
        lacks=(),
    )


def write(model: ModelScheme) -> Written:
    """Return the config block, 4-bit defaults included, as the tool writes it."""
    own = {
        "bnb_4bit_compute_dtype": bnb.compute_dtype(model, "float32"),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    }
    return Written(bnb.block_of(model, 8, own))


FORMAT = Format(
    name="bnb-int8",
    aliases=("llm-int8",),
    title="bitsandbytes 8-bit (LLM.int8): signed codes, one absmax a row",
    capacity=Capacity(
        bits=(8,),
        zeros=lambda bits: (1 << (bits - 1), 1 << (bits - 1)),
        act_order=False,
        ragged=True,
        scale_dtypes=("F32",),
        in_multiple=lambda bits: 1,
        out_multiple=lambda bits: 1,
        kind=Kind.ROWS,
    ),
    claims=claims,
    layout=layout,
    parse=parse,
    read=read,
    adopt=adopt,
    write=write,
)
