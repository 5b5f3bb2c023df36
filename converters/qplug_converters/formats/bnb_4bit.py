r"""bitsandbytes 4-bit (NF4, FP4) as Transformers 5.23 and bitsandbytes 0.50.2 write it.

n = out * in weights, laid row after row, in nb = ceil(n / blocksize) blocks, which may span rows.
Names follow `<module>.weight`; `q` is `nf4` or `fp4`:

| name                                | dtype           | shape                         |
|-------------------------------------|-----------------|-------------------------------|
| (itself)                            | `quant_storage` | [ceil(n/2) / itemsize, 1]     |
| `.absmax`                           | float32; uint8  | [nb]; uint8 if double-quantized |
| `.quant_map`                        | float32         | [16]                          |
| `.nested_absmax`                    | float32         | [ceil(nb / nested_blocksize)] |
| `.nested_quant_map`                 | float32         | [256]                         |
| `.quant_state.bitsandbytes__q`      | uint8           | JSON of everything else       |

Byte i of the words holds code 2i in its high bits and code 2i + 1 in its low bits, whatever dtype
the words are stored under. w[i] = quant_map[code[i]] * absmax[i // blocksize] in float32; with
double quantization absmax[j] = nested_quant_map[absmax[j]] * nested_absmax[j // nested_blocksize]
+ nested_offset, rounded to `nested_dtype` after the product and after the sum.

The JSON alone knows out and in; its `dtype` is that of the original weight and changes nothing.
A linear is quantized where there is such a JSON, whatever the config says: a file may mix NF4, FP4
and dense linears. Transformers leaves fused experts dense.

Traps. The table in the file counts, not the one the name stands for. A file saved after a forward
on a CPU has absmax as bfloat16 [in / blocksize, out], and bitsandbytes reads garbage from it
without a word; with double quantization absmax was quantized anew, and `nested_dtype` is the
telltale. bitsandbytes' dequantization on a CPU is wrong where blocks span rows. `blocksize` is not
in the config, and `bnb_4bit_quant_type` is `fp4` where nobody set it.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..block import INCOMPLETE, Keys, parts_of, some
from ..claim import Claim, Stated
from ..errors import QplugError, raise_all
from ..format import Block, Capacity, Format, Headers, Peek, Written
from ..layout import Holds, Layout, Packing, Part, TensorSpec
from ..scheme import Codebook, Kind, ModelScheme, Nesting, Scheme
from . import bnb
from .bnb import MARK, bits_said
from .bnb_state import BLOCKSIZES, DTYPES, QuantState, spelled

TABLES = {
    "nf4": struct.pack(
        "<16f", -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": struct.pack(
        "<16f", 0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
        0.1666666716337204, 0.25, 0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
"""The values of the codes, float32 (bitsandbytes 0.50.2, from files it wrote)."""

_DYNAMIC_MAP = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
"""sha256 of bitsandbytes' signed dynamic map, the table of double quantization."""

STORAGES = {
    "uint8": "U8", "int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32",
    "float64": "F64",
}  # fmt: skip
"""`bnb_4bit_quant_storage` by safetensors' names."""

_BYTES = Packing(4, word="U8", order=(1, 0))


# Storage ------------------------------------------------------------------------------------------


def layout(scheme: Scheme) -> Layout:
    """Return the stored tensors of one linear."""
    book = scheme.codebook
    assert book is not None
    absmax = Part(
        name="weight.absmax",
        holds=Holds.ABSMAX,
        dtype="U8" if book.nesting is not None else scheme.scale_dtype,
        stream="block -> block",
        block=scheme.group_size,
    )
    if book.transposed:
        absmax = replace(
            absmax, stream="(block group) -> group block", lengths=(("group", scheme.groups),)
        )
    parts = [
        Part(
            name="weight",
            holds=Holds.CODES,
            dtype=book.storage,
            stream="out inp -> 1 (out inp)",
            packing=replace(_BYTES, word=book.storage),
            stored="1 w -> w" if book.flat else "1 w -> w 1",
        ),
        absmax,
        _constant("quant_map", book.table, "F32"),
    ]
    if book.nesting is not None:
        nested = Part(
            name="weight.nested_absmax", holds=Holds.NESTED, dtype="F32", stream="nested -> nested"
        )
        parts += [nested, _constant("nested_quant_map", book.nesting.table, "F32")]
    parts.append(_constant(MARK[1:] + book.name, book.state or spelled(scheme), "U8"))
    return Layout(tuple(parts))


