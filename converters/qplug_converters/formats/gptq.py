r"""GPTQ as AutoGPTQ 0.7.1 and GPTQModel 7.7.0 write it (`checkpoint_format: gptq`, v1).

Tensors of a linear, `b` bits, `n_g = ceil(in / group_size)` groups:

| name      | dtype         | shape            | packed along                     |
|-----------|---------------|------------------|----------------------------------|
| `qweight` | int32         | [in * b/32, out] | in: a column is one bit stream   |
| `qzeros`  | int32         | [n_g, out * b/32]| out                              |
| `scales`  | float16       | [n_g, out]       | -                                |
| `g_idx`   | int32         | [in]             | -; absent in some exports        |

w[n, k] = scales[g(k), n] * (code - zero), g(k) = g_idx[k], or k // group_size without `g_idx`.
in and out are multiples of 32 / gcd(b, 32).

Traps. Stored zeros are z - 1, under one of several rules (`zeros.RULES`): the producer in `meta`
decides, `--zero-rule` overrides. `desc_act` is a claim; act order is what `g_idx` says. Negative
scales are normal. `group_size: -1` is one group. `dynamic` maps regexes to overrides; the first
that `re.match`es a module path wins and `-:` leaves a module in full precision.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from ..block import (
    INCOMPLETE,
    Keys,
    dense_linears,
    dense_modules,
    modules_with,
    some,
    stated_group_size,
    stored_as,
)
from ..claim import Claim, Stated
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import Holds, Layout, Packing, Part
from ..patterns import LISTS, first_rule, listed
from ..scheme import ModelScheme, Scheme
from ..stored import read_linears
from ..version import __version__

BITS = (2, 3, 4, 8)
FOLLOWED = "gptqmodel:7.7.0"
"""The release whose conventions are followed. It stands beside qplug in `meta.quantizer`, for that
tool reads asymmetric v1 files only where it is named there."""
_GPTQ_KEYS = ("desc_act", "damp_percent", "checkpoint_format", "static_groups", "is_marlin_format")
"""Keys that GPTQ tools alone write."""
UNSUPPORTED = {
    "marlin": "Marlin tiles",
    "bitblas": "BitBLAS tiles",
}
"""Values of `checkpoint_format` that are known and have no layout here."""


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear; `g_idx` only where the scheme stores one."""
    packing = Packing(scheme.bits)
    parts = [
        Part(
            name="qweight",
            holds=Holds.CODES,
            dtype="I32",
            stream="out inp -> out inp",
            packing=packing,
            stored="out w -> w out",
        ),
        Part(
            name="qzeros",
            holds=Holds.ZEROS,
            dtype="I32",
            stream="out group -> group out",
            packing=packing,
            rule=scheme.zero_rule,
        ),
        Part(
            name="scales",
            holds=Holds.SCALES,
            dtype=scheme.scale_dtype,
            stream="out group -> group out",
        ),
    ]
    if scheme.has_g_idx:
        parts.append(Part(name="g_idx", holds=Holds.G_IDX, dtype="I32", stream="inp -> inp"))
    return Layout(tuple(parts))


def multiple(bits: int) -> int:
    """Return what in_features and out_features must be multiples of: whole words."""
    return 32 // gcd(bits, 32)


def checkpoint_format(block: Block | None) -> str | None:
    """Return the value of `checkpoint_format` (or `format`), lower case; None if not GPTQ."""
    block = block or {}
    method = block.get("quant_method") or block.get("method")
    if method and (not isinstance(method, str) or method.lower() != "gptq"):
        return None
    value = block.get("checkpoint_format") or block.get("format")
    if block.get("is_marlin_format") is True:
        value = "marlin"
    if not isinstance(value, str):
        return "gptq"
    return value.lower()


