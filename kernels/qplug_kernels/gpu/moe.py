"""Mixtures of experts on a GPU: every expert's few tokens in one launch, whatever the router chose.

    tensor   shape             dtype              meaning
    x        [T, K]            float16, bfloat16  the activations
    ids      [T, topk]         integers           the experts of each token; none: -1, or E
    weights  [T, topk]         any float          of the router
    up       [E, ...] each     of the kernel      gate and up [2 I, K] of each expert, gate first
    down     [E, ...] each     of the kernel      down [N, I] of each expert
    result   [T, N]            as x               sum over n of weights[t, n] * down(act(gate) * up)

The kernels are those of single linears. A stack of experts is for them one linear with E times the
tiles of outputs; a block of BM pairs (`routing`) says of which expert, and where its rows of x lie.
The decoding loop is the same to the instruction. The products of `down` are multiplied by the
router's weight and stored in float32; the sum over a token's experts runs in their order, without
atomics. So a result has the rounding of two linears and an activation, and is the same every time.

Bytes per weight: those of the kernel, for experts that are met. An expert with more pairs than a
block has is read once for each of its blocks, from the second-level cache where it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import affine, codebook, compat, configs, rows
from .configs import Config
from .routing import Routing, align, combine, most_blocks


@dataclass(frozen=True, slots=True)
class Loop:
    """What a kernel of single linears gives to experts.

    Attributes
    ----------
    check, launch
        As in the kernel's file.
    configuration
        How a number of tokens is multiplied.
    few
        Most tokens that it multiplies without the weight in memory.
    """

    check: Callable[[Tensor, Sequence[Tensor], Tensor | None], Any]
    launch: Callable[[Tensor, Sequence[Tensor], Tensor | None, Config, Routing | None], Tensor]
    configuration: Callable[[Any, int, torch.device], Config]
    few: int


LOOPS = {
    affine.KERNEL.name: Loop(affine.check, affine.launch, configs.choose, affine.FEW),
    codebook.KERNEL.name: Loop(
        codebook.check, codebook.launch, codebook.configuration, codebook.FEW
    ),
    rows.KERNEL.name: Loop(rows.check, rows.launch, configs.choose, rows.FEW),
}
"""By name of the kernel."""


def cannot(
    kernels: Sequence[str], pairs: int, experts: int, device: torch.device, capturing: bool
) -> str | None:
    """Say why experts are multiplied one by one.

    Which expert has how many tokens is known to the device alone; under capture no one may ask, and
    any number of tokens runs in blocks.
    """
    without = [name for name in kernels if name not in LOOPS]
    if without:
        return f"kernel `{without[0]}` multiplies one linear at a time"
    if device.type == "cpu" and not compat.interpreted():
        return "it runs on a GPU"
    few = min(LOOPS[name].few for name in kernels)
    if pairs > few * experts and not capturing:
        return (
            f"{pairs / experts:.0f} tokens an expert are more than {few}: a decoded weight is "
            "multiplied faster"
        )
    return None


@cache
def configuration(loop: Loop, form: Any, pairs: int, experts: int, device: torch.device) -> Config:
    """Return how pairs are multiplied: blocks as large as an expert's share of them.

    As many programs as single linears have, so fewer of them for each block.
    """
    config = loop.configuration(form, min(-(-pairs // experts), loop.few), device)
    blocks = most_blocks(pairs, experts, config.tokens)
    return replace(config, splits=-(-config.splits // blocks))


def check(x: Tensor, operands: Sequence[Tensor], kernel: str, experts: int) -> Any:
    """Return the layout of each expert, or say what is wrong before anything is launched.

    Raises
    ------
    ValueError
        If a shape, dtype, stride or device is wrong.
    """
    for tensor in operands:
        if tensor.shape[0] != experts or not tensor.is_contiguous():
            raise ValueError(
                f"an operand of experts is {tensor.dtype} {list(tensor.shape)}, expected "
                f"[{experts}, ...] in one piece"
            )
    return LOOPS[kernel].check(x, [tensor[0] for tensor in operands], None)


def run(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    kernels: tuple[str, str],
    gate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the sum over each token's experts; `x [T, K]`, T * topk > 0, `gate` is the activation.

    Raises
    ------
    ValueError
        If an operand is not what it must be.
    """
    (tokens, topk), experts = ids.shape, up[0].shape[0]
    pairs = tokens * topk
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def multiply(
        x: Tensor, operands: Sequence[Tensor], kernel: str, share: int, weights: Tensor | None
    ) -> Tensor:
        form, loop = check(x, operands, kernel, experts), LOOPS[kernel]
        config = configuration(loop, form, pairs, experts, x.device)
        if config.tokens not in known:
            known[config.tokens] = align(ids, experts, config.tokens)
        routing = Routing(*known[config.tokens], pairs, share, weights)
        return loop.launch(x, [tensor[0] for tensor in operands], None, config, routing)

    hidden = gate(multiply(x, up, kernels[0], topk, None))
    factors = weights.reshape(-1).float()
    return combine(multiply(hidden, down, kernels[1], 1, factors), ids, experts, x.dtype)
