"""Least-squares fits: codes, scales and zeros that approximate given weights best.

What a REQUANTIZED move writes where no exact one exists. Each group starts from the grid that
min/max (for codebooks and rows: absmax) quantizers take, and keeps the best of it, a dozen smaller
scales, the scales and zeros around the best, and what least squares then makes of it: the scale
and the whole zero that suit the codes, rounded as stored, new codes, again, until no group gains
(`least_squares.py`). Codes are always chosen against the scale as stored. No group's sum of
squared errors is above that of min/max.

Weights that already lie on a grid of integers (groups cut otherwise, or more bits than are in use)
come back exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .errors import QplugError
from .least_squares import (
    SMALLEST,
    Grid,
    Integers,
    Levels,
    Span,
    Table,
    add_up,
    descend,
    find_grid,
    largest_magnitude,
)
from .weight import INVERSE_127, AffineGrid, QuantizedWeight

_CHUNK = 1 << 17
"""Weights fitted at a time: three float32 copies stay in a level 2 cache of 2 MB."""

_FEWEST = 16
"""Groups fitted at a time at least: passes over fewer columns are mostly overhead."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Fit(Generic[Result]):
    """A fitted block of rows, and its errors, which add up over blocks.

    Attributes
    ----------
    result
        Codes and grid, as the function that made it says.
    sse : float
        Sum of squared errors, of the weights as dequantized in float32.
    sse_minmax : float
        The same, had min/max (absmax) chosen the grid; never below `sse`.
    sumsq : float
        Sum of squares of the weights.
    """

    result: Result
    sse: float
    sse_minmax: float
    sumsq: float


def errors(weight: Tensor, approx: Tensor) -> tuple[float, float]:
    """Return the sum of squares of `weight - approx`, and that of `weight`.

    Parameters
    ----------
    weight, approx
        float32, of one shape. Sums are float64, in an order that the shape alone decides.
    """
    one, other = weight.reshape(-1), approx.reshape(-1)
    error, squares = [], []
    for at in range(0, one.numel(), _CHUNK):
        part = one[at : at + _CHUNK, None]
        error.append(_squares(part - other[at : at + _CHUNK, None]).item())
        squares.append(_squares(part).item())
    return math.fsum(error), math.fsum(squares)


def fit_affine(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    scale_dtype: torch.dtype,
    zeros: Span,
) -> Fit[QuantizedWeight]:
    """Fit integer codes, a scale and a whole zero per group.

    Parameters
    ----------
    weight
        float32 `[rows, in_features]`.
    bits
        2 to 8.
    group_size
        Inputs per group; the last group may be short.
    sym
        Whether every zero is the midpoint (`zeros` then says nothing).
    scale_dtype
        float16, bfloat16 or float32. Scales are positive, at least 2^-24.
    zeros
        Lowest and highest zero the target can hold; 2^bits is never chosen.

    Returns
    -------
    Fit[QuantizedWeight]
        uint8 codes on an `AffineGrid` without `g_idx`. Min/max is what `qplug quantize` takes for
        round to nearest.

    Raises
    ------
    QplugError
        If a weight is not finite, or the scale of min/max overflows `scale_dtype`.
    """
    rows, inp = weight.shape
    top, groups = (1 << bits) - 1, -(-inp // group_size)
    middle = 1 << (bits - 1)
    span = (middle, middle) if sym else (zeros[0], min(zeros[1], top))
    levels = Integers(top)
    codes = torch.empty((rows, inp), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, groups), dtype=scale_dtype, device=weight.device)
    offsets = torch.empty((rows, groups), dtype=torch.int16, device=weight.device)
    sums = _Sums()
    for part in _parts(weight, group_size):
        start = _minmax(part.values, top, sym, span, scale_dtype)
        found = find_grid(part.values, start, levels, span, scale_dtype)
        scale, zero = sums.better(part.values, levels, start, found)
        part.put_weights(codes, levels.nearest(part.values, scale, zero).add_(zero))
        part.put_groups(scales, scale)
        part.put_groups(offsets, zero)
    return sums.fit(QuantizedWeight(codes, bits, AffineGrid(scales, offsets, group_size)))


