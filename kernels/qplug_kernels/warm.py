"""Compile before the first token: every kernel of a model for every range of tokens, in a pool.

Triton compiles a kernel the first time it is launched with new constants, 2 to 3 seconds each and
one after the other if left to itself. Its cache on disk (`TRITON_CACHE_DIR`) makes the next process
start in milliseconds: of several ranks on a machine, let one warm up first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor

from .linear import Prepared, apply_linear, kernel_named

TOKENS = (1, 9, 17, 33, 65, 129, 193, 257)
"""Numbers of tokens that meet every kernel: one in each range of `configs.rule`, each number of
blocks of the longest, which may be split or not, and one that is multiplied slab by slab."""


def warm_up(
    linears: Iterable[Prepared],
    tokens: Iterable[int] = TOKENS,
    bias: bool = False,
    workers: int | None = None,
) -> int:
    """Multiply zeros by one linear of each shape, for each number of tokens.

    Compilations run side by side, as the compiler leaves Python's lock; launches are on the
    current stream. Kernels that compile nothing are left out.

    Parameters
    ----------
    linears
        Of a model, as many as it has.
    tokens
        Numbers of tokens that will be met.
    bias
        Whether some are called with a bias: then each is, and without.
    workers
        Compilations at a time; as many as there are cores by default.

    Returns
    -------
    int
        How many products were run.
    """
    shapes: dict[object, Prepared] = {}
    for linear in linears:
        if kernel_named(linear.kernel).device == "cuda":
            shape = tuple((tensor.dtype, tensor.shape) for tensor in linear.tensors.values())
            shapes.setdefault((linear.kernel, _device(linear), shape), linear)
    # Threads start with the default stream: operands may still be on their way on this one.
    streams = {
        device: torch.cuda.current_stream(device)
        for device in map(_device, shapes.values())
        if device.type == "cuda"
    }

    def run(one: tuple[Prepared, int, bool]) -> None:
        linear, count, bias = one
        device = _device(linear)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=linear.dtype, device=device)

        with torch.no_grad(), torch.cuda.stream(streams.get(device)):
            added = zeros(linear.out_features) if bias else None
            apply_linear(zeros(count, linear.in_features), linear, added)

    wanted = list(product(shapes.values(), sorted(set(tokens)), {False, bias}))
    first: dict[object, tuple[Prepared, int, bool]] = {}
    for one in wanted:
        first.setdefault((_constants(one[0]), *one[1:]), one)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        list(pool.map(run, first.values()))
    # Linears of other sizes mostly meet what is compiled by now: side by side, they would have
    # compiled the same once more.
    at = {id(one) for one in first.values()}
    for one in wanted:
        if id(one) not in at:
            run(one)
    return len(wanted)


def _constants(linear: Prepared) -> object:
    """Return what tells apart most compilations: kernel, dtypes, tiles."""
    tiles = tuple(
        (tensor.dtype, tensor.shape[2 if tensor.numel() else 3 :])  # without outputs and inputs
        for tensor in linear.tensors.values()
    )
    return linear.kernel, linear.dtype, _device(linear), tiles


def _device(linear: Prepared) -> torch.device:
    return next(iter(linear.tensors.values())).device
