"""qplug's own file form: everything a `QuantizedWeight` can hold, as it is.

| name    | dtype             | shape                    |                                  |
|---------|-------------------|--------------------------|----------------------------------|
| `codes` | uint8             | [out, ceil(in * bits/8)] | a row is one bit stream along in |
| `scales`| the source's      | [out, groups]            |                                  |
| `zeros` | int16             | [out, groups]            | the value subtracted             |
| `g_idx` | int32             | [in]                     | only where columns are in act order |

Config: `quant_method: qplug`, `version: 1`, and per module bits, in_features and group_size.
Shards are named `qplug-*.safetensors`, never `model*`: stock Transformers and vLLM take an unknown
`quant_method` for an unquantized model and would invent weights; without a file of a name they
know they stop instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..block import INCOMPLETE, Keys, dense_modules, modules_with
from ..claim import Claim, Stated
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import FLOATS, Holds, Layout, Packing, Part
from ..scheme import ModelScheme, Scheme
from ..stored import read_linears

VERSION = 1


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    parts = [
        Part(
            name="codes",
            holds=Holds.CODES,
            dtype="U8",
            stream="out inp -> out inp",
            packing=Packing(scheme.bits, word="U8"),
        ),
        Part(
            name="scales",
            holds=Holds.SCALES,
            dtype=scheme.scale_dtype,
            stream="out group -> out group",
        ),
        Part(name="zeros", holds=Holds.ZEROS, dtype="I16", stream="out group -> out group"),
    ]
    if scheme.has_g_idx:
        parts.append(Part(name="g_idx", holds=Holds.G_IDX, dtype="I32", stream="inp -> inp"))
    return Layout(tuple(parts))


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether the config says so; nobody else writes it."""
    return (block or {}).get("quant_method") == "qplug"


def parse(block: Block | None) -> Claim:
    """Judge the config: an entry for each module, with bits, in_features and group_size."""
    keys = Keys(block)
    version = keys.get(int, "version")
    modules = keys.get(dict, "modules", default={})
    if version != VERSION:
        keys.problem("version", f"{version}", f"{VERSION}", "use the qplug release that wrote it")
    stated = {}
    for module, entry in modules.items():
        where = f"quantization_config.modules.{module}"
        if not isinstance(entry, dict):
            keys.problem(f"modules.{module}", f"{entry!r}", "a JSON object")
            continue
        own = Keys(entry, where)
        bits, group_size = own.get(int, "bits", default=0), own.get(int, "group_size", default=0)
        in_features = own.get(int, "in_features", default=0)
        if not (1 <= bits <= 8 and group_size > 0 and in_features > 0):
            own.problem("*", f"{entry}", "bits 1 to 8, positive group_size and in_features")
            keys.problems += own.problems
            continue
        stated[module] = Stated(bits, group_size, in_features=in_features)
    raise_all(keys.problems)
    base = next(iter(stated.values()), Stated(4, None))
    return Claim(
        format="canonical",
        base=base,
        overrides=stated.get,
        producer="qplug",
        block=keys.block,
        details={"modules": tuple(stated)},
    )


def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
    """Read the schemes; config and headers must say the same."""
    claim = parse(block)
    problems: list[QplugError] = []
    said, stored = claim.details["modules"], modules_with(headers, "codes")
    for module in sorted(set(stored) ^ set(said)):
        there = module in said
        problems.append(
            QplugError(
                "no tensors" if there else "no entry",
                f"{module}.codes" if there else f"quantization_config.modules.{module}",
                "both an entry in the config and tensors",
                INCOMPLETE,
            )
        )
    both = [module for module in stored if module in said]
    linears = read_linears(claim, both, layout, headers, peek, problems)
    raise_all(problems)
    if not linears:
        raise QplugError(
            "no `*.codes` tensor", "the checkpoint's headers", "quantized linears", INCOMPLETE
        )
    return ModelScheme("canonical", linears, dense_modules(headers), "qplug", (), claim.block)


def adopt(scheme: Scheme) -> Scheme:
    """Restate a scheme as the canonical form holds it: g_idx only where it says something."""
    return replace(scheme, has_g_idx=scheme.act_order, zero_rule="as_is", desc_act=False)


def write(model: ModelScheme) -> Written:
    """Return the config block with one entry per quantized module."""
    modules: dict[str, Any] = {
        name: {
            "bits": scheme.bits,
            "in_features": scheme.in_features,
            "group_size": scheme.group_size,
        }
        for name, scheme in model.linears.items()
    }
    return Written({"quant_method": "qplug", "version": VERSION, "modules": modules})


FORMAT = Format(
    name="canonical",
    aliases=("qplug",),
    title="qplug's own form: any bits, zeros, groups and act order",
    capacity=Capacity(
        bits=tuple(range(1, 9)),
        zeros=lambda bits: (0, 1 << bits),
        act_order=True,
        ragged=True,
        scale_dtypes=FLOATS,
        in_multiple=lambda bits: 1,
        out_multiple=lambda bits: 1,
    ),
    claims=claims,
    layout=layout,
    parse=parse,
    read=read,
    adopt=adopt,
    write=write,
    shard_stem="qplug",
)
