"""`QuantizedWeight`: the one in-memory form of a quantized linear, and the formula it means.

A quantized linear is integer codes on a grid. Tools disagree only about where codes, scales and
zeros lie in memory; every layout decodes into this form and encodes out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Weights dequantized at a time: temporaries of 6 MB stay in the cache (whole: 4 times slower)."""


@dataclass(frozen=True, slots=True, eq=False)
class AffineGrid:
    """w = (code - zero) * scale, one scale and zero per output row and group of inputs.

    Attributes
    ----------
    scales : Tensor
        `[out_features, groups]`, in the file's dtype (float16, bfloat16 or float32); may be
        negative (AutoRound's full-range symmetric files).
    zeros : Tensor
        int16 `[out_features, groups]`: the value subtracted, 0 to 2^bits inclusive. A symmetric
        grid has its midpoint written out.
    group_size : int
        Inputs per group, positive; the last group may be short.
    g_idx : Tensor or None
        int32 `[in_features]`, the group of each input; `None` when input k is in k // group_size.
    """

    scales: Tensor
    zeros: Tensor
    group_size: int
    g_idx: Tensor | None = None

    def group_of_inputs(self, in_features: int) -> Tensor:
        """Return int64 `[in_features]`, the group of each input."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(in_features, device=self.scales.device) // self.group_size

    def combine(
        self, values: Tensor, operation: Callable[[Tensor, Tensor], Tensor], per_group: Tensor
    ) -> Tensor:
        """Apply an in-place operation to `[out, in]` values and their groups' `[out, groups]`."""
        out, inp = values.shape
        if self.g_idx is None and inp % self.group_size == 0:  # twice as fast as spreading
            grouped = values.view(out, -1, self.group_size)
            operation(grouped, per_group[:, :, None])
        else:
            operation(values, self.spread(per_group, inp))
        return values

    def spread(self, per_group: Tensor, in_features: int) -> Tensor:
        """Repeat `[out, groups]` to `[out, in_features]`, each input taking its group's value."""
        if self.g_idx is None:
            return per_group.repeat_interleave(self.group_size, 1)[:, :in_features]
        return per_group.index_select(1, self.g_idx.long())

    def rows(self, start: int, stop: int, in_features: int) -> AffineGrid:
        """Return the grid of output rows `start` to `stop` as views."""
        return AffineGrid(
            self.scales[start:stop], self.zeros[start:stop], self.group_size, self.g_idx
        )

    def integers(self, codes: Tensor) -> Tensor:
        """Return int16 `[out, in]`: code - zero."""
        return self.combine(codes.to(torch.int16), torch.Tensor.sub_, self.zeros)

    def write(self, codes: Tensor, out: Tensor) -> None:
        """Write the float32 weights of `codes` to `out`.

        The subtraction is in integers and the product one float32 multiplication, which is exact
        for 16-bit scales (at most 11 + 9 significant bits).
        """
        out.copy_(self.integers(codes))
        self.combine(out, torch.Tensor.mul_, self.scales.float())


@dataclass(frozen=True, slots=True, eq=False)
class OffsetGrid:
    """w = code * scale + offset, as AWQ GEMV_FAST stores it; product and sum in float32.

    `scales` and `offsets` are `[out_features, groups]` in the file's dtype; groups of `group_size`
    inputs lie in order.
    """

    scales: Tensor
    offsets: Tensor
    group_size: int

    def rows(self, start: int, stop: int, in_features: int) -> OffsetGrid:
        """Return the grid of output rows `start` to `stop` as views."""
        return OffsetGrid(self.scales[start:stop], self.offsets[start:stop], self.group_size)

    def write(self, codes: Tensor, out: Tensor) -> None:
        """Write the float32 weights of `codes` to `out`."""
        out.copy_(codes)
        grouped = out.view(out.shape[0], -1, self.group_size)
        grouped.mul_(self.scales.float()[:, :, None]).add_(self.offsets.float()[:, :, None])


INVERSE_127 = 0.007874015718698502
"""float32(1/127): what LLM.int8 multiplies by."""


@dataclass(frozen=True, slots=True, eq=False)
class RowGrid:
    """w = fl32(fl32((code - 128) * absmax) * fl32(1/127)): LLM.int8 in the tool's own order.

    `absmax` is float32 `[out_features]` (SCB). Source: bitsandbytes 0.50.2 int8_vectorwise_dequant.
    """

    absmax: Tensor

    def rows(self, start: int, stop: int, in_features: int) -> RowGrid:
        """Return the grid of output rows `start` to `stop` as views."""
        return RowGrid(self.absmax[start:stop])

    def write(self, codes: Tensor, out: Tensor) -> None:
        """Write the float32 weights of `codes` to `out`."""
        out.copy_(codes).sub_(128).mul_(self.absmax.float()[:, None]).mul_(INVERSE_127)


