"""A layout that no tool writes: made up to hold CONTRIBUTING's "add a format" to its word.

| name      | dtype    | shape             | packed along                                    |
|-----------|----------|-------------------|-------------------------------------------------|
| `nibbles` | int16    | [out, in*bits/16] | in; the first code in the highest bits of a word |
| `steps`   | bfloat16 | [in/G, out]       | -                                               |
| `middle`  | uint8    | [out, in/G]       | -; the zero plus one                            |

w[n, k] = steps[k // G, n] * (code - (middle[n, k // G] - 1)), codes of 2 or 4 bits, zeros 0 to
2^bits - 1. in is a multiple of G and fills whole words; no `g_idx`.

Config: `quant_method: invented`, `revision: 1`; `width` and `run` are bits and G. `layers` gives
single modules a width and a run of their own, `plain` lists the dense linears, where there are any.

Written by no tool, read from none. Trap: a module in `plain` may not be quantized.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from qplug_converters.block import INCOMPLETE, Keys, dense_linears, dense_modules, modules_with
from qplug_converters.claim import Claim, Stated
from qplug_converters.errors import QplugError, raise_all
from qplug_converters.format import Block, Capacity, Format, Headers, Peek, Written
from qplug_converters.layout import Holds, Layout, Packing, Part
from qplug_converters.scheme import ModelScheme, Scheme
from qplug_converters.stored import read_linears

WIDTHS = (2, 4)


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    first_highest = tuple(reversed(range(16 // scheme.bits)))
    return Layout(
        (
            Part(
                name="nibbles",
                holds=Holds.CODES,
                dtype="I16",
                stream="out inp -> out inp",
                packing=Packing(scheme.bits, word="I16", order=first_highest),
            ),
            Part(
                name="steps",
                holds=Holds.SCALES,
                dtype=scheme.scale_dtype,
                stream="out group -> group out",
            ),
            Part(
                name="middle",
                holds=Holds.ZEROS,
                dtype="U8",
                stream="out group -> out group",
                shift=1,
            ),
        )
    )


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether the config says so."""
    return (block or {}).get("quant_method") == "invented"


def parse(block: Block | None) -> Claim:
    """Judge the config alone."""
    keys = Keys(block)
    if (revision := keys.get(int, "revision")) != 1:
        keys.problem("revision", f"{revision}", "1")
    base = _stated(keys)
    layers = {}
    for name, entry in keys.get(dict, "layers", default={}).items():
        if not isinstance(entry, dict):
            keys.problem(f"layers.{name}", f"{entry!r}", "a JSON object")
            continue
        own = Keys(entry, f"{keys.where}.layers.{name}")
        layers[name] = _stated(own, base)
        keys.problems += own.problems
    plain = {str(name) for name in keys.get(list, "plain", default=[])}
    raise_all(keys.problems)
    return Claim(
        format="invented",
        base=base,
        overrides=layers.get,
        skip=lambda module: module if module in plain else None,
        block=keys.block,
    )


def _stated(keys: Keys, base: Stated | None = None) -> Stated:
    """Return what one object says of linears; what it leaves out is as in `base`."""
    width = keys.get(int, "width", default=base and base.bits)
    run = keys.get(int, "run", default=base and base.group_size)
    if width not in WIDTHS:
        keys.problem("width", f"{width}", "2 or 4")
    if run is None or run < 1:
        keys.problem("run", f"{run}", "a positive number")
    return Stated(width or 4, run, ragged=False)


def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
    """Read the schemes of a checkpoint; headers decide, the config must agree."""
    claim = parse(block)
    modules = modules_with(headers, "nibbles")
    problems = [
        QplugError("a quantized linear", "quantization_config.plain", f"{module} left out")
        for module in modules
        if claim.skip(module)
    ]
    linears = read_linears(claim, modules, layout, headers, peek, problems)
    raise_all(problems)
    if not linears:
        raise QplugError(
            "no `*.nibbles` tensor", "the checkpoint's headers", "quantized linears", INCOMPLETE
        )
    return ModelScheme("invented", linears, dense_modules(headers), block=claim.block)


def write(model: ModelScheme) -> Written:
    """Return the config block: the most common scheme, and the linears that differ from it."""
    stated = {
        module: {"width": scheme.bits, "run": scheme.group_size}
        for module, scheme in model.linears.items()
    }
    ((width, run), _), *_ = Counter(tuple(one.values()) for one in stated.values()).most_common()
    base = {"width": width, "run": run}
    block: dict[str, Any] = {"quant_method": "invented", "revision": 1, **base}
    if layers := {module: one for module, one in stated.items() if one != base}:
        block["layers"] = layers
    if plain := list(dense_linears(model.dense)):
        block["plain"] = plain
    return Written(block)


FORMAT = Format(
    name="invented",
    title="Invented: high nibbles first, zeros plus one",
    capacity=Capacity(
        bits=WIDTHS,
        zeros=lambda bits: (0, (1 << bits) - 1),
        act_order=False,
        ragged=False,
        scale_dtypes=("BF16",),
        in_multiple=lambda bits: 16 // bits,
        out_multiple=lambda bits: 1,
    ),
    claims=claims,
    layout=layout,
    parse=parse,
    read=read,
    write=write,
    keys=frozenset({"revision", "width", "run", "layers", "plain"}),
)