def claims_kind(block: Block | None, headers: Headers) -> str | None:
    """Return the `checkpoint_format` of a GPTQ checkpoint, or `None` if it is none."""
    block = block or {}
    if not (block.get("quant_method") or block.get("method")):
        shapes = stored_as(headers)
        ours = any(block.get(key) is not None for key in _GPTQ_KEYS)
        foreign = block.get("packing_format") is not None
        # Keys alone are judged only where there are no tensors to look at.
        if foreign or (shapes[:1] != ("gptq",) if headers else not ours):
            return None
    return checkpoint_format(block)


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether this is a v1 checkpoint (or one of an unknown `checkpoint_format`)."""
    return claims_kind(block, headers) not in (None, "gptq_v2", "gptq_p")


def producer(block: Block) -> str:
    """Return the tool that wrote the file, e.g. `gptqmodel:5.8.0`, or an empty string."""
    meta = block.get("meta")
    value = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None and isinstance(block.get("provider"), str):
        value = block["provider"]
    return value if isinstance(value, str) else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d{1,9}", text.partition(":")[2])[:3])


def zero_rule(made_by: str, bits: int, base_bits: int, dynamic: bool) -> str:
    """Return the v1 zero rule of a producer (module docstring of `zeros`)."""
    tool, _, release = made_by.lower().partition(":")
    if tool != "gptqmodel":
        return "plain"
    version = _version(made_by) if release else (99,)
    if bits == 3 and version < (6, 1):
        return "legacy3"
    if 32 % bits:
        return "field"
    if dynamic and bits != base_bits and 32 % base_bits == 0 and version < (7, 3, 2):
        return f"word:{base_bits}"
    return "word"


def allowed_bits(made_by: str) -> tuple[int, ...]:
    """Return the widths that are read: of 5, 6 and 7 bits only AutoRound's are a bit stream."""
    return (2, 3, 4, 5, 6, 7, 8) if "auto-round" in made_by.lower() else BITS


def check_bits(keys: Keys, bits: int | None, allowed: tuple[int, ...]) -> None:
    """Refuse widths that are not read, planar ones by name."""
    if bits is None:
        if not keys.problems:
            keys.problem("bits", "no such key", f"one of {allowed}")
    elif bits not in allowed:
        planar = " (planar, as GPTQModel stores it)" if bits in (5, 6, 7) else ""
        keys.problem("bits", f"{bits}{planar}", f"one of {allowed}")


def parse_as(name: str, kind: str) -> Callable[[Block | None], Claim]:
    """Return the `parse` of the format `name`, whose `checkpoint_format` is `kind`."""

    def parse(block: Block | None) -> Claim:
        keys = Keys(block)
        block = keys.block
        found = checkpoint_format(block)
        if found != kind:
            if found is None:
                raise QplugError(
                    f"{block.get('quant_method') or block.get('method')!r}",
                    "quantization_config.quant_method",
                    "gptq",
                    "correct the config",
                )
            what = UNSUPPORTED.get(found or "", "an unknown packing")
            raise QplugError(
                f"{found!r} ({what})",
                "quantization_config.checkpoint_format",
                "gptq, gptq_v2 or gptq_p",
                "save it again with checkpoint_format gptq_v2 in the tool that wrote it",
            )
        made_by = producer(block)
        allowed = allowed_bits(made_by) if kind == "gptq" else BITS
        bits = keys.get(int, "bits", "w_bit", "wbits", "weight_bits")
        group_size = keys.get(int, "group_size", "q_group_size", "groupsize")
        sym = keys.get(bool, "sym")
        desc_act = keys.get(bool, "desc_act", "actorder", default=False)
        word = keys.get(str, "pack_dtype", default="int32")
        dynamic = keys.get(dict, "dynamic", default={})
        check_bits(keys, bits, allowed)
        if group_size is not None and (group_size == 0 or group_size < -1):
            keys.problem("group_size", f"{group_size}", "-1 or a positive number")
        if word != "int32":
            keys.problem("pack_dtype", f"{word!r}", "'int32'")
        keys.get(str, "checkpoint_format", "format")
        lm_head = keys.get(bool, "lm_head")
        by_list = listed(keys)
        first_of = first_rule(keys, dynamic)
        raise_all(keys.problems)
        base = Stated(bits, group_size, sym, desc_act)

        def overrides(module: str) -> Stated | None:
            found = first_of(module)
            if found is None or not found[1]:
                return None
            mine = Keys(found[1], f"quantization_config.dynamic for {module}")
            own = Stated(
                mine.get(int, "bits", default=bits),
                mine.get(int, "group_size", default=group_size),
                mine.get(bool, "sym", default=sym),
                mine.get(bool, "desc_act", default=desc_act),
            )
            check_bits(mine, own.bits, allowed)
            raise_all(mine.problems)
            return own

        def skip(module: str) -> str | None:
            found = first_of(module)
            if found is not None:
                return found[0] if found[1] is None else None
            return by_list(module)

        return Claim(
            format=name,
            base=base,
            overrides=overrides,
            skip=skip,
            lm_head=lm_head,
            producer=made_by,
            block=block,
            details={"dynamic": bool(dynamic)},
        )

    return parse


