"""The definition of every kernel: dequantize and multiply in float64, each time, slowly.

    tensor    shape        dtype     meaning
    codes     [N, K]       uint8     0 to 2^bits - 1
    levels    [2^bits]     float64   what a code counts: itself, code - 128, or a table's entry
    scales    [S]          float64   exact
    offsets   [S]          float64   what the scaled level is added to, such as -zero * scale
    at        [N, K]       int32     the scale and offset of each weight
    result    [M, N]       as x      fl(sum over k of x * w) + bias

w = levels[code] * scales[at] + offsets[at], for every kind of grid and exact: products and sums of
what files hold have no more than 53 bits (but for absmax / 127).

Never chosen by itself; `QPLUG_KERNEL=reference` asks for it, to see whether a wrong answer comes
from a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug_converters.weight import (
    AffineGrid,
    OffsetGrid,
    QuantizedWeight,
    RowGrid,
)

from .problem import Kernel, Problem


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    if not problem.dtype.is_floating_point:
        return f"activations are {problem.dtype_name}, which is no floating dtype"
    return None


def prepare(weight: QuantizedWeight, problem: Problem) -> dict[str, Tensor]:
    """Return the operands of the table."""
    grid, codes = weight.grid, weight.codes
    rows, columns = codes.shape
    device = codes.device
    levels = torch.arange(1 << weight.bits, dtype=torch.float64, device=device)
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    if isinstance(grid, AffineGrid):
        scales = grid.scales.double()
        offsets = -grid.zeros.double() * scales
        at = row * scales.shape[1] + grid.group_of_inputs(columns)
    elif isinstance(grid, OffsetGrid):
        scales, offsets = grid.scales.double(), grid.offsets.double()
        at = row * scales.shape[1] + column // grid.group_size
    elif isinstance(grid, RowGrid):
        levels -= 128
        scales = grid.absmax.double() / 127
        offsets = torch.zeros_like(scales)
        at = row.expand(rows, columns)
    else:
        levels, scales = grid.table.double(), grid.absmax.double()
        offsets = torch.zeros_like(scales)
        at = (grid.skip + row * columns + column) // grid.blocksize
    return {
        "codes": codes,
        "levels": levels,
        "scales": scales.flatten(),
        "offsets": offsets.flatten(),
        "at": at.to(torch.int32),
        "dtype": torch.empty(0, dtype=problem.dtype, device=device),
    }


def _weight(operands: Sequence[Tensor]) -> Tensor:
    codes, levels, scales, offsets, at = operands[:5]
    return levels[codes.int()] * scales[at] + offsets[at]


def run(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply `x [M, K]` in float64."""
    y = x.double() @ _weight(operands).T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def dequantize(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight, rounded to the dtype of the activations."""
    return _weight(operands).to(operands[5].dtype)


KERNEL = Kernel(
    name="reference",
    title="dequantize and multiply in float64 at each call",
    cannot=cannot,
    prepare=prepare,
    run=run,
    dequantize=dequantize,
)
