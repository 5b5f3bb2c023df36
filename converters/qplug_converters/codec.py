"""Encode and decode: the only code that turns stored tensors into codes and back.

The patterns of a `Part` say what a stored tensor means; `_literal` executes them word for word.
Patterns that mean "rows of words, perhaps transposed" run as whole words through `words`, and
must equal the literal execution bit for bit (a property test).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from . import bitstream, tiles, words, zeros
from .errors import QplugError
from .layout import Holds, Layout, Part, swapped
from .scheme import Scheme
from .weight import AffineGrid, QuantizedWeight

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
}
"""Patterns of codes that the whole-word routes know: are words, are codes transposed?"""


def _route(part: Part, in_features: int) -> tuple[bool, bool] | None:
    """Return how the whole-word routes run a packed part, or `None` if they do not know it.

    Rows of bytes are rows of words where they end on a word.
    """
    if part.holds is not Holds.CODES or part.packing is None:
        return None
    route = _ROUTES.get((part.stream, part.stored))
    if part.packing.word == "I32":
        return route
    whole = part.packing.word == "U8" and in_features * part.packing.bits % 32 == 0
    return route if whole and route == (False, False) else None


def _as_int32(stored: Tensor) -> Tensor:
    """View stored words as int32; bytes that lie across words are copied first."""
    if stored.dtype is torch.int32:
        return stored
    if stored.storage_offset() % 4 or stored.data_ptr() % 4 or not stored.is_contiguous():
        stored = stored.clone()
    return stored.view(torch.int32)


def unpack_part(part: Part, stored: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Return what a stored tensor holds, on canonical axes.

    Codes come as uint8 `[out, in]`, zeros as int16 `[out, groups]`, scales and weights in the
    stored dtype, `g_idx` as int32 `[in]`.
    """
    if part.packing is None:
        plain: Tensor = rearrange(stored, swapped(part.stream))
        return plain.contiguous()
    if (route := _route(part, sizes["inp"])) is not None:
        transposed, codes_transposed = route
        return words.unpack(
            _as_int32(stored.cpu()),
            part.packing.bits,
            sizes["out"] if codes_transposed else sizes["inp"],
            order=part.packing.order,
            transposed=transposed,
            codes_transposed=codes_transposed,
        ).to(stored.device)
    return _literal_unpack(part, stored, sizes).to(stored.device)


def _literal_unpack(part: Part, stored: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Execute the patterns of a packed part as they are written."""
    assert part.packing is not None
    raw = stored.cpu().numpy()
    rows = rearrange(raw, swapped(part.stored)) if part.stored else raw
    last = part.stream.split()[-1]
    if part.holds is Holds.ZEROS:
        found: np.ndarray = zeros.decode(rows, part.packing, sizes[last], part.rule)
    else:
        found = bitstream.unpack(rows, part.packing, sizes[last])
    return torch.from_numpy(np.ascontiguousarray(rearrange(found, swapped(part.stream))))


def pack_part(part: Part, values: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the stored tensor of a part, the inverse of `unpack_part`; written into `out`."""
    if part.packing is None:
        stored = rearrange(values, part.stream).to(TORCH_DTYPES[part.dtype])
    else:
        if part.holds is Holds.CODES and (route := _route(part, values.shape[1])) is not None:
            transposed, codes_transposed = route
            direct = part.packing.word == "I32"
            stored = words.pack(
                values.cpu(),
                part.packing.bits,
                order=part.packing.order,
                transposed=transposed,
                codes_transposed=codes_transposed,
                out=out if direct else None,
            ).view(TORCH_DTYPES[part.dtype])
            if direct and out is not None:
                return out
        else:
            stored = _literal_pack(part, values)
    return stored.contiguous() if out is None else out.copy_(stored)


def _literal_pack(part: Part, values: Tensor) -> Tensor:
    """Execute the patterns of a packed part as they are written."""
    assert part.packing is not None
    rows = rearrange(values.cpu().numpy(), part.stream)
    if part.holds is Holds.ZEROS:
        found = zeros.encode(rows, part.packing, part.rule)
    else:
        found = bitstream.pack(rows, part.packing)
    stored = rearrange(found, part.stored) if part.stored else found
    dtype = TORCH_DTYPES[part.dtype]
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.ascontiguousarray(stored).view(signed)).view(dtype)


def translate(
    source: Part, target: Part, stored: Tensor, sizes: Mapping[str, int], out: Tensor | None = None
) -> Tensor:
    """Bring one stored tensor from one part's form into another's that holds the same numbers.

    4-bit codes packed along `inp` in one and along `out` in the other go from words to words
    without being unpacked (docs/adr/0002).
    """
    if source.holds is Holds.CODES and (route := _direct(source, target)) is not None:
        transposed, order = route
        return tiles.transpose_nibbles(stored, transposed=transposed, order=order, out=out)
    return pack_part(target, unpack_part(source, stored, sizes), out)


_NIBBLES = (4, 4, "I32", "I32")


def _direct(source: Part, target: Part) -> tuple[bool, tuple[int, ...]] | None:
    """Recognise from two parts that only the packed axis of 4-bit codes changes."""
    routes = (_route(source, 0), _route(target, 0))
    one, two = source.packing, target.packing
    if one is None or two is None or (one.bits, two.bits, one.word, two.word) != _NIBBLES:
        return None
    if routes == ((True, False), (False, True)) and not one.order:
        return True, two.order
    if routes == ((False, True), (True, False)) and not two.order:
        return False, one.order
    return None


def check_scales(scales: Tensor) -> None:
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
            f"{bad} scales that are NaN or infinite",
            "scales",
            "finite numbers",
            "the file is damaged, or its quantizer failed: quantize the model again",
        )


def decode(layout: Layout, scheme: Scheme, stored: Mapping[str, Tensor]) -> QuantizedWeight:
    """Read the stored tensors of one linear, or of a block of its output rows.

    Parameters
    ----------
    layout
        The layout the tensors are in.
    scheme
        The numbers of the linear; `out_features` is that of the block.
    stored
        Tensors by part name, of the shapes `layout.specs(scheme.sizes)` gives.

    Raises
    ------
    QplugError
        If a scale is not finite.
    """
    found = {
        part.holds: unpack_part(part, stored[part.name], scheme.sizes)
        for part in layout
        if part.name in stored
    }
    scales = found[Holds.SCALES]
    check_scales(scales)
    g_idx = found.get(Holds.G_IDX) if scheme.act_order else None
    grid = AffineGrid(scales, found[Holds.ZEROS], scheme.group_size, g_idx)
    return QuantizedWeight(found[Holds.CODES], scheme.bits, grid)


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
        if part.holds is Holds.CODES:
            values = weight.codes
        elif part.holds is Holds.ZEROS:
            values = weight.grid.zeros
        elif part.holds is Holds.SCALES:
            values = weight.grid.scales
        elif part.holds is Holds.G_IDX:
            values = weight.grid.group_of_inputs(weight.in_features).to(torch.int32)
        else:
            stored[part.name] = dequantize_to(
                weight, TORCH_DTYPES[part.dtype], None if out is None else out[part.name]
            )
            continue
        stored[part.name] = pack_part(part, values, None if out is None else out[part.name])
    return stored


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
