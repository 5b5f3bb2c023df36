"""Prepare the experts of a mixture once, multiply tokens by those that a router chose.

`prepare_experts` chooses one kernel for all experts of a role and stacks what it prepares;
`apply_experts` runs gate and up, the activation, down, and the sum over each token's experts, in
one custom operation: how many tokens there are decides inside, as in `linear`.

On a GPU all experts run in one launch (`gpu.moe`). Elsewhere, and with many tokens, experts run one
by one through their kernel: the definition of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from qplug_converters.errors import QplugError
from qplug_converters.weight import QuantizedWeight

from .gpu import moe
from .grids import check
from .linear import kernel_named, select
from .problem import Kernel, Problem

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
"""What the gate passes through, by name."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedExperts:
    """The linears of one role, one for each expert, in the layout of their kernel.

    Attributes
    ----------
    kernel
        Name of the kernel.
    experts
        How many.
    in_features, out_features
        Of each.
    dtype
        Of the activations.
    tensors
        The kernel's operands by name, in its order, each `[experts, ...]`.
    """

    kernel: str
    experts: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _together(problems: Sequence[Problem]) -> Problem:
    """Return the problem of a stack: what holds for every expert."""
    first = problems[0]
    runs = [problem.block for problem in problems]
    common: dict[str, Any] = {
        "act_order": any(problem.act_order for problem in problems),
        "run": gcd(*runs) if any(problem.run for problem in problems) else 0,
        "highest_zero": max(problem.highest_zero for problem in problems),
    } | {
        name: all(getattr(problem, name) for problem in problems)
        for name in ("midpoint", "scales_fit_f16", "offsets_fit_f16", "weights_fit_bf16")
    }
    for n, problem in enumerate(problems):
        for name in Problem.__slots__:
            here, there = getattr(problem, name), getattr(first, name)
            if name not in common and here != there:
                raise QplugError(f"{name} {here} of expert {n}", "experts", f"{there}, as expert 0")
    return replace(first, **common)


def stack(
    weights: Sequence[QuantizedWeight], kernel: Kernel, problem: Problem, device: torch.device
) -> dict[str, Tensor]:
    """Return the operands of all experts, with one expert at a time beside them.

    Raises
    ------
    QplugError
        If experts take different shapes.
    """
    stacked: dict[str, Tensor] = {}
    for n, weight in enumerate(weights):
        tensors = kernel.prepare(weight.to(device), problem)
        if not stacked:
            stacked = {
                name: tensor.new_empty((len(weights), *tensor.shape))
                for name, tensor in tensors.items()
            }
        for name, tensor in tensors.items():
            if name not in stacked or stacked[name].shape[1:] != tensor.shape:
                raise QplugError(
                    f"expert {n}, whose {name} is {list(tensor.shape)}",
                    "experts",
                    "the layout of expert 0",
                    "multiply these experts as linears of their own",
                )
            stacked[name][n].copy_(tensor)
    return stacked


