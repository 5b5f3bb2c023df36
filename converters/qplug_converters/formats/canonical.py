"""qplug's own file form: everything a `QuantizedWeight` can hold, as it is.

| name      | dtype        | shape                    | of grids                        |
|-----------|--------------|--------------------------|---------------------------------|
| `codes`   | uint8        | [out, ceil(in * bits/8)] | all; a row is one bit stream    |
| `scales`  | the source's | [out, groups]            | affine, offset                  |
| `zeros`   | int16        | [out, groups]            | affine: the value subtracted    |
| `g_idx`   | int32        | [in]                     | affine, columns in act order    |
| `offsets` | float16      | [out, groups]            | offset (AWQ GEMV_FAST)          |
| `absmax`  | float32      | [out], or [blocks]       | rows (LLM.int8), or codebook    |
| `table`   | float32      | [2^bits]                 | codebook (NF4, FP4)             |

Config: `quant_method: qplug`, `version: 1`, and per module bits, in_features and group_size (of a
codebook, the weights that share an absmax), `grid` where it is not affine, `codebook` its name.
Shards are named `qplug-*.safetensors`, never `model*`: stock Transformers and vLLM take an unknown
`quant_method` for an unquantized model and would invent weights; without a file of a name they
know they stop instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..block import INCOMPLETE, Keys, dense_modules, modules_with, parts_of
from ..claim import Claim, Stated
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import FLOATS, Holds, Layout, Packing, Part
from ..scheme import Codebook, Kind, ModelScheme, Scheme
from ..stored import read_linears

VERSION = 1


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    codes = Part(
        name="codes",
        holds=Holds.CODES,
        dtype="U8",
        stream="out inp -> out inp",
        packing=Packing(scheme.bits, word="U8"),
    )
    return Layout((codes, *_GRIDS[scheme.kind](scheme)))


def _affine(scheme: Scheme) -> tuple[Part, ...]:
    zeros = Part(name="zeros", holds=Holds.ZEROS, dtype="I16", stream="out group -> out group")
    g_idx = Part(name="g_idx", holds=Holds.G_IDX, dtype="I32", stream="inp -> inp")
    return _scales(scheme), zeros, *((g_idx,) if scheme.has_g_idx else ())


def _offset(scheme: Scheme) -> tuple[Part, ...]:
    stream = "out group -> out group"
    return _scales(scheme), Part(name="offsets", holds=Holds.OFFSETS, dtype="F16", stream=stream)


def _rows(scheme: Scheme) -> tuple[Part, ...]:
    stream = "out group -> (out group)"
    return (Part(name="absmax", holds=Holds.SCALES, dtype="F32", stream=stream),)


def _codebook(scheme: Scheme) -> tuple[Part, ...]:
    assert scheme.codebook is not None
    return (
        Part(
            name="absmax",
            holds=Holds.ABSMAX,
            dtype="F32",
            stream="block -> block",
            block=scheme.group_size,
        ),
        Part(
            name="table",
            holds=Holds.CONSTANT,
            dtype="F32",
            constant=scheme.codebook.table,
            constant_shape=(len(scheme.codebook.table) // 4,),
        ),
    )


def _scales(scheme: Scheme) -> Part:
    return Part(
        name="scales",
        holds=Holds.SCALES,
        dtype=scheme.scale_dtype,
        stream="out group -> out group",
    )


_GRIDS = {
    Kind.AFFINE: _affine,
    Kind.OFFSET: _offset,
    Kind.ROWS: _rows,
    Kind.CODEBOOK: _codebook,
}


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
    stated: dict[str, Stated] = {}
    grids: dict[str, str] = {}
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
        grid = own.get(str, "grid", default=Kind.AFFINE.value)
        if grid not in [kind.value for kind in Kind]:
            own.problem("grid", f"{grid!r}", f"one of {', '.join(kind.value for kind in Kind)}")
        if grid == Kind.CODEBOOK.value and not own.get(str, "codebook"):
            own.problem("codebook", "no such key", "the name of a table")
        keys.problems += own.problems
        grids[module] = grid
        stated[module] = Stated(bits, group_size, in_features=in_features)
    raise_all(keys.problems)
    base = next(iter(stated.values()), Stated(4, None))
    return Claim(
        format="canonical",
        base=base,
        overrides=stated.get,
        producer="qplug",
        block=keys.block,
        details=grids,
    )


def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
    """Read the schemes; config and headers must say the same."""
    claim = parse(block)
    problems: list[QplugError] = []
    said, stored = claim.details, modules_with(headers, "codes")
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
    affine = [m for m in stored if said.get(m) == Kind.AFFINE.value]
    found = read_linears(claim, affine, layout, headers, peek, problems)
    for module in stored:
        if module in said and module not in affine:
            try:
                found[module] = _other(module, claim, headers, peek)
            except QplugError as error:
                problems += [error, *error.others]
    raise_all(problems)
    linears = {module: found[module] for module in stored if module in found}
    if not linears:
        raise QplugError(
            "no `*.codes` tensor", "the checkpoint's headers", "quantized linears", INCOMPLETE
        )
    return ModelScheme("canonical", linears, dense_modules(headers), "qplug", (), claim.block)


def _other(module: str, claim: Claim, headers: Headers, peek: Peek) -> Scheme:
    """Read a linear on a grid that is not affine."""
    stated, kind = claim.of(module), Kind(claim.details[module])
    assert stated.in_features is not None
    assert stated.group_size is not None
    codes = headers[f"{module}.codes"]
    out = codes.shape[0] if codes.shape else 0
    scales = headers.get(f"{module}.scales")
    book = None
    if kind is Kind.CODEBOOK:
        book = Codebook(claim.block["modules"][module]["codebook"], _table(module, headers, peek))
    scheme = Scheme(
        max(1, out),
        stated.in_features,
        stated.bits,
        stated.group_size,
        scale_dtype=scales.dtype if scales is not None else "F32",
        kind=kind,
        codebook=book,
    )
    if kind is Kind.CODEBOOK and len(book.table if book else b"") != 4 << stated.bits:
        raise QplugError(
            str(headers[f"{module}.table"]),
            f"{module}.table",
            f"F32[{1 << stated.bits}]",
            INCOMPLETE,
        )
    parts = layout(scheme)
    stored = parts_of(headers, module, [part.name for part in parts])
    raise_all(parts.check(module, scheme.sizes, stored, INCOMPLETE))
    if kind is Kind.OFFSET and scheme.in_features % scheme.group_size:
        raise QplugError(
            f"groups of {scheme.group_size} for {scheme.in_features} inputs",
            f"quantization_config.modules.{module}.group_size",
            "a divisor of in_features",
            "correct the config",
        )
    return scheme


def _table(module: str, headers: Headers, peek: Peek) -> bytes:
    """Read a table of finite float32."""
    name = f"{module}.table"
    spec = headers.get(name)
    if spec is None or spec.dtype != "F32" or len(spec.shape) != 1:
        found = "no such tensor" if spec is None else str(spec)
        raise QplugError(found, name, "F32[2^bits]", INCOMPLETE)
    values = peek(name)
    if not bool(np.isfinite(values).all()):
        raise QplugError("values that are NaN or infinite", name, "finite numbers", INCOMPLETE)
    return values.tobytes()


def adopt(scheme: Scheme) -> Scheme:
    """Restate a scheme as the canonical form holds it: g_idx only where it says something."""
    plain = replace(
        scheme,
        has_g_idx=scheme.act_order,
        zero_rule="as_is",
        desc_act=False,
        per_word=0,
        shared=False,
        lacks=(),
    )
    if scheme.codebook is None:
        return plain
    book = Codebook(scheme.codebook.name, scheme.codebook.table, scheme.codebook.dtype)
    return replace(plain, codebook=book, scale_dtype="F32")


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
    for name, scheme in model.linears.items():
        if scheme.kind is not Kind.AFFINE:
            modules[name]["grid"] = scheme.kind.value
        if scheme.codebook is not None:
            modules[name]["codebook"] = scheme.codebook.name
    return Written({"quant_method": "qplug", "version": VERSION, "modules": modules})


FORMAT = Format(
    name="canonical",
    aliases=("qplug",),
    title="qplug's own form: any bits, grid, zeros, groups and act order",
    capacity=Capacity(
        bits=tuple(range(1, 9)),
        zeros=lambda bits: (0, 1 << bits),
        act_order=True,
        ragged=True,
        scale_dtypes=FLOATS,
        in_multiple=lambda bits: 1,
        out_multiple=lambda bits: 1,
        also=(Kind.OFFSET, Kind.ROWS, Kind.CODEBOOK),
    ),
    claims=claims,
    layout=layout,
    parse=parse,
    read=read,
    adopt=adopt,
    write=write,
    shard_stem="qplug",
)
