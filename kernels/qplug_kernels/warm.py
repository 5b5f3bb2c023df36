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

from .linear import Prepared, apply_linear, kernel_named

TOKENS = (1, 8, 9, 16, 32, 64, 65)
"""Numbers of tokens that meet every kernel: the ends of the ranges that `configs` makes."""


def warm_up(
    linears: Iterable[Prepared], tokens: Iterable[int] = TOKENS, workers: int | None = None
) -> int:
    """Multiply zeros by one linear of each kind, for each number of tokens.

    Compilations run side by side, as the compiler leaves Python's lock; launches are on the
    current stream. Kernels that compile nothing are left out.

    Parameters
    ----------
    linears
        Of a model, as many as it has.
    tokens
        Numbers of tokens that will be met.
    workers
        Compilations at a time; as many as there are cores by default.

    Returns
    -------
    int
        How many products were run.
    """
    kinds: dict[object, Prepared] = {}
    for linear in linears:
        shapes = tuple((tensor.dtype, tensor.shape) for tensor in linear.tensors.values())
        if kernel_named(linear.kernel).device == "cuda":
            kinds.setdefault((linear.kernel, _device(linear), shapes), linear)
    # Threads start with the default stream: operands may still be on their way on this one.
    streams = {
        device: torch.cuda.current_stream(device)
        for device in map(_device, kinds.values())
        if device.type == "cuda"
    }

    def run(one: tuple[Prepared, int]) -> None:
        linear, count = one
        device = _device(linear)
        x = torch.zeros(count, linear.in_features, dtype=linear.dtype, device=device)
        with torch.no_grad(), torch.cuda.stream(streams.get(device)):
            apply_linear(x, linear)

    wanted = list(product(kinds.values(), sorted(set(tokens))))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return len(list(pool.map(run, wanted)))


def _device(linear: Prepared) -> torch.device:
    return next(iter(linear.tensors.values())).device
