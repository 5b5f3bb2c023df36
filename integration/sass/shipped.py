"""The launches whose machine code is held to limits: what a linear of a large model meets.

Each is chosen, prepared and launched by the package's own functions, on a card that is described
instead of present.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qplug_converters.formats.bnb_4bit import TABLES
from qplug_converters.weight import AffineGrid, CodebookGrid, Grid, QuantizedWeight, RowGrid
from qplug_kernels import Problem, choose
from qplug_kernels.gpu import compat, configs
from qplug_kernels.grids import facts

from .launches import Build, record

FEATURES, OUTPUTS = 4096, 1024
"""Inputs and outputs: strides and pointers are as aligned as in a real model."""

MULTIPROCESSORS = {
    "sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170,
    "gfx942": 304,
}  # fmt: skip

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Case:
    """A linear, and how many tokens it multiplies; 0 stands for its weight decoded to 16 bits."""

    format: str
    dtype: str
    tokens: int
    group_size: int = 128
    act_order: bool = False
    symmetric: bool = False

    @property
    def name(self) -> str:
        """Return e.g. `int4 g128 fp16 m16`."""
        tokens = f"m{self.tokens}" if self.tokens else "decoded"
        more = " act order" * self.act_order + " sym" * self.symmetric
        return f"{self.format} g{self.group_size} {self.dtype} {tokens}{more}"

    @property
    def bits(self) -> int:
        """Of a code."""
        return {"nf4": 4, "rows": 8}.get(self.format) or int(self.format.removeprefix("int"))

    def grid(self) -> Grid:
        """Return a grid of this kind; values decide nothing but whether it is symmetric."""
        many = FEATURES // self.group_size
        if self.format == "nf4":
            table = torch.frombuffer(bytearray(TABLES["nf4"]), dtype=torch.float32)
            return CodebookGrid(table, torch.ones(OUTPUTS * many), self.group_size)
        if self.format == "rows":
            return RowGrid(torch.ones(OUTPUTS))
        scales = torch.ones(OUTPUTS, many, dtype=DTYPES[self.dtype])
        g_idx = torch.arange(FEATURES, dtype=torch.int32) % many if self.act_order else None
        zero = 2 ** (self.bits - 1) if self.symmetric else 0
        zeros = torch.full((OUTPUTS, many), zero, dtype=torch.int16)
        return AffineGrid(scales, zeros, self.group_size, g_idx)

    def weight(self) -> QuantizedWeight:
        """Return a linear of this kind."""
        codes = torch.zeros(OUTPUTS, FEATURES, dtype=torch.uint8)
        return QuantizedWeight(codes, self.bits, self.grid())


CASES = (
    *(Case("int4", "fp16", tokens) for tokens in (8, 16, 32, 64)),
    *(Case("int4", "bf16", tokens) for tokens in (8, 16)),
    *(Case("int4", "fp16", 16, group_size) for group_size in (32, FEATURES)),
    Case("int4", "fp16", 16, symmetric=True),
    *(Case("int4", "fp16", tokens, act_order=True) for tokens in (8, 16)),
    *(Case(name, "fp16", 8) for name in ("int2", "int8")),
    *(Case(name, dtype, 16) for name in ("int2", "int3", "int8") for dtype in DTYPES),
    *(
        Case("nf4", dtype, tokens, 64)
        for dtype, tokens in (("fp16", 16), ("bf16", 8), ("bf16", 16))
    ),
    Case("int4", "fp16", 0),
    Case("rows", "fp16", 16, FEATURES),
)
"""What is shipped: with what else they launch at most 25 compilations, a minute on two cores."""


def built(case: Case, arch: str) -> Iterator[Build]:
    """Yield what the launch of a case compiles."""
    weight = case.weight()
    problem = Problem(
        **facts(weight), dtype=DTYPES[case.dtype], device="cuda", arch=arch,
        triton_version=compat.VERSION,
    )  # fmt: skip
    kernel = choose(problem).kernel
    # Tensors without memory: on a CPU a kernel runs its reference, and their addresses are aligned.
    operands = [tensor.to("meta") for tensor in kernel.prepare(weight, problem).values()]
    x = torch.empty(case.tokens, FEATURES, dtype=problem.dtype, device="meta")

    def launch() -> None:
        if case.tokens:
            kernel.run(x, operands, None)
        else:
            kernel.dequantize(operands)

    recorded = record(arch, launch)
    if not recorded:
        raise RuntimeError(f"{case.name} on {arch}: `{kernel.name}` launched nothing")
    for build in recorded:
        if "KP" not in build.kernel.arg_names:  # it multiplies nothing
            yield replace(build, name=f"{case.name} {build.kernel.__name__}", facts={"bits": 0})
            continue
        told = {
            "bits": case.bits,
            "format": case.format,
            "dtype": case.dtype,
            "group_size": case.group_size,
            "gathers": "GATHER" in build.kernel.arg_names and build.constant("GATHER"),
            "codebook": case.format == "nf4",
            "loop": case.tokens > 0,
            "tokens": build.constant("BM") if case.tokens else 0,
            "features": build.constant("BN"),
            "inputs": build.constant("KP") * (16 if case.bits == 3 else 16 // case.bits),
        }
        yield replace(build, name=case.name, facts=told)


def builds(arch: str) -> list[Build]:
    """Return what is shipped for a card."""
    described = configs.Card(arch, MULTIPROCESSORS[arch])
    configs.card = lambda device: described
    configs.choose.cache_clear()
    os.environ["QPLUG_CONFIGS"] = "off"  # what this machine's user measured is not shipped
    return [build for case in CASES for build in built(case, arch)]
