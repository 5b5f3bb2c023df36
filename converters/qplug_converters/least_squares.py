"""The search for the grid of least squared error, for groups that lie in columns.

Tensors of weights are float32 `[inputs of a group, groups]`, so that every pass is one elementwise
operation over contiguous memory, and sums are halvings: what a group gets depends on nothing but
the group, neither on its neighbours in a block nor on threads or the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SMALLEST = 2.0**-24
"""The smallest positive float16, and the lowest scale: groups of zeros have this one."""

Grid = tuple[Tensor, Tensor]
"""Scale and zero of each group, float32 `[groups]`; the zero is whole."""

Span = tuple[int, int]
"""Lowest and highest zero allowed; equal where the zero is fixed."""

_COARSE = 12
"""Scales tried first, from 1.08 times that of min/max down in steps of `shrink`^2."""

_ROUNDS = 64
"""Bound on rounds of least squares. Each lowers the error; most groups stop after three, rows of
4096 weights in one group after up to 30."""

_BATCH = 8
"""Scales tried at a time when looking for a known grid: bounds the memory."""

_NEAR = 2.0**-10
"""Of a step: far above rounding (2^-15 at 8 bits), far below chance for eight weights."""


def add_up(values: Tensor) -> Tensor:
    """Add up the second last axis by halving, in place: the same order for every column."""
    count = values.shape[-2]
    while count > 1:
        half = (count + 1) // 2
        values[..., : count - half, :] += values[..., half:count, :]
        count = half
    return values[..., 0, :]


def largest_magnitude(values: Tensor) -> Tensor:
    """Return max|w| of each group."""
    return torch.maximum(values.amax(0), -values.amin(0))


class Levels(Protocol):
    """What a grid of scale 1 can hold."""

    shrink: float
    """Ratio of two neighbouring scales of the search."""

    def snap(self, steps: Tensor, zero: Tensor, out: Tensor) -> None:
        """Write to `out` a level near each of `steps`, the nearest or next to it."""

    def approximate(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weights that the nearest codes stand for, as readers compute them."""


