"""How rows of one linear differ between two checkpoints, whatever their grids and layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import moves
from .errors import QplugError
from .weight import AffineGrid, OffsetGrid, QuantizedWeight, RowGrid

Rows = QuantizedWeight | Tensor
"""Output rows of a linear: quantized, or dense as they are stored."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How many weights differ and by how much; `rounded`: by no more than a rounding."""

    differing: int = 0
    largest: float = 0.0
    summed: float = 0.0
    rounded: bool = True

    def __add__(self, other: Difference) -> Difference:
        """Return the difference of both."""
        return Difference(
            self.differing + other.differing,
            max(self.largest, other.largest),
            self.summed + other.summed,
            self.rounded and other.rounded,
        )


SAME = Difference()


def compare(one: Rows, two: Rows) -> Difference:
    """Compare rows of `[out, in]`: codes and grids where both have affine ones, else weights."""
    if isinstance(one, QuantizedWeight) and isinstance(two, QuantizedWeight):
        if isinstance(one.grid, AffineGrid) and isinstance(two.grid, AffineGrid):
            unequal = _grids_differ(one, two)
            if unequal is None:
                return SAME
        else:
            unequal = one.dequantize() != two.dequantize()
            if not bool(unequal.any()):
                return SAME
        difference = (one.dequantize() - two.dequantize()).abs()
        rounded = _rounded(one, two)
    else:
        left, right = dense(one), dense(two)
        difference = (left.float() - right.float()).abs()
        unequal = difference != 0
        narrow = min(left.dtype, right.dtype, key=lambda d: d.itemsize)
        rounded = torch.equal(left.to(narrow), right.to(narrow))
    return Difference(
        int(unequal.sum()), float(difference.max()), float(difference.double().sum()), rounded
    )


def dense(rows: Rows) -> Tensor:
    """Return the weights, those of a quantized linear as float32."""
    return rows.dequantize() if isinstance(rows, QuantizedWeight) else rows


def _rounded(one: QuantizedWeight, two: QuantizedWeight) -> bool:
    """Whether codes and zeros are the same, and what differs is the rounding of a grid.

    Scales of one are those of the other, rounded to its dtype; offsets are rounded products of
    scales and the zeros that they give back; a row's absmax / 127 is rounded to a scale.
    """
    for first, second in ((one, two), (two, one)):
        if isinstance(first.grid, AffineGrid) or not isinstance(second.grid, AffineGrid):
            continue
        try:
            if isinstance(first.grid, OffsetGrid):
                return _scales_rounded(moves.to_zeros(first, "offsets"), second)
            if isinstance(first.grid, RowGrid):
                name = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
                stated = moves.to_channel(first, name[second.grid.scales.dtype])
                return _grids_differ(stated, second) is None
        except QplugError:  # zeros that are none, scales that overflow
            return False
    if not (isinstance(one.grid, AffineGrid) and isinstance(two.grid, AffineGrid)):
        return False
    return _scales_rounded(one, two)


def _scales_rounded(one: QuantizedWeight, two: QuantizedWeight) -> bool:
    """Whether `code - zero` is the same, and each scale of one is the other's in its dtype.

    Where the scales are 0, codes mean nothing, and offsets give no zeros back.
    """
    inp = one.in_features
    a, b = (w.affine.spread(w.affine.scales, inp) for w in (one, two))
    unequal = (one.integers() != two.integers()) & ((a != 0) | (b != 0))
    if bool(unequal.any()):
        return False
    return torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)


def _grids_differ(one: QuantizedWeight, two: QuantizedWeight) -> Tensor | None:
    """Return where `code - zero` or the bits of the scale differ, bool `[out, in]`, or `None`."""
    bits = [w.affine.scales.float().view(torch.int32) for w in (one, two)]
    if (one.affine.g_idx, two.affine.g_idx) == (None, None) and bits[0].shape == bits[1].shape:
        alike = one.affine.group_size == two.affine.group_size and torch.equal(*bits)
        if alike and torch.equal(one.affine.zeros, two.affine.zeros):
            if torch.equal(one.codes, two.codes):
                return None
        elif alike and torch.equal(one.integers(), two.integers()):
            return None
    inp = one.in_features
    scales = [w.affine.spread(b, inp) for w, b in zip((one, two), bits, strict=True)]
    unequal = (one.integers() != two.integers()) | (scales[0] != scales[1])
    return unequal if bool(unequal.any()) else None


def columns(rows: Rows, order: Tensor) -> Rows:
    """Return the columns of some rows in another order, or the first of them.

    The weights themselves, where the grid cannot say so.
    """
    if not isinstance(rows, QuantizedWeight):
        return rows.index_select(1, order)
    grid, count = rows.grid, len(order)
    first = torch.equal(order, torch.arange(count))
    if first and isinstance(grid, OffsetGrid) and count % grid.group_size == 0:
        kept = count // grid.group_size
        few = replace(grid, scales=grid.scales[:, :kept], offsets=grid.offsets[:, :kept])
        return replace(rows, codes=rows.codes[:, :count], grid=few)
    if not isinstance(grid, AffineGrid):
        return dense(rows).index_select(1, order)
    groups = grid.group_of_inputs(rows.in_features).index_select(0, order).to(torch.int32)
    return replace(
        rows,
        codes=rows.codes.index_select(1, order),
        grid=AffineGrid(grid.scales, grid.zeros, grid.group_size, groups),
    )
