"""Exact changes of a `QuantizedWeight`: other codes or another grid, the same weights.

Each move keeps `code - zero` and the scale of every weight, so `dequantize()` is bit-equal before
and after. Identifiers in brackets are those of docs and certificates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .errors import QplugError
from .plan import Move
from .weight import AffineGrid, QuantizedWeight


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
    grid, inp = weight.affine, weight.in_features
    fits = grid.g_idx is None and (grid.group_size % group_size == 0 or grid.group_size >= inp)
    _require(fits, f"groups of {grid.group_size} in groups of {group_size}")
    firsts = torch.arange(0, inp, group_size, device=weight.codes.device) // grid.group_size
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


MOVES: dict[str, Callable[..., QuantizedWeight]] = {
    "widen": widen,
    "symmetrize": symmetrize,
    "split_groups": split_groups,
    "cast_scales": cast_scales,
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
