"""Decode the weight once, at load, to the dtype of the activations; multiply as torch does.

    tensor    shape      dtype                meaning
    weight    [N, K]     of the activations   fl(w), w in float32 as the checkpoint means it
    x         [M, K]     float dtype
    result    [M, N]     as x                 x @ weight.T + bias

Two bytes per weight at 16 bits, four at 32: exact to one rounding of the checkpoint's meaning, as
fast as the unquantized model, and none of the memory saved. Act order costs nothing, since codes
keep the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qplug_converters.codec import dequantize_to
from qplug_converters.weight import QuantizedWeight

from .problem import Kernel, Problem

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    if problem.dtype not in FLOATS:
        return f"activations are {problem.dtype_name}, which is no floating dtype of a matmul"
    return None


def prepare(weight: QuantizedWeight, problem: Problem) -> dict[str, Tensor]:
    """Return the dense weight."""
    return {"weight": dequantize_to(weight, problem.dtype)}


def run(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply `x [M, K]`."""
    return F.linear(x, operands[0], bias)


def dequantize(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight."""
    return operands[0]


KERNEL = Kernel(
    name="dense",
    title="weights decoded at load, torch's dense matmul",
    cannot=cannot,
    prepare=prepare,
    run=run,
    dequantize=dequantize,
    dense=True,
)
