"""Prepare a quantized linear once, multiply by it many times: the room's face to an engine.

`prepare` chooses a kernel, encodes the weight into its layout and says so in the log;
`apply_linear` runs any kernel. Where the choice falls on a plain dense weight, an engine may take
it (`Prepared.dense_weight`) and multiply by it as by its own (docs/adr/0005).

Everything that depends on the number of tokens happens inside one custom operation: an engine
traces its model once, with many tokens, and a branch in traced code would be frozen the way it
went then (vLLM's compiled CPU mode does so without a guard).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qplug_converters.weight import QuantizedWeight

from .grids import check
from .problem import Choice, Kernel, Problem, choose

LOG = logging.getLogger("qplug")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A linear in the layout of its kernel.

    Attributes
    ----------
    kernel
        Name of the kernel.
    in_features, out_features
        Of the linear.
    dtype
        Of the activations it takes and returns.
    tensors
        The kernel's operands by name, in its order. Saving them is pointless, their layout may
        depend on the CPU.
    """

    kernel: str
    in_features: int
    out_features: int
    dtype: torch.dtype
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dense_weight(self) -> Tensor | None:
        """The weight `[out, in]` in `dtype` where that is all there is, else `None`."""
        if not kernel_named(self.kernel).dense:
            return None
        [weight] = self.tensors.values()
        return weight


def prepare(
    weight: QuantizedWeight, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Prepared:
    """Choose a kernel for `weight` and encode it into the kernel's layout, on the device itself.

    What it takes there besides the result is the weight, a byte per code, and what the kernel says.

    Parameters
    ----------
    weight
        The linear, on any device.
    dtype
        Of the activations.
    device
        Where it will be multiplied.

    Raises
    ------
    QplugError
        If the weight contradicts itself or does not fit `dtype`, or if `QPLUG_KERNEL` names a
        kernel that cannot.
    """
    check(weight)
    device = torch.device(device)
    weight = weight.to(device)
    problem = Problem.here(weight, dtype, device)
    kernel = select(problem)
    tensors = {
        name: tensor.contiguous().to(device)
        for name, tensor in kernel.prepare(weight, problem).items()
    }
    return Prepared(kernel.name, weight.in_features, weight.out_features, dtype, tensors)


def select(problem: Problem) -> Kernel:
    """Choose a kernel, the one that `QPLUG_KERNEL` names if it does, and say so in the log.

    Raises
    ------
    QplugError
        If the one that is named cannot.
    """
    force = os.environ.get("QPLUG_KERNEL") or None
    choice = choose(problem, force=force)
    _log(choice, problem, "QPLUG_KERNEL asks for it" if force else choice.reasons)
    return choice.kernel


@cache
def _say(level: int, line: str) -> None:
    """Log a line the first time it is met in this process."""
    LOG.log(level, line)


def _log(choice: Choice, problem: Problem, reasons: str) -> None:
    kernel, bits = choice.kernel, problem.bits
    because = f" ({reasons})" if reasons else ""
    if kernel.dense:
        # The number of bytes is that of the dtype, so that one line stands for all linears.
        size = problem.dtype.itemsize
        _say(
            logging.WARNING,
            f"{problem.linears} on {problem.device} are decoded to dense {problem.dtype_name}, "
            f"{size} bytes per weight instead of about {bits / 8:g}{because}",
        )
    else:
        _say(
            logging.INFO,
            f"{problem.linears} on {problem.device} at {problem.dtype_name} run kernel "
            f"`{kernel.name}`: {kernel.title}{because}",
        )


@cache
def kernel_named(name: str) -> Kernel:
    """Return a kernel of `KERNELS`."""
    from . import KERNELS

    return next(kernel for kernel in KERNELS if kernel.name == name)


def _multiply(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, kernel: str, out_features: int
) -> Tensor:
    if x.dim() == 2 and x.shape[0] > 0:
        return kernel_named(kernel).run(x, operands, bias)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    flat = kernel_named(kernel).run(x.reshape(-1, x.shape[-1]), operands, bias)
    return flat.view(*x.shape[:-1], out_features)


@torch.library.custom_op("qplug::apply_linear", mutates_args=())
def _op(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, kernel: str, out_features: int
) -> Tensor:
    return _multiply(x, operands, bias, kernel, out_features)


@_op.register_fake
def _fake(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, kernel: str, out_features: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("qplug::apply_linear_backward", mutates_args=())
def _backward_op(grad: Tensor, operands: Sequence[Tensor], kernel: str, in_features: int) -> Tensor:
    flat = grad.reshape(-1, grad.shape[-1])
    weight = kernel_named(kernel).dequantize(operands)
    return (flat @ weight).view(*grad.shape[:-1], in_features)


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, operands: Sequence[Tensor], kernel: str, in_features: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, operands, _bias, kernel, _out_features = inputs
    ctx.save_for_backward(*operands)
    ctx.kernel, ctx.in_features = kernel, x.shape[-1]


def _backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, list[None], Tensor | None, None, None]:
    """Gradients of `x` (through the dequantized weight) and of the bias; codes have none."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _backward_op(grad, ctx.saved_tensors, ctx.kernel, ctx.in_features)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, [None] * len(ctx.saved_tensors), grad_bias, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def apply_linear(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """Return `x @ w.T + bias`, differentiable with respect to `x` and `bias`.

    Parameters
    ----------
    x
        `[..., in_features]` in `prepared.dtype`; any leading shape, empty included.
    prepared
        The linear.
    bias
        `[out_features]` in `prepared.dtype`.

    Raises
    ------
    ValueError
        If `x` or `bias` has another shape or dtype, before any kernel runs.
    """
    if x.shape[-1] != prepared.in_features or x.dtype != prepared.dtype:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, "
            f"expected {prepared.dtype} [..., {prepared.in_features}]"
        )
    if bias is not None and (
        bias.shape != (prepared.out_features,) or bias.dtype != prepared.dtype
    ):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)}, "
            f"expected {prepared.dtype} [{prepared.out_features}]"
        )
    operands = list(prepared.tensors.values())
    # An eager call without gradients skips the dispatcher: 1 us instead of 11 us, beside 44 us
    # for a 576 x 1536 linear at one token.
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        result: Tensor = _op(x, operands, bias, prepared.kernel, prepared.out_features)
        return result
    return _multiply(x, operands, bias, prepared.kernel, prepared.out_features)
