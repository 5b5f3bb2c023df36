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
from qplug_converters.errors import QplugError
from qplug_converters.scheme import Scheme
from qplug_converters.weight import AffineGrid, QuantizedWeight

SMALLEST = 2.0**-24
"""The smallest positive float16: no group of zeros or tiny weights gets a scale of 0."""


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
    low = padded.amin(2).clamp(max=0)
    high = padded.amax(2).clamp(min=0)
    if scheme.sym:
        zeros = torch.full_like(low, scheme.midpoint)
        scales = torch.maximum(-low, high) / (scheme.midpoint - 0.5)
    else:
        spread = ((high - low) / top).clamp(min=SMALLEST)
        zeros = (-low / spread).round().clamp(*span).clamp(max=top)
        scales = torch.maximum(-low / zeros.clamp(min=1), high / (top - zeros).clamp(min=1))
        scales = torch.where(zeros == 0, high / top, scales)
        scales = torch.where(zeros == top, -low / top, scales)
    scales = _stored(scales.clamp(min=SMALLEST), TORCH_DTYPES[scheme.scale_dtype])
    steps = padded / scales.float()[:, :, None]
    codes = steps.round_().add_(zeros[:, :, None]).clamp_(0, top).to(torch.uint8)
    grid = AffineGrid(scales, zeros.to(torch.int16), size)
    return QuantizedWeight(codes.view(rows, -1)[:, :inp].contiguous(), scheme.bits, grid)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the dtype they are stored in, upwards where it has few digits left.

    Among float16's subnormal numbers rounding down could clamp weights by whole steps.

    Raises
    ------
    QplugError
        If a scale overflows the dtype.
    """
    stored = scales.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise QplugError(
            f"a scale of {float(scales.max()):g}",
            "scales",
            expected=f"one that {str(dtype).removeprefix('torch.')} can hold",
            fix="weights this large are damaged: check the source",
        )
    if dtype is torch.float16:
        short = (stored.float() < scales) & (scales < torch.finfo(dtype).smallest_normal)
        above = (stored.view(torch.int16) + 1).view(dtype)  # positive: the next number up
        stored = torch.where(short, above, stored)
    return stored
