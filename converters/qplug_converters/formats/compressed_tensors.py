"""compressed-tensors `pack-quantized` as llmcompressor 0.14.0.1 writes it (release 0.20.0).

Tensors of a linear, `b` bits (1 to 8), `n_g = in / group_size` groups:

| name                | dtype           | shape                  | packed along                  |
|---------------------|-----------------|------------------------|-------------------------------|
| `weight_packed`     | int32           | [out, ceil(in * b/32)] | in: a row is one bit stream   |
| `weight_scale`      | the model's     | [out, n_g]             | -                             |
| `weight_zero_point` | int32           | [ceil(out * b/32), n_g]| out; asymmetric files only    |
| `weight_shape`      | int64 or int32  | [2] = out, in          | -                             |
| `weight_g_idx`      | int32           | [in]                   | -; `actorder: group`, <= 0.18 |

w[n, k] = weight_scale[n, g(k)] * (code - zero); a stored field is the signed number of the tool
plus 2^(b-1), and a symmetric file, which has no zero points, means the midpoint.

Config: `config_groups` give `targets` (a module path, `re:` and a regular expression that must
match from the beginning, or a class such as `Linear`) their `weights`; a path counts before an
expression before a class, alphabetically within a kind, and `ignore` before all. `strategy` is
`group`, `channel` (one group) or `tensor` (one scale [1], and one int8 zero point as it is).

Traps. Until release 0.17 codes of 3, 5, 6 and 7 bits did not cross words: floor(32 / b) a word,
zero points too; shapes tell, and `version` where they cannot. -1 in `weight_g_idx` means that it
was never set. Releases from 0.19 refuse `actorder: group`, so it is read and never written. The
block was named `compression_config` once. Scales are bfloat16 in bfloat16 models.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..block import INCOMPLETE, dense_linears, dense_modules, modules_with, some, stated_group_size
from ..claim import Claim
from ..config_groups import BITS, LEAVE, parse
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import FLOATS, Holds, Layout, Packing, Part, TensorSpec
from ..scheme import ModelScheme, Scheme
from ..stacked import HALVES
from ..stored import read_linear

VERSION = "0.20.0"
"""The release of compressed-tensors whose packing and config are written."""
DENSE_SINCE = (0, 18)
"""The release from which codes of 3, 5, 6 and 7 bits cross words."""


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear; zero points unless the scheme claims symmetry."""
    packing = Packing(scheme.bits, per_word=scheme.per_word)
    parts = [
        Part(
            name="weight_packed",
            holds=Holds.CODES,
            dtype="I32",
            stream="out inp -> out inp",
            packing=packing,
        ),
        Part(
            name="weight_scale",
            holds=Holds.SCALES,
            dtype=scheme.scale_dtype,
            stream="out group -> out group",
            shared=scheme.shared,
        ),
        Part(
            name="weight_shape",
            holds=Holds.CONSTANT,
            dtype="I64",
            constant=struct.pack("<2q", scheme.out_features, scheme.in_features),
            constant_shape=(2,),
        ),
    ]
    if not scheme.sym:
        parts.append(_zeros(scheme, packing))
    if scheme.has_g_idx:
        parts.append(Part(name="weight_g_idx", holds=Holds.G_IDX, dtype="I32", stream="inp -> inp"))
    return Layout(tuple(parts))