def prepare_experts(
    weights: Sequence[QuantizedWeight], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreparedExperts:
    """Choose one kernel for the linears of all experts, and encode them into its layout.

    Parameters
    ----------
    weights
        Of experts 0, 1, ...: of one shape, grid and group size, on any device. What each takes in
        passing is what `linear.prepare` takes.
    dtype
        Of the activations.
    device
        Where they will be multiplied.

    Raises
    ------
    QplugError
        If there is none, if one contradicts itself, does not fit `dtype` or differs from the first,
        or if `QPLUG_KERNEL` names a kernel that cannot.
    """
    if not weights:
        raise QplugError("no expert", "experts", "at least one")
    device = torch.device(device)
    problems = []
    for weight in weights:
        check(weight)
        problems.append(Problem.here(weight, dtype, device))
    problem = _together(problems)
    kernel = select(problem)
    tensors = stack(weights, kernel, problem, device)
    shape = problem.in_features, problem.out_features
    return PreparedExperts(kernel.name, len(weights), *shape, dtype, tensors)


def _one_by_one(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    kernels: tuple[str, str],
    gate: Callable[[Tensor], Tensor],
    out_features: int,
) -> Tensor:
    """Multiply expert by expert; a token's experts are added up in float32, in their order."""
    flat, factors = ids.flatten(), weights.reshape(-1).float()
    first, second = (kernel_named(name).run for name in kernels)
    result = torch.zeros((len(x), out_features), dtype=torch.float32, device=x.device)
    for n in torch.unique(flat).tolist():
        if not 0 <= n < len(up[0]):
            continue
        pairs = torch.nonzero(flat == n).flatten()
        tokens = pairs // ids.shape[1]
        hidden = gate(first(x[tokens], [tensor[n] for tensor in up], None))
        found = second(hidden, [tensor[n] for tensor in down], None)
        result.index_add_(0, tokens, found.float() * factors[pairs, None])
    return result.to(x.dtype)


def _multiply(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_kernel: str,
    down_kernel: str,
    activation: str,
    out_features: int,
) -> Tensor:
    if ids.numel() == 0:
        return x.new_zeros((x.shape[0], out_features))
    act, kernels = ACTIVATIONS[activation], (up_kernel, down_kernel)

    def gate(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return act(gate) * up

    capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if moe.cannot(kernels, ids.numel(), len(up[0]), x.device, capturing) is None:
        return moe.run(x, ids, weights, up, down, kernels, gate)
    return _one_by_one(x, ids, weights, up, down, kernels, gate, out_features)


@torch.library.custom_op("qplug::apply_experts", mutates_args=())
def _op(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_kernel: str,
    down_kernel: str,
    activation: str,
    out_features: int,
) -> Tensor:
    return _multiply(x, ids, weights, up, down, up_kernel, down_kernel, activation, out_features)


@_op.register_fake
def _fake(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_kernel: str,
    down_kernel: str,
    activation: str,
    out_features: int,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


def _check(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: PreparedExperts,
    down: PreparedExperts,
    activation: str,
) -> None:
    if up.out_features != 2 * down.in_features or up.experts != down.experts:
        raise ValueError(
            f"up is {up.experts} experts of {up.out_features} outputs, expected {down.experts} of "
            f"{2 * down.in_features}: gate and up, for the inputs of down"
        )
    if up.dtype != down.dtype:
        raise ValueError(f"down is prepared for {down.dtype}, expected {up.dtype}, as up")
    if x.dim() != 2 or x.shape[1] != up.in_features or x.dtype != up.dtype:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, expected {up.dtype} [T, {up.in_features}]"
        )
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids are {ids.dtype} {list(ids.shape)}, expected torch.int32 or torch.int64 "
            f"[{x.shape[0]}, topk]"
        )
    if weights.shape != ids.shape or not weights.is_floating_point():
        raise ValueError(
            f"weights are {weights.dtype} {list(weights.shape)}, expected floats {list(ids.shape)}"
        )
    device = next(iter(up.tensors.values())).device
    for name, tensor in (("x", x), ("ids", ids), ("weights", weights)):
        if tensor.device != device:
            raise ValueError(f"{name} on {tensor.device}, expected {device}, as experts")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation `{activation}`, expected one of {', '.join(ACTIVATIONS)}")


def apply_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: PreparedExperts,
    down: PreparedExperts,
    activation: str = "silu",
) -> Tensor:
    """Return `[T, N]`: for each token the sum of its experts' outputs times the router's weights.

    An expert computes `down(act(gate(x)) * up(x))`. There is no gradient.

    Parameters
    ----------
    x
        `[T, K]` in `up.dtype`; T may be 0.
    ids
        int32 or int64 `[T, topk]`, the experts of each token; numbers outside 0 to E - 1 (experts
        of another rank) add nothing.
    weights
        Floats `[T, topk]`.
    up
        gate and up of each expert as one linear, gate's outputs first: `[2 I, K]`.
    down
        `[N, I]`.
    activation
        A name in `ACTIVATIONS`.

    Raises
    ------
    ValueError
        If a shape, dtype or device is wrong, before any kernel runs.
    """
    _check(x, ids, weights, up, down, activation)
    operands = list(up.tensors.values()), list(down.tensors.values())
    gradients = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    # Eager calls skip the dispatcher, as in `linear`; where gradients are asked for, it refuses.
    run = _op if torch.compiler.is_compiling() or gradients else _multiply
    result: Tensor = run(
        x, ids, weights, *operands, up.kernel, down.kernel, activation, down.out_features
    )
    return result