def fit_rows(weight: Tensor) -> Fit[tuple[Tensor, Tensor]]:
    """Fit int8 codes and one absmax per row: LLM.int8's weights, w = q * SCB / 127.

    Parameters
    ----------
    weight
        float32 `[rows, in_features]`.

    Returns
    -------
    Fit[tuple[Tensor, Tensor]]
        uint8 `[rows, in_features]`, q + 128, q from -127 to 127 as bitsandbytes writes; float32
        `[rows]`, SCB, 0 for a row of zeros. Errors are those of `(q * SCB) * float32(1/127)`.

    Raises
    ------
    QplugError
        If a weight is not finite.
    """
    rows, inp = weight.shape
    levels = _RowIntegers()
    codes = torch.empty((rows, inp), dtype=torch.uint8, device=weight.device)
    stored = torch.empty((rows, 1), dtype=torch.float32, device=weight.device)
    sums = _Sums()
    for part in _parts(weight, inp):
        absmax = _absmax(part.values)
        zero = torch.full_like(absmax, 127)
        start = ((absmax / 127).clamp(min=SMALLEST), zero)
        step, _ = find_grid(part.values, start, levels, (127, 127), torch.float32)
        scale, _ = sums.better(part.values, levels, (absmax, zero), (step * 127, zero))
        part.put_weights(codes, levels.nearest(part.values, scale, zero).add_(128))
        part.put_groups(stored, scale)
    return sums.fit((codes, stored.view(-1)))


