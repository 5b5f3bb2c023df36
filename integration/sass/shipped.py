"""The launches whose machine code is held to limits: what a linear of a large model meets.

Each is chosen, prepared and launched by the package's own functions, on a card that is described
instead of present.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_kernels import Problem, choose
from qplug_kernels.gpu import compat, configs
from qplug_kernels.grids import facts

from .launches import Build, record

FEATURES = 4096
"""Inputs and outputs: strides and pointers are then as aligned as in a real model."""

MULTIPROCESSORS = {
    "sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170,
    "gfx942": 304,
}  # fmt: skip

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Case:
    """A linear, and how many tokens it multiplies."""

    bits: int
    dtype: str
    tokens: int
    group_size: int = 128
    act_order: bool = False

    @property
    def name(self) -> str:
        """Return e.g. `int4 g128 fp16 m16`."""
        order = " act order" if self.act_order else ""
        return f"int{self.bits} g{self.group_size} {self.dtype} m{self.tokens}{order}"

    def weight(self) -> QuantizedWeight:
        """Return a linear of this kind, of zeros: no value decides how it is compiled."""
        codes = torch.zeros(FEATURES, FEATURES, dtype=torch.uint8)
        groups = FEATURES // self.group_size
        scales = torch.ones(FEATURES, groups, dtype=DTYPES[self.dtype])
        g_idx = torch.arange(FEATURES, dtype=torch.int32) % groups if self.act_order else None
        zeros = torch.zeros(FEATURES, groups, dtype=torch.int16)
        return QuantizedWeight(codes, self.bits, AffineGrid(scales, zeros, self.group_size, g_idx))


def cases() -> Iterator[Case]:
    """Yield what is shipped."""
    yield from (Case(4, "fp16", tokens) for tokens in (8, 16, 32, 64))
    yield from (Case(4, "bf16", tokens) for tokens in (8, 16, 64))
    for bits in (2, 3, 8):
        yield from (Case(bits, dtype, tokens) for dtype in DTYPES for tokens in (8, 16))
    yield from (Case(4, "fp16", 16, group_size) for group_size in (32, 64, FEATURES))
    yield Case(4, "fp16", 16, act_order=True)


def built(case: Case, arch: str) -> Iterator[Build]:
    """Yield what the launch of a case compiles."""
    weight = case.weight()
    problem = Problem(
        **facts(weight), dtype=DTYPES[case.dtype], device="cuda", arch=arch,
        triton_version=compat.VERSION,
    )  # fmt: skip
    kernel = choose(problem).kernel
    operands = list(kernel.prepare(weight, problem).values())
    x = torch.empty(case.tokens, FEATURES, dtype=problem.dtype)
    for build in record(arch, lambda: kernel.run(x, operands, None)):
        rows = build.constant("KP")
        told = {
            "bits": case.bits,
            "format": f"int{case.bits}",
            "dtype": case.dtype,
            "group_size": case.group_size,
            "act_order": case.act_order,
            "codebook": False,
            "tokens": build.constant("BM"),
            "features": build.constant("BN"),
            "inputs": rows * (16 if case.bits == 3 else 16 // case.bits),
        }
        yield replace(build, name=case.name, facts=told)


def builds(arch: str) -> list[Build]:
    """Return what is shipped for a card."""
    described = configs.Card(arch, MULTIPROCESSORS[arch])
    configs.card = lambda device: described
    configs.choose.cache_clear()
    os.environ["QPLUG_CONFIGS"] = "off"  # what this machine's user measured is not shipped
    return [build for case in cases() for build in built(case, arch)]
