"""New codes for a linear whose weights lie on no grid of the target, and what that costs.

The grid is fitted by least squares (`fit`); its error is measured on the weights as the target
stores them, beside what a grid from the least and largest weight would have cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from . import moves
from .codec import TORCH_DTYPES
from .fit import errors, fit_affine, fit_codebook, fit_rows
from .scheme import Kind, Scheme
from .verdict import Move
from .weight import CodebookGrid, QuantizedWeight, RowGrid


@dataclass(frozen=True, slots=True)
class Cost:
    """Sums of squares over weights: of the errors, of those of min/max grids, of the weights."""

    error: float = 0.0
    minmax: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both."""
        return Cost(
            self.error + other.error, self.minmax + other.minmax, self.weights + other.weights
        )

    @property
    def relative(self) -> tuple[float, float]:
        """Relative Frobenius errors: of the fitted grid, and of min/max."""
        if self.weights == 0:
            return 0.0, 0.0
        return sqrt(self.error / self.weights), sqrt(self.minmax / self.weights)


def refit(
    goal: Scheme, after: tuple[Move, ...], zeros: tuple[int, int], weight: QuantizedWeight
) -> tuple[QuantizedWeight, Cost]:
    """Choose codes and a grid of `goal` for rows of a linear.

    Parameters
    ----------
    goal
        What the target holds (`route.refitted`).
    after
        Moves from the fitted grid to the target's.
    zeros
        Lowest and highest zero that the target holds.
    weight
        Rows as the source holds them, in blocks that start at a block of the target.

    Raises
    ------
    QplugError
        If a weight is not finite, or no scale of the target's dtype is large enough.
    """
    dense = weight.dequantize()
    if goal.codebook is not None:
        table = torch.frombuffer(bytearray(goal.codebook.table), dtype=torch.float32)
        book = fit_codebook(dense, table=table, blocksize=goal.group_size)
        codes, absmax = book.result
        made = QuantizedWeight(codes, goal.bits, CodebookGrid(table, absmax, goal.group_size))
        return made, Cost(book.sse, book.sse_minmax, book.sumsq)
    if goal.kind is Kind.ROWS:
        rows = fit_rows(dense)
        codes, scb = rows.result
        made = QuantizedWeight(codes, goal.bits, RowGrid(scb))
        return made, Cost(rows.sse, rows.sse_minmax, rows.sumsq)
    fitted = fit_affine(
        dense,
        bits=goal.bits,
        group_size=goal.group_size,
        sym=bool(goal.sym),
        scale_dtype=TORCH_DTYPES[goal.scale_dtype],
        zeros=zeros,
    )
    made = moves.apply(after, fitted.result)
    error = errors(dense, made.dequantize())[0] if after else fitted.sse
    return made, Cost(error, fitted.sse_minmax, fitted.sumsq)