def fit_codebook(weight: Tensor, *, table: Tensor, blocksize: int) -> Fit[tuple[Tensor, Tensor]]:
    """Fit 4-bit codes of a table and one absmax per block: NF4 and FP4.

    Parameters
    ----------
    weight
        float32 `[rows, in_features]`, starting where a block starts; blocks run over the flat
        array, the last one may be short.
    table
        float32 `[16]`, values from -1 to 1. Codes are nearest to `w * (1 / absmax)`; on a tie the
        lower value or, in a table of sign and magnitude (FP4), the lower magnitude with the sign
        of w: bitsandbytes' CUDA kernels, except that those round their FP4 thresholds to six or
        seven digits.
    blocksize
        Weights per block.

    Returns
    -------
    Fit[tuple[Tensor, Tensor]]
        uint8 `[rows, in_features]` and float32 `[blocks]`, absmax, 0 for a block of zeros.

    Raises
    ------
    QplugError
        If a weight is not finite.
    """
    flat = weight.reshape(1, -1)
    levels = Table(table.to(weight.device))
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=weight.device)
    blocks = -(-flat.shape[1] // blocksize)
    stored = torch.empty((1, blocks), dtype=torch.float32, device=weight.device)
    sums = _Sums()
    for part in _parts(flat, blocksize):
        absmax = _absmax(part.values)
        zero = torch.zeros_like(absmax)
        start = (absmax.clamp(min=SMALLEST), zero)
        found = descend(part.values, start, levels, (0, 0), torch.float32)
        scale, _ = sums.better(part.values, levels, (absmax, zero), found)
        part.put_weights(codes, levels.codes(part.values, scale))
        part.put_groups(stored, scale)
    return sums.fit((codes.view(weight.shape), stored.view(-1)))


class _RowIntegers(Integers):
    """-127 to 127; the scale of `nearest` and `approximate` is SCB, 127 steps."""

    def __init__(self) -> None:
        super().__init__(254)

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return q; 0 where the scale is 0."""
        return super().nearest(values, torch.where(scale == 0, 1, scale / 127), zero)

    def approximate(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """See `Levels`."""
        return self.nearest(values, scale, zero).mul_(scale).mul_(INVERSE_127)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some groups of a weight: `values` is `[inputs of a group, groups]`."""

    values: Tensor
    rows: slice
    inputs: slice
    groups: slice

    def put_weights(self, target: Tensor, values: Tensor) -> None:
        """Store values like `self.values` into `[rows, in_features]`."""
        place = target[self.rows, self.inputs]
        place.copy_(values.to(target.dtype).t().reshape(place.shape))

    def put_groups(self, target: Tensor, values: Tensor) -> None:
        """Store one value per group into `[rows, groups]`."""
        place = target[self.rows, self.groups]
        place.copy_(values.view(place.shape))


def _parts(weight: Tensor, size: int) -> Iterator[_Part]:
    """Cut `[rows, in_features]` into groups of `size` inputs, short last ones apart."""
    rows, inp = weight.shape
    whole = inp // size
    for first, last, length in ((0, whole, size), (whole, whole + 1, inp - whole * size)):
        if first == last or not length:
            continue
        many = max(_FEWEST, _CHUNK // length)
        step = max(1, many // (last - first))
        for row in range(0, rows, step):
            for group in range(first, last, many):
                few, groups = (
                    slice(row, min(rows, row + step)),
                    slice(group, min(last, group + many)),
                )
                inputs = slice(group * size, group * size + (groups.stop - group) * length)
                values = weight[few, inputs].reshape(-1, length).t().contiguous()
                yield _Part(values, few, inputs, groups)


def _squares(values: Tensor) -> Tensor:
    """Return the float64 sums of squares of the columns."""
    wide = values.double()
    return add_up(wide.mul_(wide))


class _Sums:
    """Errors of all parts of a block of rows."""

    def __init__(self) -> None:
        self.best: list[float] = []
        self.minmax: list[float] = []
        self.squares: list[float] = []

    def better(self, values: Tensor, levels: Levels, start: Grid, found: Grid) -> Grid:
        """Return the better of two grids for each group, by the weights they dequantize to."""
        before = _squares(levels.approximate(values, *start).sub_(values))
        after = _squares(levels.approximate(values, *found).sub_(values))
        better = after < before
        self.best.append(add_up(torch.where(better, after, before)[:, None]).item())
        self.minmax.append(add_up(before[:, None]).item())
        self.squares.append(add_up(_squares(values)[:, None]).item())
        return torch.where(better, found[0], start[0]), torch.where(better, found[1], start[1])

    def fit(self, result: Result) -> Fit[Result]:
        """Return the result with the errors of everything that was compared."""
        return Fit(result, math.fsum(self.best), math.fsum(self.minmax), math.fsum(self.squares))


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise QplugError(
            "weights that are not finite", "weight", fix="the source is damaged: download it again"
        )
    return values


def _absmax(values: Tensor) -> Tensor:
    return _finite(largest_magnitude(values))


def _minmax(values: Tensor, top: int, sym: bool, span: Span, dtype: torch.dtype) -> Grid:
    """Return the grid of round to nearest of each column."""
    scale, zero = minmax_grid(values.amin(0), values.amax(0), top, sym, span, dtype)
    return scale.float(), zero


def minmax_grid(
    low: Tensor, high: Tensor, top: int, sym: bool, span: Span, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the grid of round to nearest, from each group's minimum and maximum.

    Zero is representable, and the scale grows where the zero has to stay in `span`; a symmetric
    grid uses the extra negative code half a step deep. Scales are rounded to the dtype they are
    stored in, upwards where it has few digits left.

    Parameters
    ----------
    low, high
        float32, the least and the largest weight of each group.
    top
        The largest code.
    sym
        Whether every zero is `span[0]`, the midpoint.
    span
        Lowest and highest zero the target can hold.
    dtype
        Of the stored scales.

    Returns
    -------
    tuple of Tensor
        Scales in `dtype`, at least 2^-24, and zeros float32, both in the shape of `low`.

    Raises
    ------
    QplugError
        If a weight is not finite, or a scale overflows `dtype`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    _finite(high - low)
    if sym:
        zero = torch.full_like(low, span[0])
        scale = torch.maximum(-low, high) / (span[0] - 0.5)
    else:
        spread = ((high - low) / top).clamp(min=SMALLEST)
        zero = (-low / spread).round().clamp(*span).clamp(max=top)
        scale = torch.maximum(-low / zero.clamp(min=1), high / (top - zero).clamp(min=1))
        scale = torch.where(zero == 0, high / top, scale)
        scale = torch.where(zero == top, -low / top, scale)
    scale = scale.clamp(min=SMALLEST)
    stored = scale.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise QplugError(
            f"a scale of {float(scale.max()):g}",
            "scales",
            expected=f"one that {str(dtype).removeprefix('torch.')} can hold",
            fix="weights this large are damaged: check the source",
        )
    if dtype is torch.float16:  # among subnormals rounding down could clamp by whole steps
        short = (stored.float() < scale) & (scale < torch.finfo(dtype).smallest_normal)
        stored = torch.where(short, (stored.view(torch.int16) + 1).view(dtype), stored)
    return stored, zero
