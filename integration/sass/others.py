"""Launches of kernels that no limit on instructions per weight is for.

Writing keys and values, which multiplies nothing, on every card; and multiply-adds without tensor
cores, on the card that has none in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_kernels import Problem, choose
from qplug_kernels.gpu import compat, configs, cuda_cores, kv
from qplug_kernels.gpu.planes import Form
from qplug_kernels.grids import facts
from qplug_kernels.kv import CODES

from .launches import Build, record

FEATURES = 4096
MULTIPROCESSORS = 40
TOKENS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 16, 32, 16, 8, 128


def scatters(arch: str) -> Iterator[Build]:
    """Yield the kernel of every code, with scales given or taken."""
    x = torch.empty(TOKENS, HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    slots = torch.empty(TOKENS, dtype=torch.int64)
    for index, dtype in enumerate(CODES):
        cache = torch.empty(BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE, dtype=dtype)
        dynamic = index % 2 == 0
        scales = torch.empty((BLOCKS, BLOCK_SIZE, HEADS) if dynamic else (1,))
        launch = partial(kv.scatter, x, x, cache, cache, slots, scales, scales, dynamic)
        name = f"kv {str(dtype).removeprefix('torch.')} {'dynamic' if dynamic else 'given'}"
        for build in record(arch, launch):
            yield replace(build, name=name, facts={"bits": 0})


def products(arch: str) -> Iterator[Build]:
    """Yield the kernel without tensor cores for widths of codes and numbers of tokens."""
    for bits in (2, 3, 4, 8):
        codes = torch.zeros(FEATURES, FEATURES, dtype=torch.uint8)
        scales = torch.ones(FEATURES, FEATURES // 128, dtype=torch.float16)
        zeros = torch.zeros(FEATURES, FEATURES // 128, dtype=torch.int16)
        weight = QuantizedWeight(codes, bits, AffineGrid(scales, zeros, 128))
        problem = Problem(
            **facts(weight), dtype=torch.float16, device="cuda", arch=arch,
            triton_version=compat.VERSION,
        )  # fmt: skip
        chosen = choose(problem).kernel
        assert chosen is cuda_cores.KERNEL
        operands = list(chosen.prepare(weight, problem).values())
        form = Form.of(operands)
        for tokens in (1, 4):
            x = torch.empty(tokens, FEATURES, dtype=torch.float16)
            launch = partial(cuda_cores.launch, x, operands, None, form, MULTIPROCESSORS)
            for build in record(arch, launch):
                told = {"bits": 0, "weights": build.constant("CN") * form.tile}
                yield replace(build, name=f"int{bits} g128 fp16 m{tokens}", facts=told)


def builds(arch: str) -> list[Build]:
    """Return what is shipped for a card."""
    described = configs.Card(arch, MULTIPROCESSORS)
    configs.card = kv.card = lambda device: described
    found = list(scatters(arch))
    return found + list(products(arch)) if arch == "sm_75" else found
