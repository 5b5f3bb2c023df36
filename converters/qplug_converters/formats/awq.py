r"""AWQ GEMM as AutoAWQ 0.2.9 writes it (`version: gemm`), 4 bits.

| name      | dtype   | shape           | packed along                                |
|-----------|---------|-----------------|---------------------------------------------|
| `qweight` | int32   | [in, out/8]     | out: field i of a word is column ORDER[i]   |
| `qzeros`  | int32   | [in/G, out/8]   | out, the same order; zeros as they are      |
| `scales`  | float16 | [in/G, out]     | -                                           |

w[n, k] = scales[k // G, n] * (code - zero), zeros 0 to 15. in is a multiple of G, out of 8; no
`g_idx`. `group_size: -1` is one group per row.

Traps. ORDER is not its own inverse. `zero_point: false` files (AutoRound) hold zeros of 8 all the
same. `modules_to_not_convert` is matched as a substring by readers, null breaks some of them, and
an entry such as `mlp.gate` also un-quantizes `mlp.gate_proj`: the tensors show what is quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..block import (
    INCOMPLETE,
    Keys,
    dense_linears,
    dense_modules,
    modules_with,
    packed_along,
    stated_group_size,
)
from ..claim import Claim, Stated
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import Holds, Layout, Packing, Part
from ..scheme import ModelScheme, Scheme
from ..stored import read_linears

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Field i of a word holds column ORDER[i] of its eight (AutoAWQ `awq/utils/packing_utils.py`)."""

_PACKING = Packing(4, order=ORDER)


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    return Layout(
        (
            Part(
                name="qweight",
                holds=Holds.CODES,
                dtype="I32",
                stream="out inp -> inp out",
                packing=_PACKING,
            ),
            Part(
                name="qzeros",
                holds=Holds.ZEROS,
                dtype="I32",
                stream="out group -> group out",
                packing=_PACKING,
            ),
            Part(
                name="scales",
                holds=Holds.SCALES,
                dtype=scheme.scale_dtype,
                stream="out group -> group out",
            ),
        )
    )


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether the config says AWQ, or says nothing and the shapes do."""
    method = (block or {}).get("quant_method") or (block or {}).get("method")
    if isinstance(method, str):
        return method.lower() == "awq"
    return packed_along(headers) == "out"


def parse(block: Block | None) -> Claim:
    """Judge the config."""
    return parse_version(block, "gemm", "awq")


def parse_version(block: Block | None, version: str, name: str) -> Claim:
    """Judge the config of an AWQ checkpoint of one `version`."""
    keys = Keys(block)
    bits = keys.get(int, "bits", "w_bit", default=None if block else 4)
    group_size = keys.get(int, "group_size", "q_group_size")
    zero_point = keys.get(bool, "zero_point", default=True)
    said = keys.get(str, "version", "format", default="gemm")
    skip = keys.get(list, "modules_to_not_convert", default=[])
    if bits != 4:
        keys.problem("bits", f"{bits}" if bits else "no such key", "4, the only width AWQ has")
    if said.lower() != version:
        keys.problem(
            "version",
            f"{said!r}",
            f"{version!r}, the layout this version reads",
            "save it again as gemm in the tool that wrote it",
        )
    if group_size is not None and (group_size == 0 or group_size < -1):
        keys.problem("group_size", f"{group_size}", "-1 or a positive number")
    raise_all(keys.problems)
    entries = [str(entry) for entry in skip]
    return Claim(
        format=name,
        base=Stated(4, group_size, sym=None if zero_point else True, ragged=False),
        # An entry may end in a dot, so that `layers.1.` is not `layers.11`.
        skip=lambda module: next((e for e in entries if e in f"{module}."), None),
        block=keys.block,
    )


def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
    """Read the schemes of a checkpoint; headers decide, the config must agree."""
    claim = parse(block)
    if packed_along(headers) == "inp":
        raise QplugError(
            "'awq' over a qweight packed along the inputs",
            "quantization_config.quant_method",
            "one packed along the outputs",
            "correct the config: GPTQ and AWQ GEMV pack along the inputs",
        )
    return read_with(claim, layout, headers, peek)


def read_with(
    claim: Claim, layout: Callable[[Scheme], Layout], headers: Headers, peek: Peek
) -> ModelScheme:
    """Read the linears of an AWQ checkpoint, each in `layout`."""
    modules = modules_with(headers, "qweight", "qzeros")
    if not modules:
        raise QplugError(
            "no `*.qweight` tensor", "the checkpoint's headers", "quantized linears", INCOMPLETE
        )
    problems: list[QplugError] = []
    linears = read_linears(claim, modules, layout, headers, peek, problems)
    raise_all(problems)
    skipped: dict[str, str] = {}
    for module in linears:
        if (entry := claim.skip(module)) is not None:
            skipped.setdefault(entry, module)
    notes = [
        f"modules_to_not_convert has {entry!r}, which readers also find in {hit}, quantized"
        for entry, hit in skipped.items()
    ]
    return ModelScheme(claim.format, linears, dense_modules(headers), "", tuple(notes), claim.block)


def adopt(scheme: Scheme) -> Scheme:
    """Restate a scheme as AWQ writes it."""
    return replace(scheme, has_g_idx=False, zero_rule="as_is", desc_act=False)


def write(model: ModelScheme) -> Written:
    """Return the config block; the skip list is never empty and un-quantizes nothing else.

    Raises
    ------
    QplugError
        If the linears do not share one group size, which AWQ configs cannot say.
    """
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
    skip = [
        name
        for name in dense_linears(model.dense)
        if not any(name in module for module in quantized)
    ]
    if not any(module.endswith("lm_head") for module in quantized) and "lm_head" not in skip:
        skip.append("lm_head")
    block: dict[str, object] = {
        "bits": 4,
        "group_size": sizes.pop(),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    if skip:
        block["modules_to_not_convert"] = skip
    return Written(block)


FORMAT = Format(
    name="awq",
    aliases=("awq-gemm",),
    title="AWQ GEMM (AutoAWQ): 4 bits, zeros as they are",
    capacity=Capacity(
        bits=(4,),
        zeros=lambda bits: (0, 15),
        act_order=False,
        ragged=False,
        scale_dtypes=("F16",),
        in_multiple=lambda bits: 1,
        out_multiple=lambda bits: 8,
        uniform=True,
    ),
    claims=claims,
    layout=layout,
    parse=parse,
    read=read,
    adopt=adopt,
    write=write,
)