def _constant(name: str, data: bytes, dtype: str) -> Part:
    shape = (len(data) // (4 if dtype == "F32" else 1),)
    return Part(
        name=f"weight.{name}",
        holds=Holds.CONSTANT,
        dtype=dtype,
        constant=data,
        constant_shape=shape,
    )


# Config -------------------------------------------------------------------------------------------


def _types(headers: Headers) -> set[str]:
    """Return the quant types that a file's own records name."""
    return {name.partition(MARK)[2] for name in headers if MARK in name}


def claims_as(quant_type: str) -> Callable[[Block | None, Headers], bool]:
    """Return the `claims` of the format of one `quant_type`; files that mix them are NF4's."""

    def claims(block: Block | None, headers: Headers) -> bool:
        said = bits_said(block)
        if said is None:
            return False
        if found := _types(headers):
            return (quant_type == "fp4") is (found == {"fp4"})
        if said != 4 or any(name.endswith(".SCB") for name in headers):
            return False
        return (quant_type == "fp4") is ((block or {}).get("bnb_4bit_quant_type", "fp4") == "fp4")

    return claims


def parse_as(quant_type: str) -> Callable[[Block | None], Claim]:
    """Return the `parse` of a format.

    The config does not say how many weights share an absmax: 64, where nobody asked for another.
    """

    def parse(block: Block | None) -> Claim:
        keys = Keys(block)
        said = keys.get(str, "bnb_4bit_quant_type", default="fp4" if block else quant_type)
        nested = keys.get(bool, "bnb_4bit_use_double_quant", default=False)
        storage = keys.get(str, "bnb_4bit_quant_storage", default="uint8")
        if said not in TABLES:
            keys.problem("bnb_4bit_quant_type", f"{said!r}", " or ".join(map(repr, TABLES)))
        if storage not in STORAGES:
            keys.problem("bnb_4bit_quant_storage", f"{storage!r}", f"one of {', '.join(STORAGES)}")
        skip, lm_head = bnb.common(keys)
        raise_all(keys.problems)
        details = {"quant_type": said, "double_quant": nested, "quant_storage": storage}
        return Claim(
            format=f"bnb-{quant_type}",
            base=Stated(4, 64),
            skip=skip,
            lm_head=lm_head,
            block=keys.block,
            details=details,
        )

    return parse


# Reading ------------------------------------------------------------------------------------------


class _Odd:
    """Modules that are odd, by what is odd about them, in the order met."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, sentence: str, module: str) -> None:
        """Remember that `sentence`, which has `{}` for the modules, holds of `module`."""
        self.found.setdefault(sentence, []).append(module)

    @property
    def notes(self) -> list[str]:
        """One sentence each."""
        return [text.format(some(names)) for text, names in self.found.items()]


def read_as(
    parse: Callable[[Block | None], Claim],
) -> Callable[[Block | None, Headers, Peek], ModelScheme]:
    """Return the `read` of a format."""

    def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
        claim = parse(block)
        odd = _Odd()
        problems: list[QplugError] = []
        linears: dict[str, Scheme] = {}
        met = set()
        for name in headers:
            if MARK not in name:
                continue
            parameter = name.partition(MARK)[0]
            try:
                if parameter in met:
                    raise QplugError("a second quant_state", name, "one of a linear", INCOMPLETE)
                met.add(parameter)
                module = _module(name)
                linears[module] = _linear(module, name, headers, peek, odd)
            except QplugError as error:
                problems += [error, *error.others]
        problems += _orphans(headers, met)
        if not met and not problems:
            problems.append(bnb.nothing(headers, "quant_state"))
        raise_all(problems)
        _contradictions(claim, linears, odd)
        notes = [*bnb.notes(4, claim.block, claim.skip, linears), *odd.notes]
        dense = bnb.dense_but(headers, linears)
        return ModelScheme(claim.format, linears, dense, "", tuple(notes), claim.block)

    return read


_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def _orphans(headers: Headers, parameters: set[str]) -> list[QplugError]:
    """Refuse tensors of quantized linears that no quant_state describes, and int8 ones."""
    problems = []
    for name, spec in headers.items():
        parameter, dot, last = name.rpartition(".")
        if f"{dot}{last}" in _BESIDE:
            wrong = parameter not in parameters
        else:
            wrong = last == "weight" and spec.dtype in ("U8", "I8") and name not in parameters
            wrong = wrong and f"{name}.absmax" not in headers
        if wrong:
            problems.append(
                QplugError(
                    f"{spec} and no quant_state", name, "a 4-bit linear or a dense one", INCOMPLETE
                )
            )
    return problems


def _module(name: str) -> str:
    """Return the module that a quant_state belongs to."""
    module, dot, last = name.partition(MARK)[0].rpartition(".")
    if not module or not dot or last != "weight":
        raise QplugError(
            "a quantized parameter that is no linear's weight",
            name,
            f"<module>.weight{MARK}nf4 or fp4",
            "fused experts: save the model with one linear per expert",
        )
    return module


def _linear(module: str, name: str, headers: Headers, peek: Peek, odd: _Odd) -> Scheme:
    """Read one linear: the JSON and the tables, held against every shape."""
    state = QuantState(name, headers, peek)
    stored = _spec(headers, f"{module}.weight", "the codes")
    absmax = _spec(headers, f"{module}.weight.absmax", "one value for every block")
    if stored.dtype not in STORAGES.values():
        allowed = ", ".join(STORAGES.values())
        raise QplugError(str(stored), f"{module}.weight", f"one of {allowed}", INCOMPLETE)
    table = _table(f"{module}.weight.quant_map", 16, headers, peek)
    if table != TABLES[state.quant_type]:
        odd.add(
            f"quant_map of {{}} is not the {state.quant_type} table of bitsandbytes: read by the "
            "one in the file, and engines may take their own",
            module,
        )
    nesting = None
    if state.nested:
        outer = _table(f"{module}.weight.nested_quant_map", 256, headers, peek)
        nesting = Nesting(state.nested_blocksize, state.nested_offset, outer, state.nested_dtype)
        if hashlib.sha256(outer).hexdigest() != _DYNAMIC_MAP:
            odd.add(
                "nested_quant_map of {} is not the dynamic map of bitsandbytes: read by the one in "
                "the file, and engines may take their own",
                module,
            )
    whole = nesting is None and state.shape[1] % state.blocksize == 0
    transposed = whole and absmax.dtype == "BF16" and len(absmax.shape) == 2
    book = Codebook(
        state.quant_type,
        table,
        state.dtype,
        stored.dtype,
        nesting,
        transposed=transposed,
        flat=len(stored.shape) == 1,
    )
    scheme = Scheme(
        *state.shape,
        4,
        state.blocksize,
        scale_dtype="BF16" if transposed else "F32",
        kind=Kind.CODEBOOK,
        codebook=book,
    )
    if spelled(scheme) != state.raw:
        scheme = replace(scheme, codebook=replace(book, state=state.raw))
    parts = layout(scheme)
    found = parts_of(headers, module, [part.name for part in parts])
    said = f"blocks of {state.blocksize} weights, says quant_state; the tensors must agree"
    raise_all(parts.check(module, scheme.sizes, found, said))
    if transposed:
        odd.add(
            "absmax of {} is transposed and bfloat16: the file was saved after a forward on a CPU, "
            "and bitsandbytes reads wrong weights from it; read as it was meant",
            module,
        )
    elif nesting is not None and nesting.dtype != "float32":
        odd.add(
            f"nested_dtype of {{}} is {nesting.dtype}: the file was saved after a forward on a "
            "CPU, which rounded absmax and quantized it anew; read as it stands",
            module,
        )
    return scheme


def _spec(headers: Headers, name: str, expected: str) -> TensorSpec:
    if name not in headers:
        raise QplugError("no such tensor", name, expected, INCOMPLETE)
    return headers[name]


def _table(name: str, count: int, headers: Headers, peek: Peek) -> bytes:
    """Read a table of finite float32."""
    wanted = TensorSpec("F32", (count,))
    if (spec := _spec(headers, name, str(wanted))) != wanted:
        raise QplugError(str(spec), name, str(wanted), INCOMPLETE)
    values = peek(name)
    if not bool(np.isfinite(values).all()):
        raise QplugError("values that are NaN or infinite", name, "finite numbers", INCOMPLETE)
    return values.tobytes()


def _contradictions(claim: Claim, linears: Mapping[str, Scheme], odd: _Odd) -> None:
    """Say where what the config says of 4-bit linears is not what the file holds."""
    keys = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
    for module, scheme in linears.items():
        book = scheme.codebook
        assert book is not None
        facts = (book.name, book.nesting is not None, _NAMES[book.storage])
        for key, said, found in zip(keys, claim.details.values(), facts, strict=True):
            if claim.block.get(key) is not None and said != found:
                odd.add(f"{key} is {said!r} in the config, and {found!r} in {{}}", module)


_NAMES = {stored: name for name, stored in STORAGES.items()}


# Writing ------------------------------------------------------------------------------------------


def adopt_as(quant_type: str) -> Callable[[Scheme], Scheme]:
    """Return the `adopt` of a format: plain absmax in float32, bytes stored as bytes.

    A scheme on another grid becomes one that this format can be quantized to.
    """

    def adopt(scheme: Scheme) -> Scheme:
        dtype = DTYPES.get(scheme.scale_dtype, "float16")
        book = scheme.codebook or Codebook(quant_type, TABLES[quant_type], dtype)
        return replace(
            scheme,
            bits=4,
            group_size=scheme.group_size if scheme.kind is Kind.CODEBOOK else 64,
            sym=None,
            desc_act=False,
            act_order=False,
            has_g_idx=False,
            scale_dtype="F32",
            zero_rule="as_is",
            zeros=None,
            scales=None,
            kind=Kind.CODEBOOK,
            codebook=Codebook(book.name, book.table, book.dtype),
        )

    return adopt


def write(model: ModelScheme) -> Written:
    """Return the config block; it describes most linears, and the file every one."""
    books = [s.codebook for s in model.linears.values() if s.codebook is not None]

    def most(of: Callable[[Codebook], Any]) -> Any:
        return Counter(map(of, books)).most_common(1)[0][0]

    own = {
        "bnb_4bit_compute_dtype": bnb.compute_dtype(model, most(lambda book: book.dtype)),
        "bnb_4bit_quant_storage": most(lambda book: _NAMES[book.storage]),
        "bnb_4bit_quant_type": most(lambda book: book.name),
        "bnb_4bit_use_double_quant": most(lambda book: book.nesting is not None),
    }
    return Written(bnb.block_of(model, 4, own))


def _format(quant_type: str) -> Format:
    parse = parse_as(quant_type)
    return Format(
        name=f"bnb-{quant_type}",
        aliases=("bnb-4bit",) if quant_type == "nf4" else (),
        title=f"bitsandbytes 4-bit, {quant_type.upper()}: 16 values, one absmax a block",
        capacity=Capacity(
            bits=(4,),
            zeros=lambda bits: (0, 0),
            act_order=False,
            ragged=True,
            scale_dtypes=("F32",),
            in_multiple=lambda bits: 1,
            out_multiple=lambda bits: 1,
            group_sizes=BLOCKSIZES,
            kind=Kind.CODEBOOK,
        ),
        claims=claims_as(quant_type),
        layout=layout,
        parse=parse,
        read=read_as(parse),
        adopt=adopt_as(quant_type),
        write=write,
        # bitsandbytes reads absmax of this shape as something else, without a word.
        current=lambda scheme: scheme.codebook is None or not scheme.codebook.transposed,
    )


NF4 = _format("nf4")
FP4 = _format("fp4")
