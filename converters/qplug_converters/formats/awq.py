r"""AWQ GEMM as AutoAWQ 0.2.9 writes it (`version: gemm`), 4 bits.

| name      | dtype   | shape           | packed along                                |
|-----------|---------|-----------------|---------------------------------------------|
| `qweight` | int32   | [in, out/8]     | out: field i of a word is column ORDER[i]   |
| `qzeros`  | int32   | [in/G, out/8]   | out, the same order; zeros as they are      |
| `scales`  | float16 | [in/G, out]     | -                                           |

w[n, k] = scales[k // G, n] * (code - zero), zeros 0 to 15. in is a multiple of G, out of 8; no
`g_idx`. `group_size: -1` is one group per row.

Traps. ORDER is not its own inverse. `zero_point: false` files (AutoRound) hold zeros of 8 all the
same; where a converter left `qzeros` out, 8 is meant, and they are written again.
`modules_to_not_convert` is matched as a substring by readers, null breaks some of them, and an
entry such as `mlp.gate` also un-quantizes `mlp.gate_proj`: the tensors show what is quantized.
`backend: llm-awq` means that layout, whatever `version` says; `version: exllama`, `exllamav2` and
`ipex` are choices of a loader (Transformers), and the file is GEMM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ..block import (
    INCOMPLETE,
    Keys,
    dense_linears,
    dense_modules,
    modules_with,
    stated_group_size,
    stored_as,
)
from ..claim import Claim, Stated
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import Holds, Layout, Packing, Part
from ..scheme import ModelScheme, Scheme
from ..stored import read_linears
from . import gptq

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Field i of a word holds column ORDER[i] of its eight (AutoAWQ `awq/utils/packing_utils.py`)."""

PACKING = Packing(4, order=ORDER)

KINDS = ("gemm", "gemv", "gemv_fast", "llm-awq")
"""Values of `version` that name a layout."""

_LOADERS = {"exllama": "gemm", "exllamav2": "gemm", "ipex": "gemm"}
"""Values of `version` that name what runs a file of another version."""

_UNSUPPORTED = {
    "marlin": "Marlin tiles",
    "bitblas": "BitBLAS tiles",
    "paroquant": "rotated weights",
}

_ZEROS = ("qzeros",)
_AWQ_KEYS = ("zero_point", "w_bit", "q_group_size")
"""Keys that AWQ tools alone write."""


_INSIDE_BLOCK = re.compile(r"^(?:.*\.)?layers\.\d+\.")


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    return stored(
        scheme,
        (
            Part(
                name="qweight",
                holds=Holds.CODES,
                dtype="I32",
                stream="out inp -> inp out",
                packing=PACKING,
            ),
            Part(
                name="qzeros",
                holds=Holds.ZEROS,
                dtype="I32",
                stream="out group -> group out",
                packing=PACKING,
            ),
            Part(
                name="scales",
                holds=Holds.SCALES,
                dtype=scheme.scale_dtype,
                stream="out group -> group out",
            ),
        ),
    )


def stored(scheme: Scheme, parts: tuple[Part, ...]) -> Layout:
    """Return the layout of those parts that the file does not do without."""
    return Layout(tuple(part for part in parts if part.name not in scheme.lacks))


def kind_of(block: Block) -> str | None:
    """Return which layout the config says, as in `KINDS` or an unknown value; None: unsaid."""
    backend = block.get("backend")
    if isinstance(backend, str) and backend.lower() == "llm-awq":
        return "llm-awq"
    for key in ("version", "format", "checkpoint_format"):
        value = block.get(key)
        if value is not None:
            said = str(value).lower().replace("-", "_").replace("llm_awq", "llm-awq")
            return _LOADERS.get(said, said)
    return None


