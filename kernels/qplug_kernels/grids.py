"""What each kind of grid says to a kernel: its tensors checked, and the facts selection needs.

    kind       weight                                    scales     a scale is shared by
    affine     (code - zero) * scale                     [N, G]     group_size inputs of a row
    offset     code * scale + offset                     [N, G]     group_size inputs of a row
    rows       (code - 128) * absmax / 127               [N]        the inputs of a row
    codebook   table[code] * absmax                      [blocks]   blocksize weights of the rows
                                                                    laid end to end

Nested absmax are expanded when a file is decoded (`CodebookGrid.absmax`): no kernel meets them.

LLM.int8 rows are multiplied as weights alone. Its outlier columns are a property of activations:
bitsandbytes rounds activations to 8 bits but for inputs with large values, for which it multiplies
in 16 bits by weights decoded from the same int8 rows. Activations that are not rounded need no such
exception, and every weight keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from qplug_converters.codec import check_scales
from qplug_converters.errors import QplugError
from qplug_converters.scheme import Kind
from qplug_converters.weight import (
    AffineGrid,
    CodebookGrid,
    OffsetGrid,
    QuantizedWeight,
    RowGrid,
)


def check(weight: QuantizedWeight) -> None:
    """Refuse a weight whose tensors contradict each other.

    Raises
    ------
    QplugError
        If codes are not bytes `[out, in]` below 2^bits, or a tensor of the grid has another shape,
        lies on another device, or holds what is not a number.
    """
    codes, grid = weight.codes, weight.grid
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise QplugError(f"codes {codes.dtype} {list(codes.shape)}", "codes", "uint8 [out, in]")
    if weight.bits < 8 and codes.numel() and int(codes.max()) >> weight.bits:
        raise QplugError(f"a code of {int(codes.max())}", "codes", f"{weight.bits}-bit codes")
    if isinstance(grid, AffineGrid):
        _check_affine(grid, *codes.shape)
        _check_zeros(grid.zeros, weight.bits)
        factors = {"scales": grid.scales, "zeros": grid.zeros}
    elif isinstance(grid, OffsetGrid):
        _check_offset(grid, *codes.shape)
        factors = {"scales": grid.scales, "offsets": grid.offsets}
    elif isinstance(grid, RowGrid):
        if weight.bits != 8:
            raise QplugError(f"{weight.bits}-bit rows", "bits", "8")
        _check_shape("absmax", grid.absmax, (codes.shape[0],))
        factors = {"absmax": grid.absmax}
    else:
        _check_codebook(grid, codes.numel(), weight.bits)
        factors = {"table": grid.table, "absmax": grid.absmax}
    for name, tensor in factors.items():
        if tensor.device != codes.device:
            raise QplugError(f"{name} on {tensor.device}", "grid", f"{codes.device}, as codes")
        check_scales(tensor, name)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise QplugError(f"{name} {list(tensor.shape)}", "grid", str(list(shape)))


def _check_groups(groups: int, group_size: int, in_features: int) -> None:
    if group_size < 1 or groups != -(-in_features // group_size):
        raise QplugError(
            f"{groups} groups of {group_size}", "grid", f"groups that cover {in_features} inputs"
        )


def _check_affine(grid: AffineGrid, rows: int, columns: int) -> None:
    if grid.zeros.shape != grid.scales.shape or grid.scales.shape[:1] != (rows,):
        raise QplugError(
            f"scales {list(grid.scales.shape)} and zeros {list(grid.zeros.shape)}",
            "grid",
            f"[{rows}, groups] each",
        )
    groups = grid.scales.shape[1]
    if grid.g_idx is None:
        _check_groups(groups, grid.group_size, columns)
        return
    _check_shape("g_idx", grid.g_idx, (columns,))
    lowest, highest = int(grid.g_idx.min()), int(grid.g_idx.max())
    if lowest < 0 or highest >= groups:
        raise QplugError(
            f"g_idx from {lowest} to {highest}", "grid", f"groups from 0 to {groups - 1}"
        )


def _check_zeros(zeros: Tensor, bits: int) -> None:
    if zeros.numel() and not 0 <= int(zeros.min()) <= int(zeros.max()) <= 1 << bits:
        raise QplugError(
            f"zeros from {int(zeros.min())} to {int(zeros.max())}", "grid", f"0 to {1 << bits}"
        )


def _check_offset(grid: OffsetGrid, rows: int, columns: int) -> None:
    if grid.offsets.shape != grid.scales.shape or grid.scales.shape[:1] != (rows,):
        raise QplugError(
            f"scales {list(grid.scales.shape)} and offsets {list(grid.offsets.shape)}",
            "grid",
            f"[{rows}, groups] each",
        )
    _check_groups(grid.scales.shape[1], grid.group_size, columns)
    if columns % grid.group_size:
        raise QplugError(
            f"{columns} inputs in groups of {grid.group_size}", "grid", "groups that are all whole"
        )


def _check_codebook(grid: CodebookGrid, count: int, bits: int) -> None:
    _check_shape("table", grid.table, (1 << bits,))
    if grid.blocksize < 1 or not 0 <= grid.skip < grid.blocksize:
        raise QplugError(
            f"blocks of {grid.blocksize}, of the first of which {grid.skip} weights lie before",
            "grid",
            "fewer weights before than a block has",
        )
    _check_shape("absmax", grid.absmax, (-(-(grid.skip + count) // grid.blocksize),))


def facts(weight: QuantizedWeight) -> Mapping[str, Any]:
    """Return the attributes of a `Problem` that its weight tells."""
    grid, in_features = weight.grid, weight.in_features
    found: dict[str, Any] = {
        "in_features": in_features,
        "out_features": weight.out_features,
        "bits": weight.bits,
    }
    if isinstance(grid, AffineGrid):
        found |= {
            "kind": Kind.AFFINE,
            "group_size": grid.group_size,
            "act_order": _out_of_order(grid, in_features),
            "run": _run(grid, in_features),
            "highest_zero": int(grid.zeros.max()) if grid.zeros.numel() else 0,
            "midpoint": bool((grid.zeros == 1 << (weight.bits - 1)).all()),
            "scale_dtype": grid.scales.dtype,
            "scales_fit_f16": _fit_f16(grid.scales),
            "offsets_fit_f16": _within(grid.scales.float() * grid.zeros, torch.float16),
            "weights_fit_bf16": _within(grid.scales.float() * 16, torch.bfloat16),
        }
    elif isinstance(grid, OffsetGrid):
        zeros = integer_zeros(grid, weight.bits)
        largest = grid.scales.float().abs() * (1 << weight.bits) + grid.offsets.float().abs()
        found |= {
            "kind": Kind.OFFSET,
            "group_size": grid.group_size,
            "whole_zeros": zeros is not None,
            "highest_zero": 0 if zeros is None or not zeros.numel() else int(zeros.max()),
            "midpoint": zeros is not None and bool((zeros == 1 << (weight.bits - 1)).all()),
            "scale_dtype": grid.scales.dtype,
            "scales_fit_f16": _fit_f16(grid.scales),
            "offsets_fit_f16": _within(grid.offsets, torch.float16),
            "weights_fit_bf16": _within(largest, torch.bfloat16),
        }
    elif isinstance(grid, RowGrid):
        found |= {
            "kind": Kind.ROWS,
            "group_size": in_features,
            "highest_zero": 128,
            "scales_fit_f16": _fit_f16(grid.absmax.float() / 127),
            "offsets_fit_f16": _within(grid.absmax.float() * (128 / 127), torch.float16),
            "weights_fit_bf16": _within(grid.absmax.float() * (128 / 127), torch.bfloat16),
        }
    else:
        found |= {
            "kind": Kind.CODEBOOK,
            "group_size": grid.blocksize,
            "run": gcd(grid.blocksize, in_features, grid.skip),
            "highest_zero": 0,
            "table": tuple(grid.table.float().tolist()),
            "scales_fit_f16": _fit_f16(grid.absmax),
            "weights_fit_bf16": _within(
                grid.absmax.float() * grid.table.float().abs().max(), torch.bfloat16
            ),
        }
    return found


def integer_zeros(grid: OffsetGrid, bits: int) -> Tensor | None:
    """Return the zeros int16 `[out, groups]` that the offsets were made of, or `None`.

    They are there where each offset is -zero * scale rounded once to its dtype, as AWQ's tools
    write them, for integers from 0 to 2^bits.
    """
    scales = grid.scales.float()
    zeros = torch.where(scales == 0, 0.0, torch.round(-grid.offsets.float() / scales))
    inside = (zeros >= 0) & (zeros <= 1 << bits)
    same = (-(scales * zeros)).to(grid.offsets.dtype) == grid.offsets
    return zeros.to(torch.int16) if bool((inside & same).all()) else None


def with_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight whose offsets are zeros (`Problem.whole_zeros`) on an affine grid.

    What the tool lost in rounding offsets is not kept: at most 2^-11 of zero * scale in float16.
    """
    grid = weight.grid
    if not isinstance(grid, OffsetGrid):
        return weight
    zeros = integer_zeros(grid, weight.bits)
    assert zeros is not None
    return replace(weight, grid=AffineGrid(grid.scales, zeros, grid.group_size))


def _out_of_order(grid: AffineGrid, in_features: int) -> bool:
    if grid.g_idx is None:
        return False
    inputs = torch.arange(in_features, device=grid.g_idx.device)
    return not torch.equal(grid.g_idx.long(), inputs // grid.group_size)


def _run(grid: AffineGrid, in_features: int) -> int:
    """Return the greatest common divisor of all places where the group changes."""
    groups = grid.group_of_inputs(in_features).sort().values
    changes = torch.nonzero(groups[1:] != groups[:-1]).flatten() + 1
    return gcd(in_features, *changes.tolist())


def _fit_f16(scales: Tensor) -> bool:
    """Whether float16 loses no more of a scale than its own half ulp (no underflow, overflow)."""
    exact = scales.float()
    lost = (exact.half().float() - exact).abs()
    return bool((lost <= exact.abs() * 2.0**-11).all())


def _within(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding to `dtype` overflows nowhere."""
    return bool((values.abs() <= torch.finfo(dtype).max).all())
