"""What the two bitsandbytes formats share: the config block of Transformers' BitsAndBytesConfig.

`load_in_4bit` and `load_in_8bit` (or either with a `_` before it) say which of the two it is; the
tensors decide. `llm_int8_skip_modules` leaves modules dense in 4-bit files too; null stands for the
head and what is tied to it. Keys that only steer the run (thresholds, offloading) are not judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from ..block import INCOMPLETE, Keys, dense_linears, dense_modules
from ..errors import QplugError
from ..format import Block, Headers
from ..scheme import ModelScheme

METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
MARK = ".quant_state.bitsandbytes__"
"""Between the name of a 4-bit weight and its quant type."""
COMPUTE = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that `bnb_4bit_compute_dtype` may name."""


def bits_said(block: Block | None) -> int | None:
    """Return the bits that a config says: 4, 8, or 0 where it leaves them open.

    `None` if it is of another tool. 8 wins over 4, as in Transformers.
    """
    block = block or {}
    method = block.get("quant_method") or block.get("method")
    if method and (not isinstance(method, str) or method.lower() not in METHODS):
        return None
    for bits in (8, 4):
        if True in (block.get(f"load_in_{bits}bit"), block.get(f"_load_in_{bits}bit")):
            return bits
    return 0


def common(keys: Keys) -> tuple[Callable[[str], str | None], bool | None]:
    """Judge the keys of both formats: return `skip` and `lm_head` of a `Claim`."""
    four = keys.get(bool, "load_in_4bit", "_load_in_4bit", default=False)
    eight = keys.get(bool, "load_in_8bit", "_load_in_8bit", default=False)
    if four and eight:
        keys.problem("load_in_8bit", "true beside load_in_4bit", "one of the two")
    compute = keys.get(str, "bnb_4bit_compute_dtype", default="float32")
    if compute not in COMPUTE:
        keys.problem("bnb_4bit_compute_dtype", f"{compute!r}", f"one of {', '.join(COMPUTE)}")
    entries = keys.get(list, "llm_int8_skip_modules")
    if entries is None:
        return lambda module: None, False
    if not all(isinstance(entry, str) for entry in entries):
        keys.problem("llm_int8_skip_modules", f"{entries!r}", "a list of names")
        return lambda module: None, None
    skip = _skip(entries)
    return skip, False if skip("lm_head") else None


def _skip(entries: Iterable[str]) -> Callable[[str], str | None]:
    """Match as Transformers does, but for regular expressions: from the start, or to the end."""
    plain = [(entry, re.sub(r"\\(.)", r"\1", entry.removesuffix("$"))) for entry in entries]

    def skip(module: str) -> str | None:
        for entry, name in plain:
            whole = entry.endswith("$")
            if module == name or (not whole and (module.startswith(name) or module.endswith(name))):
                return entry
        return None

    return skip


def notes(
    bits: int, block: Block, skip: Callable[[str], str | None], linears: Iterable[str]
) -> list[str]:
    """Say where the config and the tensors differ, for keys of both formats."""
    found = []
    if not block:
        found.append("there is no quantization config: engines take the model for unquantized")
    elif (said := bits_said(block)) != bits:
        what = f"{said} bits" if said else "neither load_in_4bit nor load_in_8bit"
        found.append(f"the config says {what}, and the tensors are {bits}-bit")
    hits: dict[str, str] = {}
    for module in linears:
        if (entry := skip(module)) is not None:
            hits.setdefault(entry, module)
    found += [
        f"llm_int8_skip_modules has {entry!r}, and {module} is quantized"
        for entry, module in hits.items()
    ]
    return found


def dense_but(headers: Headers, linears: Iterable[str]) -> tuple[str, ...]:
    """Return the modules left in full precision; quantized weights may be 2-D tensors too."""
    quantized = set(linears)
    return tuple(module for module in dense_modules(headers) if module not in quantized)


def nothing(headers: Headers, part: str) -> QplugError:
    """Say that nothing is quantized, and what to do about it."""
    dense = any(
        spec.dtype in ("F16", "BF16", "F32") and len(spec.shape) == 2 for spec in headers.values()
    )
    return QplugError(
        f"no `{part}` tensor",
        "the checkpoint's headers",
        "quantized linears, as the config says",
        "the weights are dense: remove quantization_config from the config"
        if dense
        else INCOMPLETE,
    )


def skip_list(model: ModelScheme) -> list[str]:
    """Return `llm_int8_skip_modules`: the dense linears and the head.

    Transformers matches an entry from the start of a path, as a regular expression; one that would
    hit a quantized linear too (`mlp.gate` and `mlp.gate_proj`) is written as an expression that
    ends where it does.
    """
    names = list(dense_linears(model.dense))
    if not any(module.rpartition(".")[2] == "lm_head" for module in (*model.linears, *names)):
        names.append("lm_head")
    return [
        f"{re.escape(name)}$"
        if any(m.startswith(name) or m.endswith(name) for m in model.linears)
        else name
        for name in names
    ]


def block_of(model: ModelScheme, bits: int, own: Mapping[str, object]) -> dict[str, object]:
    """Return the config block as Transformers 5.23 writes it, in its order, without nulls."""
    return {
        "_load_in_4bit": bits == 4,
        "_load_in_8bit": bits == 8,
        **own,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_list(model),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    }


def compute_dtype(model: ModelScheme, default: str) -> str:
    """Return `bnb_4bit_compute_dtype`: the source's, if it is of this tool and names one."""
    said = model.block.get("bnb_4bit_compute_dtype")
    return said if bits_said(model.block) is not None and said in COMPUTE else default
