"""Linears of a fused layer as few as possible, row upon row: what one grid can hold is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qplug_converters.weight import (
    AffineGrid,
    CodebookGrid,
    Grid,
    OffsetGrid,
    QuantizedWeight,
    RowGrid,
)


def stacked(weights: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
    """Return the weights, neighbours joined where one grid holds both.

    Those of q, k and v are one as a rule; other codebooks, group sizes or orders of columns (act
    order differs where the calibration saw other inputs) stay apart.
    """
    found = [weights[0]]
    for weight in weights[1:]:
        grid = _joined(found[-1], weight)
        if grid is None:
            found.append(weight)
        else:
            codes = torch.cat((found[-1].codes, weight.codes))
            found[-1] = QuantizedWeight(codes, weight.bits, grid)
    return found


def _joined(one: QuantizedWeight, two: QuantizedWeight) -> Grid | None:
    """Return the grid of both weights, or `None` if there is none."""
    a, b = one.grid, two.grid
    if one.bits != two.bits or one.in_features != two.in_features:
        return None
    if isinstance(a, AffineGrid) and isinstance(b, AffineGrid):
        order = a.g_idx is None and b.g_idx is None
        if a.g_idx is not None and b.g_idx is not None:
            order = torch.equal(a.g_idx, b.g_idx)
        if not order or a.group_size != b.group_size or a.scales.dtype is not b.scales.dtype:
            return None
        scales, zeros = torch.cat((a.scales, b.scales)), torch.cat((a.zeros, b.zeros))
        return AffineGrid(scales, zeros, a.group_size, a.g_idx)
    if isinstance(a, OffsetGrid) and isinstance(b, OffsetGrid):
        if a.group_size != b.group_size or a.scales.dtype is not b.scales.dtype:
            return None
        scales, offsets = torch.cat((a.scales, b.scales)), torch.cat((a.offsets, b.offsets))
        return OffsetGrid(scales, offsets, a.group_size)
    if isinstance(a, RowGrid) and isinstance(b, RowGrid):
        return RowGrid(torch.cat((a.absmax, b.absmax)))
    if isinstance(a, CodebookGrid) and isinstance(b, CodebookGrid):
        # Blocks run along the rows laid end to end: the first weight must end with a whole one.
        whole = a.skip == b.skip == 0 and one.codes.numel() % a.blocksize == 0
        if not whole or a.blocksize != b.blocksize or not torch.equal(a.table, b.table):
            return None
        return CodebookGrid(a.table, torch.cat((a.absmax.float(), b.absmax.float())), a.blocksize)
    return None
