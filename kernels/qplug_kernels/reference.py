"""The definition of every kernel: dequantize and multiply in float64, each time, slowly.

    tensor    shape        dtype     meaning
    codes     [N, K]       uint8     0 to 2^bits - 1
    scales    [N, G]       float     of the file
    zeros     [N, G]       int16     the value subtracted
    group     [K]          int64     the group of each input
    result    [M, N]       as x      fl(sum over k of x * (code - zero) * scale) + bias

Never chosen by itself; `QPLUG_KERNEL=reference` asks for it, to see whether a wrong answer comes
from a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug_converters.weight import QuantizedWeight

from .problem import Kernel, Problem


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    if not problem.dtype.is_floating_point:
        return f"activations are {problem.dtype_name}, which is no floating dtype"
    return None


def prepare(weight: QuantizedWeight, problem: Problem) -> dict[str, Tensor]:
    """Return codes and grid as they are."""
    grid = weight.affine
    return {
        "codes": weight.codes,
        "scales": grid.scales,
        "zeros": grid.zeros,
        "group": grid.group_of_inputs(weight.in_features),
        "dtype": torch.empty(0, dtype=problem.dtype, device=weight.codes.device),
    }


def _weight(operands: Sequence[Tensor]) -> Tensor:
    codes, scales, zeros, group = operands[:4]
    return (codes - zeros[:, group]).double() * scales.double()[:, group]


def run(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply `x [M, K]` in float64."""
    y = x.double() @ _weight(operands).T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def dequantize(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight, rounded to the dtype of the activations."""
    return _weight(operands).to(operands[4].dtype)


KERNEL = Kernel(
    name="reference",
    title="dequantize and multiply in float64 at each call",
    cannot=cannot,
    prepare=prepare,
    run=run,
    dequantize=dequantize,
)
