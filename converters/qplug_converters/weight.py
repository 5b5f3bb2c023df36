"""`QuantizedWeight`: the one in-memory form of a quantized linear, and the formula it means.

A quantized linear is integer codes on a grid. Tools disagree only about where codes, scales and
zeros lie in memory; every layout decodes into this form and encodes out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """Codes on a grid.

    Attributes
    ----------
    codes : Tensor
        uint8 `[out_features, in_features]`, each below 2^bits.
    bits : int
        1 to 8.
    grid : AffineGrid
        What the codes mean.
    """

    codes: Tensor
    bits: int
    grid: AffineGrid

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.codes.shape[1]

    def integers(self) -> Tensor:
        """Return int16 `[out, in]`: code - zero, what no exact move may change."""
        return self.grid.combine(self.codes.to(torch.int16), torch.Tensor.sub_, self.grid.zeros)

    def dequantize(self) -> Tensor:
        """Return float32 `[out, in]`: *the* meaning of a checkpoint.

        The subtraction is in integers and the product one float32 multiplication, which is exact
        for 16-bit scales (at most 11 + 9 significant bits).
        """
        out = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        step = max(1, _CHUNK // max(1, self.in_features))
        for at in range(0, self.out_features, step):
            few = self.rows(at, at + step)
            out[at : at + step] = few.integers()
            few.grid.combine(out[at : at + step], torch.Tensor.mul_, few.grid.scales.float())
        return out

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Return output rows `start` to `stop` as views."""
        grid = AffineGrid(
            self.grid.scales[start:stop],
            self.grid.zeros[start:stop],
            self.grid.group_size,
            self.grid.g_idx,
        )
        return QuantizedWeight(self.codes[start:stop], self.bits, grid)