def _zeros(scheme: Scheme, packing: Packing) -> Part:
    """Return the part of the zero points; a shared one is not packed."""
    name, holds = "weight_zero_point", Holds.ZEROS
    if scheme.shared:
        signed = -(1 << (scheme.bits - 1))
        stream = "out group -> out group"
        return Part(name=name, holds=holds, dtype="I8", stream=stream, shift=signed, shared=True)
    return Part(
        name=name,
        holds=holds,
        dtype="I32",
        stream="out group -> group out",
        packing=packing,
        stored="group w -> w group",
    )


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether the config says so, or says nothing and the tensors do."""
    method = (block or {}).get("quant_method") or (block or {}).get("method")
    if isinstance(method, str):
        return method.lower() == "compressed-tensors"
    return bool(modules_with(headers, "weight_packed"))


def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
    """Read the schemes of a checkpoint; headers decide, the config must agree."""
    claim = parse(block)
    modules = modules_with(headers, "weight_packed")
    if not modules:
        raise QplugError(
            "no `*.weight_packed` tensor",
            "the checkpoint's headers",
            "quantized linears",
            INCOMPLETE,
        )
    problems: list[QplugError] = []
    linears: dict[str, Scheme] = {}
    for module in modules:
        try:
            linears[module] = _read_one(claim, module, headers, peek)
        except QplugError as error:
            problems += [error, *error.others]
    raise_all(problems)
    return ModelScheme(
        claim.format,
        linears,
        dense_modules(headers),
        claim.producer,
        _notes(linears),
        claim.block,
        kv_scheme=claim.details["kv_scheme"],
    )


def _read_one(claim: Claim, module: str, headers: Headers, peek: Peek) -> Scheme:
    """Return the scheme of one linear."""
    packed = headers[f"{module}.weight_packed"]
    if len(packed.shape) == 3:
        raise QplugError(
            f"{packed}, experts in one tensor",
            f"{module}.weight_packed",
            "one linear each, or [experts, out, words] with gate and up in halves",
            LEAVE,
        )
    stated = claim.overrides(module)
    if (entry := claim.skip(module)) is not None:
        raise QplugError(
            "a quantized linear",
            f"{module}.weight_packed",
            f"full precision (`ignore` has {entry!r})",
            "remove the entry from `ignore`",
        )
    if stated is None:
        raise QplugError(
            "a quantized linear",
            f"{module}.weight_packed",
            "one that a target in config_groups matches",
            "add it to the targets",
        )
    if stated.sym and f"{module}.weight_zero_point" in headers:
        raise QplugError(
            "zero points",
            f"{module}.weight_zero_point",
            "none: the config says symmetric",
            "correct `symmetric` in the config",
        )
    shape = _shape(module, headers, peek)
    per_word = _per_word(claim, module, stated.bits, shape[1], headers)
    shared = stated.group_size is None
    unset = _unset(module, shape[1], headers, peek)

    def stored(scheme: Scheme) -> Layout:
        """Return the layout of this linear, with what its scheme does not say yet."""
        own = replace(scheme, sym=stated.sym, per_word=per_word, shared=shared)
        parts = layout(replace(own, has_g_idx=scheme.has_g_idx and not unset))
        dtype = headers[f"{module}.weight_shape"].dtype
        return Layout(tuple(_retyped(p, dtype) if p.name == "weight_shape" else p for p in parts))

    found = read_linear(module, replace(stated, in_features=shape[1]), stored, headers, peek)
    halved = module.rpartition(".")[2] in HALVES and shape[0] == 2 * found.out_features
    if found.out_features != shape[0] and not halved:
        raise QplugError(
            f"{list(shape)}", f"{module}.weight_shape", f"{found.out_features} outputs", INCOMPLETE
        )
    if found.desc_act and not found.has_g_idx and not unset and found.groups > 1:
        raise QplugError(
            "no such tensor",
            f"{module}.weight_g_idx",
            f"I32[{found.in_features}], as actorder promises",
            INCOMPLETE,
        )
    return replace(found, per_word=per_word, shared=shared, has_g_idx=found.has_g_idx or unset)


def _retyped(part: Part, dtype: str) -> Part:
    """Return `weight_shape` in the dtype of the file."""
    if dtype != "I32":
        return part
    shape = np.frombuffer(part.constant, np.int64).astype(np.int32)
    return replace(part, dtype=dtype, constant=shape.tobytes())


def _shape(module: str, headers: Headers, peek: Peek) -> tuple[int, int]:
    """Return [out, in] as the file says: the words of a row may end in padding."""
    name = f"{module}.weight_shape"
    if headers.get(name) not in (TensorSpec("I64", (2,)), TensorSpec("I32", (2,))):
        found = str(headers[name]) if name in headers else "no such tensor"
        raise QplugError(found, name, "I64[2] = out, in", INCOMPLETE)
    out, inp = (int(size) for size in peek(name))
    if not (0 < out < 1 << 31 and 0 < inp < 1 << 31):
        raise QplugError(f"[{out}, {inp}]", name, "positive sizes", INCOMPLETE)
    return out, inp


def _per_word(claim: Claim, module: str, bits: int, inp: int, headers: Headers) -> int:
    """Return codes per word of the old packing where the file has that, else 0."""
    each = 32 // bits
    if 32 % bits == 0:
        return 0
    old, dense = (Packing(bits, per_word=n).words(inp) for n in (each, 0))
    words = headers[f"{module}.weight_packed"].shape[-1:]
    if old == dense:
        release = tuple(map(int, re.findall(r"\d{1,9}", claim.producer)[:2]))
        return each if () < release < DENSE_SINCE else 0
    return each if words == (old,) else 0


def _unset(module: str, inp: int, headers: Headers, peek: Peek) -> bool:
    """Whether there is a `weight_g_idx` that was never set: one of its numbers is -1."""
    name = f"{module}.weight_g_idx"
    return headers.get(name) == TensorSpec("I32", (inp,)) and bool((peek(name) == -1).any())


def _notes(linears: Mapping[str, Scheme]) -> tuple[str, ...]:
    """Say where flags and tensors differ."""
    flag_without = [m for m, s in linears.items() if s.desc_act and not s.act_order]
    order_without = [m for m, s in linears.items() if s.act_order and not s.desc_act]
    notes = []
    if flag_without:
        notes.append(
            f"actorder is group but weight_g_idx is in order in {some(flag_without)}: "
            "no act order, and readers that go by the flag refuse the file for nothing"
        )
    if order_without:
        notes.append(
            f"actorder is not group but weight_g_idx is not in order in {some(order_without)}: "
            "readers that go by the flag read wrong weights"
        )
    return tuple(notes)


def adopt(scheme: Scheme) -> Scheme:
    """Restate a scheme as it is written: dense words, no g_idx, zero points where they differ."""
    return replace(
        scheme,
        sym=scheme.symmetric,
        desc_act=False,
        has_g_idx=False,
        zero_rule="as_is",
        per_word=0,
        shared=False,
    )


def current(scheme: Scheme) -> bool:
    """Whether the release that is written can read a linear as it is stored."""
    return not scheme.per_word and not scheme.has_g_idx


def write(model: ModelScheme) -> Written:
    """Return the config block: one group of the class `Linear`, or several that name modules."""
    group_of = stated_group_size(model.linears.values(), ragged=False)
    members: dict[tuple[int, int, bool], list[str]] = {}
    for module, scheme in model.linears.items():
        key = (scheme.bits, group_of(scheme), bool(scheme.sym))
        members.setdefault(key, []).append(module)
    groups = {}
    for number, ((bits, size, sym), modules) in enumerate(members.items()):
        groups[f"group_{number}"] = {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"] if len(members) == 1 else modules,
            "weights": {
                "dynamic": False,
                "group_size": None if size == -1 else size,
                "num_bits": bits,
                "strategy": "channel" if size == -1 else "group",
                "symmetric": sym,
                "type": "int",
            },
        }
    ignore = list(dense_linears(model.dense))
    if not any(name.endswith("lm_head") for name in (*model.linears, *ignore)):
        ignore.append("lm_head")
    return Written(
        {
            "config_groups": groups,
            "format": "pack-quantized",
            "global_compression_ratio": None,
            "ignore": ignore,
            "kv_cache_scheme": dict(model.kv_scheme) or None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }
    )


FORMAT = Format(
    name="compressed-tensors",
    aliases=("compressed_tensors", "ct"),
    title="compressed-tensors pack-quantized (llmcompressor)",
    capacity=Capacity(
        bits=BITS,
        zeros=lambda bits: (0, (1 << bits) - 1),
        act_order=False,
        ragged=False,
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
    current=current,
    says_kv=True,
    decisive=("quant_method", "kv_cache_scheme"),
)
