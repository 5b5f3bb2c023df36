"""AutoRound as auto-round 0.16.1 writes it (`quant_method: auto-round`): three packings.

| `packing_format`                      | tensors of                 | format            |
|---------------------------------------|----------------------------|-------------------|
| `auto_round:auto_gptq`                | `gptq`, no `g_idx`         | `autoround_gptq`  |
| `auto_round`, `auto_round:gptqmodel`  | `gptq_v2`; the second with | `autoround`       |
|                                       | an orderly `g_idx`         |                   |
| `auto_round:auto_awq`                 | `awq`                      | `autoround_awq`   |

What the tool's own importer goes by: "awq" in the name means AWQ, "gptq" without "gptqmodel" zeros
minus one, anything else zeros as they are. No name means `auto_round:auto_gptq`. Releases up to 0.4
put the name under `backend`, and called the method `intel/auto-round`; vLLM calls it `inc`.

Config: `extra_config` maps module paths, ends of paths and regular expressions (searched for, the
first counts) to their own `bits`, `group_size`, `sym`; 16 bits and more are full precision.
`block_name_to_quantize` is a list of prefixes, or a text with commas between them: linears
elsewhere, the head too, are quantized only if `extra_config` names them.

Traps. Scales may be negative (full-range symmetric grids). 5, 6 and 7 bits are the plain bit
stream, where GPTQModel's are planar. Files come without safetensors metadata. A stored zero of the
first packing was clamped at 0, so that a true 0 is lost in the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..block import Keys, dense_linears, stated_group_size, stored_as
from ..claim import Claim, Stated
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import Layout
from ..patterns import flat, listed, matcher
from ..scheme import ModelScheme, Scheme
from . import awq, gptq

BITS = (2, 3, 4, 5, 6, 7, 8)
METHODS = ("auto-round", "intel/auto-round", "inc")
"""Values of `quant_method`; the first is written."""
DEFAULT = "auto_round:auto_gptq"
OTHERS = ("llm_compressor", "fp8", "nvfp", "nv_fp", "mxfp", "mx_fp", "mxint", "marlin", "bitblas",
          "gguf", "mlx", "fake", "svdquant")  # fmt: skip
"""Parts of names of packings that are known and have no layout here."""
DENSE_FROM = 16
"""From this many bits on a module is in full precision."""
_SPECIAL = frozenset(r"*+?^$()[]{}|\\")
"""A key of `extra_config` with one of these is a regular expression (vLLM 0.32)."""
_MEANING = ("rotation_config", "super_bits", "super_group_size")
"""Keys that change what the weights mean; absent or null in files that are read."""


def packing_of(block: Block) -> str | None:
    """Return the name of the packing, lower case, or `None` if this is not AutoRound."""
    method = block.get("quant_method") or block.get("method")
    said = block.get("packing_format")
    if method is None and said is None:
        return None
    if method is not None and not (isinstance(method, str) and method.lower() in METHODS):
        return None
    if said is None:
        backend = block.get("backend")
        old = isinstance(backend, str) and backend.lower().startswith("auto_round")
        said = backend if old else DEFAULT
    return str(said).lower()


def format_of(packing: str) -> str | None:
    """Return the name of the format that stores a packing, or `None` if none does."""
    if any(part in packing for part in OTHERS):
        return None
    if "awq" in packing:
        return "autoround_awq"
    if "gptq" in packing and "gptqmodel" not in packing:
        return "autoround_gptq"
    return "autoround" if packing.startswith("auto_round") else None


def claims_as(name: str) -> Callable[[Block | None, Headers], bool]:
    """Return the `claims` of one format; what none claims is refused by `autoround_gptq`."""

    def claims(block: Block | None, headers: Headers) -> bool:
        packing = packing_of(block or {})
        return packing is not None and (format_of(packing) or "autoround_gptq") == name

    return claims


def _own(
    keys: Keys, values: object, base: Stated, bits: tuple[int, ...], key: str
) -> Stated | None:
    """Read one entry of `extra_config`; `None` for full precision."""
    if not isinstance(values, Mapping):
        keys.problem("extra_config", f"{values!r} for {key!r}", "an object of overrides")
        return None
    mine = Keys(values, f"{keys.where}.extra_config for {key}")
    own = Stated(
        mine.get(int, "bits", "weight_bits", default=base.bits),
        mine.get(int, "group_size", default=base.group_size),
        mine.get(bool, "sym", default=base.sym),
    )
    if not mine.problems and own.bits >= DENSE_FROM:
        return None
    _check(mine, own.bits, own.group_size, bits)
    keys.problems += mine.problems
    return own


def _check(keys: Keys, bits: int | None, group_size: int | None, allowed: tuple[int, ...]) -> None:
    """Refuse what is no weight-only quantization to integers."""
    if bits not in allowed and not keys.problems:
        keys.problem("bits", "no such key" if bits is None else f"{bits}", f"one of {allowed}")
    if group_size is not None and (group_size == 0 or group_size < -1):
        keys.problem("group_size", f"{group_size}", "-1 or a positive number")
    kind = keys.get(str, "data_type", default="int")
    if kind.lower() != "int":
        keys.problem("data_type", f"{kind!r}", "'int'", "serve it with an engine that reads it")
    act_bits = keys.get(int, "act_bits", default=16)
    if act_bits < DENSE_FROM:
        keys.problem("act_bits", f"{act_bits}", "16: weights alone are quantized")
    for key in _MEANING:
        if keys.block.get(key):
            keys.problem(key, f"{keys.block[key]!r}", "no such key, or null")


def parse_as(name: str, allowed: tuple[int, ...]) -> Callable[[Block | None], Claim]:
    """Return the `parse` of one format."""

    def parse(block: Block | None) -> Claim:
        keys = Keys(block)
        packing = packing_of(keys.block)
        found = format_of(packing) if packing is not None else None
        if found != name:
            key = "packing_format" if keys.block.get("packing_format") else "backend"
            keys.problem(
                key if packing is not None else "quant_method",
                f"{packing!r}" if packing is not None else f"{keys.block.get('quant_method')!r}",
                "auto_round, auto_round:auto_gptq or auto_round:auto_awq",
                "export it again with one of them",
            )
        if keys.block.get("packing_format") is not None:
            keys.get(str, "packing_format")
        bits = keys.get(int, "bits", "w_bit", "wbits", "weight_bits")
        group_size = keys.get(int, "group_size", "q_group_size", "groupsize")
        sym = keys.get(bool, "sym")
        extra = keys.get(dict, "extra_config", default={})
        _check(keys, bits, group_size, allowed)
        base = Stated(bits or 4, group_size, sym, ragged=name != "autoround_awq")
        own = {key: _own(keys, values, base, allowed, key) for key, values in extra.items()}
        own = {
            key: replace(stated, ragged=base.ragged) if stated is not None else None
            for key, stated in own.items()
        }
        patterns: list[tuple[str, Callable[[str], bool]]] = []
        for key in own:
            if _SPECIAL & set(key):
                try:
                    where = f"{keys.where}.extra_config"
                    patterns.append((key, matcher(key, where, anywhere=True)))
                except QplugError as error:
                    keys.problems.append(error)
        blocks = _blocks(keys)
        by_list = listed(keys)
        raise_all(keys.problems)

        def named(module: str) -> str | None:
            """Return the key of `extra_config` that means a module."""
            if module in own:
                return module
            end = next((key for key in own if module.endswith(f".{key}")), None)
            return end or next((key for key, hit in patterns if hit(module)), None)

        def skip(module: str) -> str | None:
            if (key := named(module)) is not None:
                return None if own[key] is not None else key
            if blocks and not module.startswith(blocks):
                return "block_name_to_quantize"
            return by_list(module)

        def overrides(module: str) -> Stated | None:
            key = named(module)
            return own[key] if key is not None else None

        version = keys.block.get("autoround_version")
        head = next((key for key in own if key.rpartition(".")[2] == "lm_head"), None)
        return Claim(
            format=name,
            base=base,
            overrides=overrides,
            skip=skip,
            lm_head=own[head] is not None if head is not None else None,
            producer=f"auto-round:{version}" if isinstance(version, str) else "auto-round",
            block=keys.block,
        )

    return parse


def _blocks(keys: Keys) -> tuple[str, ...]:
    """Return the prefixes of quantized blocks, under the name of any release."""
    names = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
    found = next((name for name in names if keys.block.get(name) is not None), None)
    if found is None:
        return ()
    value = keys.block[found]
    if not isinstance(value, str | list):
        keys.problem(found, f"{value!r}", "a text or a list of prefixes")
    return tuple(flat(value))


def _read(
    parse: Callable[[Block | None], Claim], layout: Callable[[Scheme], Layout], rule: str, kind: str
) -> Callable[[Block | None, Headers, Peek], ModelScheme]:
    """Return the `read` of one format, whose tensors are of `kind` (`block.stored_as`)."""

    def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
        claim = parse(block)
        shapes = stored_as(headers)
        if shapes and kind not in shapes:
            raise QplugError(
                f"{packing_of(claim.block)!r} over tensors stored as {shapes[0]!r}",
                "quantization_config.packing_format",
                f"tensors of {kind}",
                "correct packing_format in the config",
            )
        return gptq.read_with(claim, layout, lambda *_: rule, headers, peek)

    return read


def _write(packing: str, *, ragged: bool) -> Callable[[ModelScheme], Written]:
    """Return the `write` of one format: the config block as auto-round 0.16.1 writes it."""

    def write(model: ModelScheme) -> Written:
        group_of = stated_group_size(model.linears.values(), ragged=ragged)
        keys = ("bits", "group_size", "sym")
        stated = {
            module: dict(zip(keys, (s.bits, group_of(s), s.symmetric), strict=True))
            for module, s in model.linears.items()
        }
        base = dict(Counter(tuple(own.items()) for own in stated.values()).most_common(1)[0][0])
        blocks = dict.fromkeys(
            found[1] for module in stated if (found := re.match(r"(.*?)\.\d+\.", module))
        )
        inside = tuple(f"{prefix}." for prefix in blocks)
        extra: dict[str, Mapping[str, object]] = {
            module: {"bits": 16}
            for module in dense_linears(model.dense)
            if module.startswith(inside)
        }
        for module, own in stated.items():
            outside = not module.startswith(inside)
            if differing := {k: v for k, v in own.items() if outside or v != base[k]}:
                extra[module] = differing
        block: dict[str, object] = {
            **base,
            "data_type": "int",
            "quant_method": METHODS[0],
            "packing_format": packing,
        }
        if blocks:
            block["block_name_to_quantize"] = ",".join(blocks)
        if extra:
            block["extra_config"] = extra
        return Written(block)

    return write


def _adopt(rule: str) -> Callable[[Scheme], Scheme]:
    """Return the `adopt` of one format: no `g_idx`, no flags."""

    def adopt(scheme: Scheme) -> Scheme:
        return replace(scheme, has_g_idx=False, zero_rule=rule, desc_act=False)

    return adopt


def _gptq(name: str, packing: str, title: str, rule: str, lowest: int, foreign: str) -> Format:
    """Return one of the formats with GPTQ's tensors."""
    parse = parse_as(name, BITS)
    return Format(
        name=name,
        aliases=(name.replace("_", "-"),) if "_" in name else ("auto-round", "auto_round"),
        title=title,
        capacity=Capacity(
            bits=BITS,
            zeros=lambda bits: (lowest, (1 << bits) - 1),
            act_order=False,
            ragged=True,
            scale_dtypes=("F16",),
            in_multiple=lambda bits: 32,
            out_multiple=lambda bits: 32,
        ),
        claims=claims_as(name),
        layout=gptq.layout,
        parse=parse,
        read=_read(parse, gptq.layout, rule, "gptq"),
        adopt=_adopt(rule),
        write=_write(packing, ragged=True),
        foreign_rules=((foreign, "v2" if foreign == "as_is" else "v1"),),
        decisive=("quant_method", "packing_format", "backend"),
    )


FORMAT = _gptq(
    "autoround",
    "auto_round",
    "AutoRound's own packing: GPTQ v2 without g_idx",
    "as_is",
    0,
    "plain",
)

GPTQ = _gptq(
    "autoround_gptq",
    DEFAULT,
    "AutoRound's GPTQ packing: GPTQ v1 without g_idx",
    "plain",
    1,
    "as_is",
)

_parse_awq = parse_as("autoround_awq", (4,))

AWQ = Format(
    name="autoround_awq",
    aliases=("autoround-awq",),
    title="AutoRound's AWQ packing: AWQ GEMM",
    capacity=replace(awq.CAPACITY, uniform=False),
    claims=claims_as("autoround_awq"),
    layout=awq.layout,
    parse=_parse_awq,
    read=_read(_parse_awq, awq.layout, "as_is", "gemm"),
    adopt=_adopt("as_is"),
    write=_write("auto_round:auto_awq", ragged=False),
    decisive=("quant_method", "packing_format", "backend"),
)