Rules = Callable[[str, int, int, bool], str]
"""`(producer, bits, base bits, has dynamic) -> zero rule`."""


def read_as(
    parse: Callable[[Block | None], Claim],
    rules: Rules,
    layout: Callable[[Scheme], Layout] = layout,
) -> Any:
    """Return the `read` of a format; `rules` chooses the zero rule."""

    def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
        claim = parse(block)
        shapes = stored_as(headers)
        if shapes and "gptq" not in shapes:
            raise QplugError(
                f"'gptq' over tensors stored as {shapes[0]!r}",
                "quantization_config.quant_method",
                "tensors of GPTQ",
                "correct the config: 'awq' is the method of the others",
            )
        return read_with(claim, layout, rules, headers, peek)

    return read


def read_with(
    claim: Claim,
    layout: Callable[[Scheme], Layout],
    rules: Rules,
    headers: Headers,
    peek: Peek,
) -> ModelScheme:
    """Read the linears of a checkpoint with GPTQ's tensors, each in `layout`."""
    modules = modules_with(headers, "qweight", "qzeros")
    if not modules:
        raise QplugError(
            "no `*.qweight` tensor", "the checkpoint's headers", "quantized linears", INCOMPLETE
        )
    problems: list[QplugError] = []
    unlisted: dict[str, str] = {}
    kept = []
    for module in modules:
        entry = claim.skip(module)
        if entry in LISTS:
            unlisted.setdefault(entry, module)
        elif entry is not None:
            problems.append(
                QplugError(
                    "a quantized linear",
                    f"{module}.qweight",
                    f"full precision (the config says {entry!r})",
                    "remove the rule from the config",
                )
            )
            continue
        kept.append(module)
    linears = read_linears(claim, kept, layout, headers, peek, problems)
    dynamic = bool(claim.details.get("dynamic"))
    for module, scheme in linears.items():
        rule = rules(claim.producer, scheme.bits, claim.base.bits, dynamic)
        linears[module] = replace(scheme, zero_rule=rule)
    some_have = any(scheme.has_g_idx for scheme in linears.values())
    for module, scheme in linears.items():
        if not scheme.has_g_idx and (some_have or (scheme.desc_act and scheme.groups > 1)):
            problems.append(
                QplugError(
                    "no such tensor",
                    f"{module}.g_idx",
                    f"I32[{scheme.in_features}], as other linears or desc_act promise",
                    INCOMPLETE,
                )
            )
    raise_all(problems)
    notes = (
        _notes(claim, linears)
        + two_methods(claim.block)
        + tuple(
            f"{key} leaves {module} in full precision, which is quantized"
            for key, module in unlisted.items()
        )
    )
    return ModelScheme(
        claim.format, linears, dense_modules(headers), claim.producer, notes, claim.block
    )