@dataclass(frozen=True, slots=True, eq=False)
class NestedAbsmax:
    """Absmax values that are quantized themselves: what a file with double quantization stores.

    `codes` uint8 `[blocks]`; `scales` float32, one for every `blocksize` blocks of the whole
    linear, of which `codes` begin at block `first`. absmax = table[code] * scale + offset, rounded
    to `dtype` after the product and after the sum (bitsandbytes 0.50.2; float32 as a rule).
    """

    codes: Tensor
    scales: Tensor
    table: Tensor
    offset: float
    blocksize: int
    dtype: torch.dtype = torch.float32
    first: int = 0

    def absmax(self) -> Tensor:
        """Return float32 `[blocks]`."""
        at = torch.arange(self.first, self.first + len(self.codes), device=self.codes.device)
        scales = self.scales.float().index_select(0, at // self.blocksize)
        product = (self.table.float()[self.codes.long()] * scales).to(self.dtype)
        # In float32 on purpose: a sum of two of `dtype` is exact enough to be rounded once.
        offset = torch.tensor(self.offset, dtype=torch.float32)
        return (product.float() + offset).to(self.dtype).float()


@dataclass(frozen=True, slots=True, eq=False)
class CodebookGrid:
    """w = table[code] * absmax of its block, in float32 (bitsandbytes NF4 and FP4).

    Attributes
    ----------
    table : Tensor
        float32 `[2^bits]`.
    absmax : Tensor
        `[blocks]`, float32 (bfloat16 in some damaged files), one for every `blocksize` weights of
        the rows laid end to end; blocks may span rows.
    blocksize : int
        Weights of a block.
    nested : NestedAbsmax or None
        Where `absmax` comes from, in files with double quantization.
    skip : int
        Weights of the first block that lie before these rows.
    """

    table: Tensor
    absmax: Tensor
    blocksize: int
    nested: NestedAbsmax | None = None
    skip: int = 0

    def rows(self, start: int, stop: int, in_features: int) -> CodebookGrid:
        """Return the grid of output rows `start` to `stop`; `nested` only for whole blocks."""
        begin, end = self.skip + start * in_features, self.skip + stop * in_features
        first, last = begin // self.blocksize, -(-end // self.blocksize)
        nested = self.nested
        if nested is not None:
            nested = replace(nested, codes=nested.codes[first:last], first=nested.first + first)
        return CodebookGrid(
            self.table, self.absmax[first:last], self.blocksize, nested, begin % self.blocksize
        )

    def write(self, codes: Tensor, out: Tensor) -> None:
        """Write the float32 weights of `codes` to `out`."""
        torch.index_select(self.table.float(), 0, codes.flatten().int(), out=out.view(-1))
        absmax = self.absmax.float()
        if self.skip == 0 and codes.numel() % self.blocksize == 0:
            out.view(-1, self.blocksize).mul_(absmax[:, None])
        else:
            at = torch.arange(self.skip, self.skip + codes.numel(), device=codes.device)
            out.view(-1).mul_(absmax.index_select(0, at // self.blocksize))


Grid = AffineGrid | OffsetGrid | RowGrid | CodebookGrid


def _moved(value: Any, device: torch.device) -> Any:
    """Return a tensor, or a dataclass with tensors inside, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Grid | NestedAbsmax):
        return replace(
            value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)}
        )
    return value


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """Codes on a grid.

    Attributes
    ----------
    codes : Tensor
        uint8 `[out_features, in_features]`, each below 2^bits.
    bits : int
        1 to 8.
    grid : Grid
        What the codes mean.
    """

    codes: Tensor
    bits: int
    grid: Grid

    @property
    def affine(self) -> AffineGrid:
        """The grid, where only an affine one makes sense.

        Raises
        ------
        TypeError
            If it is another one: the caller did not look.
        """
        if not isinstance(self.grid, AffineGrid):
            raise TypeError(f"an affine grid is needed, not {type(self.grid).__name__}")
        return self.grid

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.codes.shape[1]

    def to(self, device: torch.device) -> QuantizedWeight:
        """Return the weight with all its tensors on a device."""
        return QuantizedWeight(self.codes.to(device), self.bits, _moved(self.grid, device))

    def integers(self) -> Tensor:
        """Return int16 `[out, in]`: code - zero, what no exact move may change."""
        return self.affine.integers(self.codes)

    def dequantize(self) -> Tensor:
        """Return float32 `[out, in]`: *the* meaning of a checkpoint."""
        out = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        step = max(1, _CHUNK // max(1, self.in_features))
        for at in range(0, self.out_features, step):
            few = self.rows(at, at + step)
            few.grid.write(few.codes, out[at : at + step])
        return out

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Return output rows `start` to `stop` as views."""
        stop = min(stop, self.out_features)
        grid = self.grid.rows(start, stop, self.in_features)
        return QuantizedWeight(self.codes[start:stop], self.bits, grid)
