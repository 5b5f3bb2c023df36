"""Changes of a `QuantizedWeight`: other codes or another grid, the same weights.

Each move keeps `code - zero` and the scale of every weight, so `dequantize()` is bit-equal before
and after; those that round (`cast_scales`, `to_offsets`, `to_zeros`, `to_channel`) say so, and a
plan says when they do. Identifiers in brackets are those of docs and certificates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .errors import QplugError
from .verdict import Move
from .weight import AffineGrid, CodebookGrid, OffsetGrid, QuantizedWeight, RowGrid


def widen(weight: QuantizedWeight, bits: int) -> QuantizedWeight:
    """Allow more bits to the same codes and zeros [X1].

    Every zero that `bits` - 1 or fewer bits can hold fits, 2^old included.
    """
    _require(bits >= weight.bits, f"{weight.bits}-bit codes in {bits} bits")
    return replace(weight, bits=bits)


def symmetrize(weight: QuantizedWeight, bits: int) -> QuantizedWeight:
    """Shift codes so that every zero is the midpoint of `bits` [X1s, X4].

    code' = code - zero + 2^(bits-1). From 2 or 3 bits to 4, and from 4 to 8, code - zero always
    fits: it is at least -2^old and at most 2^old - 1.
    """
    shifted = weight.integers().add_(1 << (bits - 1))
    low, high = int(shifted.min()), int(shifted.max())
    _require(low >= 0 and high < 1 << bits, f"codes from {low} to {high} in {bits} bits")
    grid = weight.affine
    zeros = torch.full_like(grid.zeros, 1 << (bits - 1))
    grid = AffineGrid(grid.scales, zeros, grid.group_size, grid.g_idx)
    return QuantizedWeight(shifted.to(torch.uint8), bits, grid)


def split_groups(weight: QuantizedWeight, group_size: int) -> QuantizedWeight:
    """Repeat scales and zeros so that groups have `group_size` inputs [X2].

    `group_size` divides the old group size, or in_features where there is one group; a short last
    group becomes whole when it divides that too.
    """
    grid, inp = weight.grid, weight.in_features
    if not isinstance(grid, OffsetGrid):
        grid = weight.affine
    ordered = isinstance(grid, OffsetGrid) or grid.g_idx is None
    fits = ordered and (grid.group_size % group_size == 0 or grid.group_size >= inp)
    _require(fits, f"groups of {grid.group_size} in groups of {group_size}")
    firsts = torch.arange(0, inp, group_size, device=weight.codes.device) // grid.group_size
    if isinstance(grid, OffsetGrid):
        scales, offsets = (t.index_select(1, firsts) for t in (grid.scales, grid.offsets))
        return replace(weight, grid=OffsetGrid(scales, offsets, group_size))
    grid = AffineGrid(
        grid.scales.index_select(1, firsts), grid.zeros.index_select(1, firsts), group_size
    )
    return replace(weight, grid=grid)


def cast_scales(weight: QuantizedWeight, dtype: str) -> QuantizedWeight:
    """Change the dtype of the scales; exact where the plan found that every scale fits [X6]."""
    from .codec import TORCH_DTYPES

    grid = weight.affine
    scales = grid.scales.to(TORCH_DTYPES[dtype])
    _require(bool(torch.isfinite(scales).all()), f"scales in {dtype}")
    return replace(weight, grid=AffineGrid(scales, grid.zeros, grid.group_size, grid.g_idx))


def shift_zeros(weight: QuantizedWeight, span: str) -> QuantizedWeight:
    """Shift codes and zeros of each group alike, so that zeros lie in `span` (`1..15`) [X4]."""
    low, high = map(int, span.split(".."))
    grid = weight.affine
    zeros = grid.zeros.clamp(low, high)
    codes = grid.combine(weight.codes.to(torch.int16), torch.Tensor.add_, zeros - grid.zeros)
    lowest, highest = int(codes.min()), int(codes.max())
    fits = lowest >= 0 and highest < 1 << weight.bits
    _require(fits, f"codes from {lowest} to {highest} in {weight.bits} bits")
    grid = AffineGrid(grid.scales, zeros, grid.group_size, grid.g_idx)
    return QuantizedWeight(codes.to(torch.uint8), weight.bits, grid)


def room_to_shift(weight: QuantizedWeight, low: int, high: int) -> bool:
    """Whether `shift_zeros` to `low..high` keeps every code within its bits."""
    grid = weight.affine
    shift = grid.zeros.clamp(low, high) - grid.zeros
    if not bool(shift.any()):
        return True
    codes = grid.combine(weight.codes.to(torch.int16), torch.Tensor.add_, shift)
    return int(codes.min()) >= 0 and int(codes.max()) < 1 << weight.bits


def sort_columns(weight: QuantizedWeight, by: str) -> QuantizedWeight:
    """Put the columns in the order of their groups; the inputs then come in that order [X5b]."""
    grid = weight.affine
    if grid.g_idx is None:
        return weight
    codes = weight.codes.index_select(1, column_order(grid.g_idx))
    return replace(weight, codes=codes, grid=AffineGrid(grid.scales, grid.zeros, grid.group_size))


def pad_columns(weight: QuantizedWeight, in_features: int) -> QuantizedWeight:
    """Add inputs whose weights are 0, so that there are `in_features` [X9].

    A short last group is filled up; new groups have the midpoint as zero and a scale of 1.
    """
    grid, inp, mid = weight.affine, weight.in_features, 1 << (weight.bits - 1)
    _require(grid.g_idx is None and in_features >= inp, f"{inp} inputs in {in_features}")
    groups = -(-in_features // grid.group_size) - grid.scales.shape[1]
    pad = torch.nn.functional.pad
    zeros = pad(grid.zeros, (0, groups), value=mid)
    grid = AffineGrid(pad(grid.scales, (0, groups), value=1.0), zeros, grid.group_size)
    codes = grid.spread(zeros, in_features)
    _require(int(codes[:, inp:].max()) < 1 << weight.bits, f"zeros of {1 << weight.bits} as codes")
    codes = torch.cat([weight.codes, codes[:, inp:].to(torch.uint8)], 1)
    return QuantizedWeight(codes, weight.bits, grid)


def pad_rows(weight: QuantizedWeight, rows: int) -> QuantizedWeight:
    """Add `rows` outputs whose weights are 0 [X9]."""
    grid, mid = weight.affine, 1 << (weight.bits - 1)
    pad = torch.nn.functional.pad
    scales = pad(grid.scales, (0, 0, 0, rows), value=1.0)
    zeros = pad(grid.zeros, (0, 0, 0, rows), value=mid)
    codes = pad(weight.codes, (0, 0, 0, rows), value=mid)
    return QuantizedWeight(
        codes, weight.bits, AffineGrid(scales, zeros, grid.group_size, grid.g_idx)
    )


def column_order(g_idx: torch.Tensor) -> torch.Tensor:
    """Return int64 `[in_features]`: which column comes n-th when sorted by group, stably."""
    return torch.argsort(g_idx.long(), stable=True)


def to_offsets(weight: QuantizedWeight, dtype: str) -> QuantizedWeight:
    """Store -scale * zero instead of the zero, rounded once to `dtype` (AWQ GEMV_FAST)."""
    from .codec import TORCH_DTYPES

    grid = weight.affine
    offsets = (-(grid.scales.float() * grid.zeros)).to(TORCH_DTYPES[dtype])
    if not bool(torch.isfinite(offsets).all()):
        raise QplugError(
            f"scales times zeros that overflow {dtype}",
            expected="offsets that are numbers",
            fix="choose a target that stores zeros",
        )
    return replace(weight, grid=OffsetGrid(grid.scales, offsets, grid.group_size))


def to_zeros(weight: QuantizedWeight, source: str) -> QuantizedWeight:
    """Recover integer zeros from offsets: rint(-offset / scale)."""
    grid = weight.grid
    assert isinstance(grid, OffsetGrid)
    scales, offsets = grid.scales.float(), grid.offsets.float()
    found = torch.where(scales == 0, torch.zeros_like(scales), torch.round(-offsets / scales))
    low, high = float(found.min()), float(found.max())
    top = 1 << weight.bits
    _require(0 <= low <= high <= top, f"zeros from {low:g} to {high:g} in 0 to {top}")
    grid = AffineGrid(grid.scales, found.to(torch.int16), grid.group_size)
    return replace(weight, grid=grid)


def to_channel(weight: QuantizedWeight, dtype: str) -> QuantizedWeight:
    """State LLM.int8 as 8-bit codes with one scale a row, absmax / 127 rounded to `dtype`."""
    from .codec import TORCH_DTYPES

    grid = weight.grid
    assert isinstance(grid, RowGrid)
    exact = grid.absmax.double() / 127
    scales = exact.to(TORCH_DTYPES[dtype])[:, None]
    if not bool(torch.isfinite(scales).all()):
        raise QplugError(
            f"absmax / 127 that overflow {dtype}",
            expected="scales that are numbers",
            fix="choose a target that holds float32 scales",
        )
    zeros = torch.full(scales.shape, 128, dtype=torch.int16)
    return replace(weight, grid=AffineGrid(scales, zeros, weight.in_features))


def unnest(weight: QuantizedWeight, what: str) -> QuantizedWeight:
    """Store absmax itself instead of its own codes [X7]."""
    grid = weight.grid
    assert isinstance(grid, CodebookGrid)
    return replace(weight, grid=replace(grid, nested=None))


def split_blocks(weight: QuantizedWeight, blocksize: int) -> QuantizedWeight:
    """Repeat absmax so that blocks have `blocksize` weights [X8]."""
    grid = weight.grid
    assert isinstance(grid, CodebookGrid)
    times, rest = divmod(grid.blocksize, blocksize)
    _require(rest == 0 and grid.skip == 0, f"blocks of {grid.blocksize} in blocks of {blocksize}")
    blocks = -(-weight.codes.numel() // blocksize)
    absmax = grid.absmax.repeat_interleave(times)[:blocks]
    return replace(weight, grid=CodebookGrid(grid.table, absmax, blocksize))


MOVES: dict[str, Callable[..., QuantizedWeight]] = {
    "widen": widen,
    "symmetrize": symmetrize,
    "shift_zeros": shift_zeros,
    "split_groups": split_groups,
    "cast_scales": cast_scales,
    "sort_columns": sort_columns,
    "pad_columns": pad_columns,
    "to_offsets": to_offsets,
    "to_zeros": to_zeros,
    "to_channel": to_channel,
    "unnest": unnest,
    "split_blocks": split_blocks,
}
"""Every move by the name a plan calls it."""


def apply(moves: tuple[Move, ...], weight: QuantizedWeight) -> QuantizedWeight:
    """Apply the moves of a plan in order."""
    for move in moves:
        argument: Any = move.argument
        weight = MOVES[move.name](weight, argument)
    return weight


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise QplugError(f"{what} do not fit", fix="this is a bug of the plan: please report it")
