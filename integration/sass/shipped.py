"""The launches whose machine code is held to limits: what a linear of a large model meets.

Each is chosen, prepared and launched by the package's own functions, on a card that is described
instead of present.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qplug_converters.weight import AffineGrid, CodebookGrid, Grid, QuantizedWeight, RowGrid
from qplug_kernels import Problem, choose
from qplug_kernels.gpu import compat, configs, nibbles
from qplug_kernels.grids import facts

from .launches import Build, record

FEATURES = 4096
"""Inputs and outputs: strides and pointers are then as aligned as in a real model."""

MULTIPROCESSORS = {
    "sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170,
    "gfx942": 304,
}  # fmt: skip

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "nf4": 4, "rows": 8}
"""By format; `rows` are those of LLM.int8."""


@dataclass(frozen=True, slots=True)
class Case:
    """A linear, and how many tokens it multiplies."""

    format: str
    dtype: str
    tokens: int
    group_size: int = 128
    act_order: bool = False

    @property
    def name(self) -> str:
        """Return e.g. `int4 g128 fp16 m16`."""
        order = " act order" if self.act_order else ""
        return f"{self.format} g{self.group_size} {self.dtype} m{self.tokens}{order}"

    def weight(self) -> QuantizedWeight:
        """Return a linear of this kind, of zeros: no value decides how it is compiled."""
        codes = torch.zeros(FEATURES, FEATURES, dtype=torch.uint8)
        return QuantizedWeight(codes, BITS[self.format], self.grid())

    def grid(self) -> Grid:
        """Return what the codes mean."""
        if self.format == "rows":
            return RowGrid(torch.ones(FEATURES))
        groups = FEATURES // self.group_size
        if self.format == "nf4":
            absmax = torch.ones(FEATURES * groups)
            return CodebookGrid(torch.tensor(nibbles.TABLES[0]), absmax, self.group_size)
        scales = torch.ones(FEATURES, groups, dtype=DTYPES[self.dtype])
        g_idx = torch.arange(FEATURES, dtype=torch.int32) % groups if self.act_order else None
        zeros = torch.zeros(FEATURES, groups, dtype=torch.int16)
        return AffineGrid(scales, zeros, self.group_size, g_idx)


def cases(arch: str) -> Iterator[Case]:
    """Yield what is shipped for a card.

    Codebooks and rows run on AMD's too, by their twins (about 15 instructions per weight of NF4),
    and are held to nothing there.
    """
    yield from (Case("int4", "fp16", tokens) for tokens in (8, 16, 32, 64))
    yield from (Case("int4", "bf16", tokens) for tokens in (8, 16, 64))
    for bits in ("int2", "int3", "int8"):
        yield from (Case(bits, dtype, tokens) for dtype in DTYPES for tokens in (8, 16))
    yield from (Case("int4", "fp16", 16, group_size) for group_size in (32, 64, FEATURES))
    yield Case("int4", "fp16", 16, act_order=True)
    if not arch.startswith("sm_"):
        return
    yield from (Case("nf4", "bf16", tokens, 64) for tokens in (8, 16, 32))
    yield Case("nf4", "fp16", 16, 64)
    yield from (Case("rows", dtype, 16, FEATURES) for dtype in DTYPES)


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
            "bits": BITS[case.format],
            "format": case.format,
            "dtype": case.dtype,
            "group_size": case.group_size,
            "act_order": case.act_order,
            "codebook": case.format == "nf4",
            "tokens": build.constant("BM"),
            "features": build.constant("BN"),
            "inputs": rows * (16 if case.format == "int3" else 16 // BITS[case.format]),
        }
        yield replace(build, name=case.name, facts=told)


def builds(arch: str) -> list[Build]:
    """Return what is shipped for a card."""
    described = configs.Card(arch, MULTIPROCESSORS[arch])
    configs.card = lambda device: described
    configs.choose.cache_clear()
    os.environ["QPLUG_CONFIGS"] = "off"  # what this machine's user measured is not shipped
    return [build for case in cases(arch) for build in built(case, arch)]
