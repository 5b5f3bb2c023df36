"""Encode and decode: the only code that turns stored tensors into codes and back.

The patterns of a `Part` say what a stored tensor means; `_literal` executes them word for word.
Patterns that mean "rows of words, perhaps transposed" run as whole words through `words`, and
must equal the literal execution bit for bit (a property test).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from . import bitstream, spread, tiles, words, zeros
from .errors import QplugError
from .layout import Holds, Layout, Packing, Part, swapped
from .scheme import Codebook, Kind, Scheme
from .weight import (
    AffineGrid,
    CodebookGrid,
    Grid,
    NestedAbsmax,
    OffsetGrid,
    QuantizedWeight,
    RowGrid,
)

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's dtype for safetensors' names."""

_ROUTES: dict[tuple[str, str], tuple[bool, bool]] = {
    ("out inp -> out inp", ""): (False, False),
    ("out inp -> out inp", "out w -> w out"): (True, False),
    ("out inp -> inp out", ""): (False, True),
    ("out inp -> 1 (out inp)", "1 w -> w 1"): (False, False),
    ("out inp -> 1 (out inp)", "1 w -> w"): (False, False),
}
"""Patterns of codes that the whole-word routes know: are words, are codes transposed?"""

_FLAT = {"1 w -> w 1": (-1, 1), "1 w -> w": (-1,)}
"""Shapes of the words of a weight that is one row of codes."""


def _route(part: Part, in_features: int) -> tuple[bool, bool] | None:
    """Return how the whole-word routes run a packed part, or `None` if they do not know it.

    Rows of other words are rows of int32 words where they end on one, and bytes in an order where
    that is the same in each.
    """
    packing = part.packing
    if part.holds is not Holds.CODES or packing is None or packing.planes or packing.per_word:
        return None
    route = _ROUTES.get((part.stream, part.stored))
    if packing.word == "I32":
        return route
    whole = in_features * packing.bits % max(32, packing.word_bits) == 0
    return route if whole and route == (False, False) else None


def _order(packing: Packing) -> tuple[int, ...]:
    """Return the order of codes in an int32 word made of a packing's words."""
    step = len(packing.order)
    times = 32 // packing.bits // step if step else 0
    return tuple(at * step + code for at in range(times) for code in packing.order)


def _as_int32(stored: Tensor) -> Tensor:
    """View stored words as int32; bytes that lie across words are copied first."""
    if stored.dtype is torch.int32:
        return stored
    flat = stored.reshape(-1)
    if flat.storage_offset() * flat.itemsize % 4 or flat.data_ptr() % 4:
        flat = flat.clone()
    return flat.view(torch.int32)