def claims_kind(kind: str, block: Block | None, headers: Headers) -> bool:
    """Whether a checkpoint is AWQ of one kind: the config decides, and shapes where it is silent.

    What no kind claims is refused, by name, by the reader of the ordinary one.
    """
    block = block or {}
    method = block.get("quant_method") or block.get("method")
    shapes, said = stored_as(headers), kind_of(block)
    if method is None:
        ours = any(block.get(key) is not None for key in _AWQ_KEYS) or said in KINDS
        if shapes[:1] == ("gptq",) or not (shapes or ours):
            return False
    elif not isinstance(method, str) or method.lower() != "awq":
        return False
    if said is None:
        said = next((found for found in shapes if found != "gptq"), "gemm")
    return said == kind or (kind == "gemm" and said not in KINDS)


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether the config says AWQ of the ordinary kind, or says nothing and the shapes do."""
    return claims_kind("gemm", block, headers)


def parse_as(kind: str, name: str) -> Callable[[Block | None], Claim]:
    """Return the `parse` of the format `name`, which stores the layout `kind`."""

    def parse(block: Block | None) -> Claim:
        keys = Keys(block)
        found = kind_of(keys.block)
        bits = keys.get(int, "bits", "w_bit", "wbits", "weight_bits", default=None if block else 4)
        group_size = keys.get(int, "group_size", "q_group_size", "groupsize")
        zero_point = keys.get(bool, "zero_point")
        sym = keys.get(bool, "sym")
        keys.get(str, "version", "format")
        skip = keys.get(list, "modules_to_not_convert", default=[])
        if bits != 4:
            keys.problem("bits", f"{bits}" if bits else "no such key", "4, the only width AWQ has")
        if found not in (None, kind):
            what = _UNSUPPORTED.get(found or "", "another layout" if found in KINDS else "unknown")
            keys.problem(
                "version",
                f"{found!r} ({what})",
                f"{kind!r}, the layout that is read here",
                "save it again as gemm in the tool that wrote it",
            )
        if group_size is not None and (group_size == 0 or group_size < -1):
            keys.problem("group_size", f"{group_size}", "-1 or a positive number")
        if zero_point is False and sym is False:
            keys.problem(
                "zero_point and sym",
                "false and false",
                "one of them true",
                "correct the wrong one",
            )
        raise_all(keys.problems)
        if zero_point is None and sym is not None:
            zero_point = not sym
        entries = [str(entry) for entry in skip]
        return Claim(
            format=name,
            base=Stated(4, group_size, sym=True if zero_point is False else None, ragged=False),
            # An entry may end in a dot, so that `layers.1.` is not `layers.11`.
            skip=lambda module: next((e for e in entries if e in f"{module}."), None),
            block=keys.block,
        )

    return parse


def check_stored(headers: Headers, kind: str) -> None:
    """Refuse a config that says `kind` of tensors whose shapes say something else.

    Raises
    ------
    QplugError
        If the shapes are those of other layouts.
    """
    shapes = stored_as(headers)
    if shapes and kind not in shapes:
        key = "quant_method" if shapes[0] == "gptq" else "version"
        raise QplugError(
            f"{kind!r} over tensors stored as {shapes[0]!r}",
            f"quantization_config.{key}",
            f"{shapes[0]!r}",
            f"correct {key} in the config",
        )


def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
    """Read the schemes of a checkpoint; headers decide, the config must agree."""
    claim = parse(block)
    check_stored(headers, "gemm")
    return read_with(claim, layout, headers, peek, "gemm")


def read_with(
    claim: Claim, layout: Callable[[Scheme], Layout], headers: Headers, peek: Peek, kind: str
) -> ModelScheme:
    """Read the linears of an AWQ checkpoint, each in `layout`, the layout of `kind`."""
    modules = modules_with(headers, "qweight", "qzeros", "scaled_zeros")
    if not modules:
        raise QplugError(
            "no `*.qweight` tensor", "the checkpoint's headers", "quantized linears", INCOMPLETE
        )
    problems: list[QplugError] = []
    zeroless = [
        module
        for module in modules
        if kind in ("gemm", "gemv") and claim.of(module).sym and f"{module}.qzeros" not in headers
    ]
    linears = read_linears(
        claim,
        zeroless,
        lambda scheme: layout(replace(scheme, lacks=_ZEROS)),
        headers,
        peek,
        problems,
    )
    linears = {module: replace(scheme, lacks=_ZEROS) for module, scheme in linears.items()}
    rest = [module for module in modules if module not in zeroless]
    linears |= read_linears(claim, rest, layout, headers, peek, problems)
    linears = {module: linears[module] for module in modules if module in linears}
    raise_all(problems)
    notes = skip_notes(claim, linears) + gptq.two_methods(claim.block)
    if kind != "gemm" and claim.block and kind_of(claim.block) is None:
        notes += (f"the config names no version, which readers take for gemm; stored as {kind}",)
    return ModelScheme(claim.format, linears, dense_modules(headers), "", notes, claim.block)


def skip_notes(claim: Claim, linears: Mapping[str, Scheme]) -> tuple[str, ...]:
    """Say which entries of the skip list name quantized linears too."""
    skipped: dict[str, str] = {}
    for module in linears:
        if (entry := claim.skip(module)) is not None:
            skipped.setdefault(entry, module)
    return tuple(
        f"modules_to_not_convert has {entry!r}, which readers also find in {hit}, quantized"
        for entry, hit in skipped.items()
    )


def skip_list(dense: Iterable[str], quantized: Sequence[str]) -> list[str]:
    """Return what the config says is not quantized; no entry is found in a quantized module.

    Readers look for an entry anywhere in a module's name: vLLM in the whole name, AutoAWQ in what
    follows `layers.<n>.`, so that is what is written where it holds in every block.
    """
    entries: dict[str, None] = {}
    for name in dense:
        inside = _INSIDE_BLOCK.sub("", name)
        for entry in (inside, name):
            if not any(entry in module for module in quantized):
                entries[entry] = None
                break
    return list(entries)


def write_as(kind: str) -> Callable[[ModelScheme], Written]:
    """Return the `write` of one kind: the config block as AutoAWQ 0.2.9 writes it.

    The skip list is never empty and un-quantizes nothing else.
    """

    def write(model: ModelScheme) -> Written:
        group_of = stated_group_size(model.linears.values(), ragged=False)
        sizes = {group_of(scheme) for scheme in model.linears.values()}
        if len(sizes) > 1:
            raise QplugError(
                f"group sizes {', '.join(map(str, sorted(sizes)))}",
                "the model",
                "one group size: AWQ configs cannot name several",
                "split them to one size with --group-size",
            )
        quantized = tuple(model.linears)
        skip = skip_list(dense_linears(model.dense), quantized)
        if not any(module.endswith("lm_head") for module in quantized) and "lm_head" not in skip:
            skip.append("lm_head")
        block: dict[str, object] = {
            "bits": 4,
            "group_size": sizes.pop(),
            "quant_method": "awq",
            "version": kind,
            "zero_point": True,
        }
        if skip:
            block["modules_to_not_convert"] = skip
        return Written(block)

    return write


parse = parse_as("gemm", "awq")

CAPACITY = Capacity(
    bits=(4,),
    zeros=lambda bits: (0, 15),
    act_order=False,
    ragged=False,
    scale_dtypes=("F16",),
    in_multiple=lambda bits: 1,
    out_multiple=lambda bits: 8,
    uniform=True,
)
"""What AWQ holds; its other layouts cut more coarsely."""

FORMAT = Format(
    name="awq",
    aliases=("awq-gemm",),
    title="AWQ GEMM (AutoAWQ): 4 bits, zeros as they are",
    capacity=CAPACITY,
    claims=claims,
    layout=layout,
    parse=parse,
    read=read,
    write=write_as("gemm"),
)