class Integers:
    """The integers from -zero to top - zero."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.shrink = 0.95 if top < 16 else 0.97 if top < 128 else 0.99

    def snap(self, steps: Tensor, zero: Tensor, out: Tensor) -> None:
        """See `Levels`."""
        torch.round(steps, out=out)
        torch.clamp(out, -zero, self.top - zero, out=out)

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return code - zero: divided, not multiplied by an inverse, as quantizers do."""
        steps = (values / scale).round_()
        return torch.clamp(steps, -zero, self.top - zero, out=steps)

    def approximate(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """See `Levels`."""
        return self.nearest(values, scale, zero).mul_(scale)


class Table:
    """Sixteen values from -1 to 1, by code."""

    shrink = 0.95
    _FINE = 1023

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.signed = torch.equal(table[8:], -table[:8])
        values, order = (table[:8] if self.signed else table).sort()
        self.order = order.to(torch.uint8)
        self.middles = (values[1:] + values[:-1]) / 2
        fine = torch.arange(-self._FINE, self._FINE + 1, device=table.device) / self._FINE
        self.near = table[self._codes(fine).int()]
        """The values nearest to 2047 places from -1 to 1."""

    def snap(self, steps: Tensor, zero: Tensor, out: Tensor) -> None:
        """See `Levels`; looked up in a finer table, which is faster than comparing."""
        place = torch.clamp(steps, -1, 1).mul_(self._FINE).add_(self._FINE + 0.5).int()
        torch.index_select(self.near, 0, place.view(-1), out=out.view(-1))

    def codes(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the nearest codes, uint8."""
        few = scale < torch.finfo(scale.dtype).tiny  # no inverse: blocks of zeros, and subnormals
        return self._codes(values * torch.where(few, 0, scale.reciprocal()))

    def _codes(self, steps: Tensor) -> Tensor:
        place = torch.bucketize(steps.abs() if self.signed else steps, self.middles, out_int32=True)
        codes = self.order[place]
        return codes.add_((steps < 0).to(torch.uint8) * 8) if self.signed else codes

    def approximate(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """See `Levels`."""
        return self.table[self.codes(values, scale).int()].mul_(scale)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 scales as `dtype` will hold them, within its range."""
    return scales.clamp(SMALLEST, torch.finfo(dtype).max).to(dtype).float()


def find_grid(
    values: Tensor, start: Grid, levels: Integers, span: Span, dtype: torch.dtype
) -> Grid:
    """Return a grid of integers for each group: the one it lies on, or else the best found.

    Parameters
    ----------
    values
        float32 `[inputs of a group, groups]`.
    start
        The grid of min/max, from whose scale the search starts.
    levels, span
        Integers and zeros that the target can hold.
    dtype
        The scales' dtype as stored.
    """
    known, scale, zero = _recognise(values, start, levels, span, dtype)
    rest = (~known).nonzero().view(-1)
    if len(rest) == len(known):
        return descend(values, start, levels, span, dtype)
    if len(rest):
        few = (start[0][rest], start[1][rest])
        scale[rest], zero[rest] = descend(values[:, rest], few, levels, span, dtype)
    return scale, zero


def _recognise(
    values: Tensor, start: Grid, levels: Integers, span: Span, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Find groups that lie on a grid: which they are, their scales and zeros.

    The largest magnitude is then 1, 2, … steps. Eight weights of a group rule out nearly all of
    these scales, the whole group decides.
    """
    largest = largest_magnitude(values)
    scale, zero = start[0].clone(), start[1].clone()
    known = torch.zeros_like(largest, dtype=torch.bool)
    most = max(span[1], levels.top - span[0])
    sample = values[:: max(1, len(values) // 8)][:8]
    for first in range(1, most + 1, _BATCH):
        steps = torch.arange(first, min(most + 1, first + _BATCH), device=values.device)
        scales = _stored(largest / steps[:, None], dtype)
        places = sample / scales[:, None]
        near = places.sub_(places.round()).abs_().amax(1) < _NEAR
        near &= (largest > 0) & ~known
        for at in near.any(1).nonzero().view(-1).tolist():
            few = (near[at] & ~known).nonzero().view(-1)
            fits, one, other = _lies_on(values[:, few], scales[at, few], levels.top, span, dtype)
            few = few[fits]
            known[few], scale[few], zero[few] = True, one[fits], other[fits]
    return known, scale, zero


def _lies_on(
    values: Tensor, scale: Tensor, top: int, span: Span, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Say which groups lie on their scale, the scale to the last bit, and the zero."""
    steps = (values / scale).round_()
    low, high = steps.amin(0), steps.amax(0)
    zero = (-low).clamp(*span)
    fits = (low >= -zero) & (high <= top - zero)
    candidates = [scale]
    if dtype is torch.float32:  # the largest weight was itself rounded
        candidates += [torch.nextafter(scale, torch.full_like(scale, to)) for to in (0, math.inf)]
    best = torch.full_like(scale, math.inf)
    for candidate in candidates:
        error = (steps * candidate).sub_(values).abs_().amax(0)
        scale = torch.where(error < best, candidate, scale)
        best = torch.minimum(error, best)
    return fits & (best <= 2.0**-22 * largest_magnitude(values)), scale, zero


def descend(values: Tensor, start: Grid, levels: Levels, span: Span, dtype: torch.dtype) -> Grid:
    """Return the grid of least error that is found from `start`; parameters as in `find_grid`.

    Scales come first, coarsely, then those around the best and the zeros next to it, then least
    squares. Starting at several scales matters: least squares from min/max alone stops at two
    thirds of the gain at 4 bits.
    """
    best = Best(values, start, levels)
    for power in range(_COARSE):
        best.offer(_stored(start[0] * (1.08 * levels.shrink ** (2 * power)), dtype), start[1])
    scale, zero = best.scale, best.zero
    for part in (-1.0, -0.5, 0.5, 1.0):
        best.offer(_stored(scale * levels.shrink**part, dtype), zero)
    if span[0] != span[1]:
        for power in (-1, 0, 1):
            nearby = _stored(scale * levels.shrink**power, dtype)
            for shift in (-1, 1):
                best.offer(nearby, (zero + shift).clamp(*span))
    best.refine(span, dtype)
    return best.scale, best.zero


class Best:
    """The best grid so far of each group, and its error in squares of the first scale."""

    def __init__(self, values: Tensor, start: Grid, levels: Levels) -> None:
        self.values, self.levels = values, levels
        self.scale, self.zero = start
        self.unit = start[0].reciprocal()
        self.steps, self.near = torch.empty_like(values), torch.empty_like(values)
        self.error = torch.full_like(self.scale, math.inf)
        self.offer(*start)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take the grid where it is better."""
        torch.mul(self.values, scale.reciprocal(), out=self.steps)
        self.levels.snap(self.steps, zero, self.near)
        self.steps -= self.near
        self.steps *= self.steps
        error = add_up(self.steps) * (scale * self.unit).square_()
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def refine(self, span: Span, dtype: torch.dtype) -> None:
        """Alternate least squares and new codes until no group gains."""
        del self.steps, self.near
        live = torch.arange(len(self.unit), device=self.values.device)
        groups = _Moments(self.values, add_up(self.values.clone()), add_up(self.values.square()))
        room = torch.empty(3 * self.values.numel(), device=live.device)
        _, *grid = groups.regress((self.scale, self.zero.clone()), self.levels, span, dtype, room)
        for _ in range(_ROUNDS):
            scale, zero = grid
            error, *grid = groups.regress((scale, zero), self.levels, span, dtype, room)
            error *= (scale * self.unit[live]).square_()
            better = (error < self.error[live]).nonzero().view(-1)
            if not len(better):
                return
            if len(better) < len(live):
                live, groups = live[better], groups.some(better)
                error, scale, zero = error[better], scale[better], zero[better]
                grid = [each[better] for each in grid]
            self.error[live], self.scale[live], self.zero[live] = error, scale, zero


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Groups, their sums and their sums of squares."""

    values: Tensor
    total: Tensor
    squares: Tensor

    def some(self, which: Tensor) -> _Moments:
        """Return the groups of these indices."""
        return _Moments(self.values.index_select(1, which), self.total[which], self.squares[which])

    def regress(
        self, grid: Grid, levels: Levels, span: Span, dtype: torch.dtype, room: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the errors of grids, in squared steps; scales and zeros best for their codes.

        With w = scale (c + r), c the level and r the rest, w is regressed on c: its intercept
        moves the zero by d whole steps, and the new scale is that of w regressed on c - d alone.
        `room` is scratch for three times the values.
        """
        (scale, zero), count = grid, len(self.values)
        inverse = scale.reciprocal()
        sums = room[: 3 * self.values.numel()].view(3, *self.values.shape)
        rest, near = sums[0], sums[1]
        torch.mul(self.values, inverse, out=rest)
        levels.snap(rest, zero, near)
        rest -= near
        near *= rest
        torch.mul(rest, rest, out=sums[2])
        if span[0] == span[1]:
            rc, rr = add_up(sums[1:])
            cc = self.squares * inverse.square() - 2 * rc - rr
        else:
            r, rc, rr = add_up(sums)
            c = self.total * inverse - r
            cc = self.squares * inverse.square() - 2 * rc - rr
            slope = 1 + (rc - r * c / count) / (cc - c * c / count)
            shift = torch.nan_to_num((c - (r + c) / slope) / count).round_()
            shift = (zero + shift).clamp_(*span) - zero
            zero = zero + shift
            rc = rc + shift * (c - r - shift * count)
            cc = cc - shift * (2 * c - shift * count)
        return rr.clone(), _stored(torch.nan_to_num(scale * (1 + rc / cc)), dtype), zero