def unpack_part(part: Part, stored: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Return what a stored tensor holds, on canonical axes.

    Codes come as uint8 `[out, in]`, zeros as int16 `[out, groups]`, scales, offsets, absmax and
    weights in the stored dtype, `g_idx` as int32 `[in]`.
    """
    if part.packing is None:
        if part.shared:
            stored = stored.expand(sizes["out"], sizes["group"])
        plain: Tensor = rearrange(stored, swapped(part.stream), **part.split_of(sizes))
        plain = _unpadded(part, plain, sizes)
        if part.shift:
            shifted = plain.to(torch.int16) - part.shift
            return shifted if part.holds is Holds.ZEROS else shifted.to(torch.uint8)
        return plain.contiguous()
    if (route := _route(part, sizes["inp"])) is not None:
        transposed, codes_transposed = route
        words_of = _as_int32(stored)
        if part.packing.word != "I32":
            words_of = words_of.reshape(sizes["out"], -1)
        unpack = words.unpack if stored.device.type == "cpu" else spread.unpack
        return unpack(
            words_of,
            part.packing.bits,
            sizes["out"] if codes_transposed else sizes["inp"],
            order=_order(part.packing),
            transposed=transposed,
            codes_transposed=codes_transposed,
        )
    return _literal_unpack(part, stored, sizes).to(stored.device)


def _literal_unpack(part: Part, stored: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Execute the patterns of a packed part as they are written."""
    assert part.packing is not None
    lengths = part.sizes_of(sizes)
    raw = _as_words(stored, part.packing)
    # Rows of words: all but the axis of words is known by name.
    rows = rearrange(raw, swapped(part.stored)) if part.stored else raw
    right = part.stream.partition("->")[2]
    last = right.split("(")[-1].rstrip(")").split() if right.endswith(")") else right.split()[-1:]
    count = prod(lengths[name] for name in last)
    if part.holds is Holds.ZEROS:
        found: np.ndarray = zeros.decode(rows, part.packing, count, part.rule)
    else:
        found = bitstream.unpack(rows, part.packing, count)
    known = {name: size for name, size in lengths.items() if name != "1" and name in part.stream}
    plain = rearrange(found, swapped(part.stream), **known)
    return _unpadded(part, torch.from_numpy(np.ascontiguousarray(plain)), sizes).contiguous()


def _padded(part: Part, values: Tensor) -> Tensor:
    """Fill the groups up to `part.multiple` with zeros."""
    if part.multiple == 1:
        return values
    return torch.nn.functional.pad(values, (0, -values.shape[1] % part.multiple))


def _unpadded(part: Part, plain: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Drop the groups that fill up to `part.multiple`; they hold nothing but zero bytes."""
    if part.multiple == 1:
        return plain
    padding = plain[:, sizes["group"] :].flatten().clone()  # `view` wants a stride of 1
    if bool(padding.view(torch.uint8).any()):
        raise QplugError(
            f"numbers behind the last of {sizes['group']} groups",
            part.name,
            "zeros up to the end",
            "correct group_size in the config; if it is right, the file is damaged",
        )
    return plain[:, : sizes["group"]]


def _as_words(stored: Tensor, packing: Packing) -> np.ndarray:
    """View a stored tensor, of whatever dtype, as unsigned words."""
    width = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[packing.word_bits]
    view = stored.cpu().contiguous().view(width).numpy()
    unsigned: np.ndarray = view.view(view.dtype.str.replace("i", "u"))
    return unsigned


def pack_part(part: Part, values: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the stored tensor of a part, the inverse of `unpack_part`; written into `out`."""
    dtype = TORCH_DTYPES[part.dtype]
    if part.packing is None:
        if part.shift:
            values = values.to(torch.int16) + part.shift
        stored = rearrange(_padded(part, values), part.stream, **dict(part.lengths)).to(dtype)
        if part.shared:
            stored = stored.reshape(-1)[0].reshape(1)
    else:
        if part.holds is Holds.CODES and (route := _route(part, values.shape[1])) is not None:
            transposed, codes_transposed = route
            direct = part.packing.word == "I32" and part.stored not in _FLAT
            packed = words.pack(
                values.cpu(),
                part.packing.bits,
                order=_order(part.packing),
                transposed=transposed,
                codes_transposed=codes_transposed,
                out=out if direct else None,
            )
            if direct and out is not None:
                return out
            shape = _FLAT.get(part.stored, (len(values), -1))
            stored = packed if direct else packed.reshape(-1).view(dtype).reshape(shape)
        else:
            stored = _literal_pack(part, values)
    return stored.contiguous() if out is None else out.copy_(stored)


def _literal_pack(part: Part, values: Tensor) -> Tensor:
    """Execute the patterns of a packed part as they are written."""
    assert part.packing is not None
    rows = rearrange(_padded(part, values.cpu()).numpy(), part.stream, **dict(part.lengths))
    if part.holds is Holds.ZEROS:
        found = zeros.encode(rows, part.packing, part.rule)
    else:
        found = bitstream.pack(rows, part.packing)
    if part.stored:
        found = rearrange(found, part.stored, **_taken_apart(part, values))
    stored = np.ascontiguousarray(found)
    stored = stored.reshape(-1).reshape(stored.shape)  # an axis of one keeps a foreign stride
    signed = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[stored.dtype.itemsize]
    return torch.from_numpy(stored.view(signed)).view(TORCH_DTYPES[part.dtype])


def _taken_apart(part: Part, codes: Tensor) -> dict[str, int]:
    """Return the lengths of the axes that the rows of codes are taken apart into."""
    names = part.stored.partition("->")[0].partition(")")[0].partition("(")[2].split()
    if not names:
        return {}
    lengths = part.sizes_of({"out": codes.shape[0], "inp": codes.shape[1]})
    return {name: lengths[name] for name in names}


def form(part: Part, in_features: int) -> tiles.Form | None:
    """Return the form in which a part of codes stores row words, or `None` if it does not."""
    packing = part.packing
    route = _route(part, in_features)
    if packing is None or route is None or in_features * packing.bits % 32:
        return None
    order = _order(packing)
    natural = order == tuple(range(len(order)))
    if route == (False, True):
        natural_order = tuple(range(8)) if natural else order
        return tiles.Form(tiles.Kind.TILES, natural_order) if packing.bits == 4 else None
    if not natural:
        return None
    return tiles.Form(tiles.Kind.COLUMNS if route == (True, False) else tiles.Kind.ROWS)


def as_words(stored: Tensor, kind: tiles.Kind, rows: int) -> Tensor:
    """View what a part stores as the int32 words of its form; copied where it is not aligned."""
    found = _as_int32(stored)
    return found.reshape(rows, -1) if kind is tiles.Kind.ROWS else found


def translate(
    source: Part, target: Part, stored: Tensor, sizes: Mapping[str, int], out: Tensor | None = None
) -> Tensor:
    """Bring one stored tensor from one part's form into another's that holds the same numbers.

    Codes that both store as row words go from words to words without being unpacked
    (docs/adr/0002).
    """
    one, two = (form(p, sizes["inp"]) for p in (source, target))
    if one is None or two is None or source.packing is None or target.packing is None:
        return pack_part(target, unpack_part(source, stored, sizes), out)
    if source.packing.bits != target.packing.bits:
        return pack_part(target, unpack_part(source, stored, sizes), out)
    spec = target.spec(sizes)
    filled = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) if out is None else out
    rows = sizes["out"]
    into = as_words(filled, two.kind, rows)
    tiles.translate(one, two, as_words(stored, one.kind, rows), into, rows)
    if into.data_ptr() != filled.data_ptr():  # bytes that do not lie on words
        filled.copy_(into.view(filled.dtype).reshape(filled.shape))
    return filled


FACTORS = (Holds.SCALES, Holds.OFFSETS, Holds.ABSMAX, Holds.NESTED)
"""What dequantized weights are multiples or sums of."""


def check_scales(scales: Tensor, name: str = "scales") -> None:
    """Refuse scales that are not numbers: nothing dequantizes from them.

    Raises
    ------
    QplugError
        If a scale is NaN or infinite.
    """
    finite = torch.isfinite(scales)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise QplugError(
            f"{bad} {name} that are NaN or infinite",
            name,
            "finite numbers",
            "the file is damaged, or its quantizer failed: quantize the model again",
        )


def decode(
    layout: Layout, scheme: Scheme, stored: Mapping[str, Tensor], first_row: int = 0
) -> QuantizedWeight:
    """Read the stored tensors of one linear, or of a block of its output rows.

    Parameters
    ----------
    layout
        The layout the tensors are in.
    scheme
        The numbers of the linear; `out_features` is that of the block.
    stored
        Tensors by part name, of the shapes `layout.specs(scheme.sizes)` gives; what does not run
        over output rows is whole.
    first_row
        Where in the linear the block begins.

    Raises
    ------
    QplugError
        If a scale is not finite.
    """
    found: dict[Holds, Tensor] = {
        part.holds: unpack_part(part, stored[part.name], scheme.sizes)
        for part in layout
        if part.name in stored and part.holds is not Holds.CONSTANT
    }
    codes = found.pop(Holds.CODES)
    for part in layout:
        if part.holds in FACTORS and part.holds in found:
            check_scales(found[part.holds], part.name)
    return QuantizedWeight(codes, scheme.bits, _grid(scheme, found, first_row))


def _grid(scheme: Scheme, found: Mapping[Holds, Tensor], first_row: int) -> Grid:
    """Put together the grid of a scheme from what its parts hold."""
    if scheme.codebook is not None:
        return _codebook(scheme.codebook, scheme, found, first_row)
    scales = found[Holds.SCALES]
    if scheme.kind is Kind.ROWS:
        return RowGrid(scales.flatten())
    if scheme.kind is Kind.OFFSET:
        offsets = found[Holds.OFFSETS]
        return OffsetGrid(scales, offsets, scheme.group_size)
    g_idx = found.get(Holds.G_IDX) if scheme.act_order else None
    zeros = found.get(Holds.ZEROS)
    if zeros is None:
        zeros = implied(Holds.ZEROS, scheme).to(scales.device)
    return AffineGrid(scales, zeros, scheme.group_size, g_idx)


def implied(holds: Holds, scheme: Scheme) -> Tensor:
    """Return the numbers that a layout without a part for them means.

    Zeros are int16 `[out, groups]`, each the midpoint; `g_idx` is int32 `[in]`, groups in order.
    """
    if holds is Holds.ZEROS:
        shape = (scheme.out_features, scheme.groups)
        return torch.full(shape, scheme.midpoint, dtype=torch.int16)
    return torch.arange(scheme.in_features, dtype=torch.int32) // scheme.group_size


def _codebook(
    book: Codebook, scheme: Scheme, found: Mapping[Holds, Tensor], first_row: int
) -> CodebookGrid:
    """Put together a codebook grid; `first_row` begins a block."""
    absmax, nested = found[Holds.ABSMAX], None
    table = torch.frombuffer(bytearray(book.table), dtype=torch.float32).to(absmax.device)
    if book.nesting is not None:
        nested = NestedAbsmax(
            absmax,
            found[Holds.NESTED],
            torch.frombuffer(bytearray(book.nesting.table), dtype=torch.float32).to(absmax.device),
            book.nesting.offset,
            book.nesting.blocksize,
            getattr(torch, book.nesting.dtype),
            first_row * scheme.in_features // scheme.group_size,
        )
        absmax = nested.absmax()
        check_scales(absmax, "absmax, dequantized")
    return CodebookGrid(table, absmax, scheme.group_size, nested)


def encode(
    layout: Layout, weight: QuantizedWeight, out: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Write a linear, or a block of its output rows, as stored tensors.

    With `out`, tensors by part name (views of a larger file are welcome) are filled and returned.

    Raises
    ------
    QplugError
        If the layout cannot hold a zero, or a weight overflows the dtype asked for.
    """
    stored = {}
    for part in layout:
        into = None if out is None else out[part.name]
        if part.holds is Holds.WEIGHT:
            stored[part.name] = dequantize_to(weight, TORCH_DTYPES[part.dtype], into)
        elif part.holds is Holds.CONSTANT:
            value = constant(part)
            stored[part.name] = value if into is None else into.copy_(value)
        else:
            nested = layout.part(Holds.NESTED) is not None
            stored[part.name] = pack_part(part, _held(weight, part.holds, nested=nested), into)
    return stored


def constant(part: Part) -> Tensor:
    """Return the tensor of a part that is always the same."""
    raw = torch.frombuffer(bytearray(part.constant), dtype=torch.uint8)
    return raw.view(TORCH_DTYPES[part.dtype]).reshape(part.constant_shape)


def _held(weight: QuantizedWeight, holds: Holds, *, nested: bool = False) -> Tensor:
    """Return the numbers of a weight that a part holds; `nested` absmax as codes."""
    if holds is Holds.CODES:
        return weight.codes
    grid = weight.grid
    if isinstance(grid, AffineGrid) and holds is Holds.G_IDX:
        return grid.group_of_inputs(weight.in_features).to(torch.int32)
    if isinstance(grid, RowGrid) and holds is Holds.SCALES:
        return grid.absmax[:, None]
    if not isinstance(grid, CodebookGrid):
        found = getattr(grid, holds.value, None)
        if isinstance(found, Tensor):
            return found
        raise ValueError(f"a {type(grid).__name__} has no {holds.value}: it is on another grid")
    if holds is Holds.ABSMAX and not nested:
        return grid.absmax
    if grid.nested is None:
        raise ValueError("absmax values are not nested: the plan has no move that would do it")
    return grid.nested.codes if holds is Holds.ABSMAX else grid.nested.scales


def dequantize_to(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return `[out, in]`: the weight in float32, rounded once, in pieces that stay in the cache.

    Raises
    ------
    QplugError
        If a weight overflows `dtype`.
    """
    rows, inp = weight.codes.shape
    if out is None:
        out = torch.empty(rows, inp, dtype=dtype, device=weight.codes.device)
    step = max(1, (1 << 20) // max(1, inp))
    for at in range(0, rows, step):
        out[at : at + step] = round_to(weight.rows(at, at + step).dequantize(), dtype)
    return out


def round_to(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` rounded once to `dtype`; overflow is an error, never an infinity."""
    rounded = weight.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        largest = float(weight.abs().max())
        raise QplugError(
            f"a weight of {largest:g}",
            "the dequantized weights",
            f"values that {dtype} can hold",
            "use --dtype bfloat16 or float32",
        )
    return rounded
