"""Round to nearest: the grid from each group's minimum and maximum, no calibration.

Asymmetric: the grid spans [min(w, 0), max(w, 0)] and zero is representable; the zero stays inside
what every reader of the target agrees on (1 to 2^bits - 1 for GPTQ v1), the scale growing where
that moves it. Symmetric: the midpoint, scale = max|w| / (2^(bits-1) - 1/2), which uses the extra
negative code half a step deep. Codes are rounded against the scale as stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_converters.codec import TORCH_DTYPES
from qplug_converters.fit import minmax_grid
from qplug_converters.scheme import Scheme
from qplug_converters.weight import AffineGrid, QuantizedWeight


def quantize(weight: Tensor, scheme: Scheme, span: tuple[int, int]) -> QuantizedWeight:
    """Quantize a block of rows.

    Parameters
    ----------
    weight
        float32 `[rows, in_features]`.
    scheme
        bits, group_size, sym and scale dtype.
    span
        Lowest and highest zero the target can hold.
    """
    rows, inp = weight.shape
    size, top = scheme.group_size, (1 << scheme.bits) - 1
    padded = torch.nn.functional.pad(weight, (0, -inp % size)).view(rows, -1, size)
    middle = (scheme.midpoint, scheme.midpoint)
    scales, zeros = minmax_grid(
        padded.amin(2),
        padded.amax(2),
        top,
        bool(scheme.sym),
        middle if scheme.sym else span,
        TORCH_DTYPES[scheme.scale_dtype],
    )
    steps = padded / scales.float()[:, :, None]
    codes = steps.round_().add_(zeros[:, :, None]).clamp_(0, top).to(torch.uint8)
    grid = AffineGrid(scales, zeros.to(torch.int16), size)
    return QuantizedWeight(codes.view(rows, -1)[:, :inp].contiguous(), scheme.bits, grid)