def two_methods(block: Block) -> tuple[str, ...]:
    """Say that a config has the packing of AutoRound and the method of another tool."""
    packing, method = block.get("packing_format"), block.get("quant_method") or block.get("method")
    if packing is None or str(method).lower() not in ("gptq", "awq"):
        return ()
    return (f"quant_method is {method!r} beside AutoRound's packing_format {packing!r}",)


def _notes(claim: Claim, linears: Mapping[str, Scheme]) -> tuple[str, ...]:
    """Say where flags and tensors differ."""
    flag_without = [m for m, s in linears.items() if s.desc_act and not s.act_order]
    order_without = [m for m, s in linears.items() if s.act_order and not s.desc_act]
    notes = []
    if flag_without:
        notes.append(
            f"desc_act is true but g_idx is in order in {some(flag_without)}: "
            "no act order, and engines that go by the flag refuse the file for nothing"
        )
    if order_without:
        notes.append(
            f"desc_act is false but g_idx is not in order in {some(order_without)}: "
            "engines that go by the flag read wrong weights"
        )
    head = any(module.rpartition(".")[2] == "lm_head" for module in linears)
    if claim.lm_head is not None and claim.lm_head is not head:
        notes.append(f"lm_head is {str(not head).lower()} in the config, and the tensors differ")
    return tuple(notes)


def adopt(scheme: Scheme, rule: str = "plain") -> Scheme:
    """Restate a scheme as GPTQ writes it: a g_idx always, zeros by the rule all readers share."""
    return replace(scheme, has_g_idx=True, zero_rule=rule, desc_act=scheme.act_order)


def write_as(kind: str) -> Callable[[ModelScheme], Written]:
    """Return the `write` of the v1 or v2 format: config block and quantize_config.json."""

    def write(model: ModelScheme) -> Written:
        group_of = stated_group_size(model.linears.values(), ragged=True)
        stated = {
            module: (scheme.bits, group_of(scheme), scheme.act_order, scheme.symmetric)
            for module, scheme in model.linears.items()
        }
        base = Counter(stated.values()).most_common(1)[0][0]
        keys = ("bits", "group_size", "desc_act", "sym")
        dynamic: dict[str, dict[str, object]] = {}
        for module in dense_linears(model.dense):
            if module.rpartition(".")[2] != "lm_head":
                dynamic[f"-:^{re.escape(module)}$"] = {}
        for module, values in stated.items():
            if values != base:
                dynamic[f"+:^{re.escape(module)}$"] = dict(zip(keys, values, strict=True))
        block: dict[str, object] = {
            **dict(zip(keys, base, strict=True)),
            "lm_head": any(name.endswith("lm_head") for name in model.linears),
            "quant_method": "gptq",
            "checkpoint_format": kind,
            "format": kind,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"qplug:{__version__}", FOLLOWED], "static_groups": False},
        }
        if dynamic:
            block["dynamic"] = dynamic
        return Written(block, {"quantize_config.json": block})

    return write


def current(scheme: Scheme) -> bool:
    """Whether today's readers take the zeros as they are stored: not those of old releases."""
    return scheme.zero_rule in ("plain", "field", "word")


_parse = parse_as("gptq", "gptq")

FORMAT = Format(
    name="gptq",
    aliases=("gptq_v1",),
    title="GPTQ v1 (AutoGPTQ, GPTQModel): zeros stored minus one",
    capacity=Capacity(
        bits=BITS,
        zeros=lambda bits: (1, (1 << bits) - 1),
        act_order=True,
        ragged=True,
        scale_dtypes=("F16",),
        in_multiple=multiple,
        out_multiple=multiple,
    ),
    claims=claims,
    layout=layout,
    parse=_parse,
    read=read_as(_parse, zero_rule),
    adopt=adopt,
    write=write_as("gptq"),
    current=current,
    zero_rules=("plain", "legacy3", "word:2", "word:4", "word:8", "word", "field"),
    foreign_rules=(("as_is", "v2"),),
)
