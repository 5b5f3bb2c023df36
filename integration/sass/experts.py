"""Launches over the experts of a mixture: the loops of single linears, which must stay as they are.

Stored limits are those of single linears. What is asked here is that blocks of an expert, rows by
indirection and the router's weight cost nothing in the loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from qplug_converters.formats.bnb_4bit import TABLES
from qplug_converters.weight import AffineGrid, CodebookGrid, Grid, QuantizedWeight, RowGrid
from qplug_kernels import Problem, choose, experts
from qplug_kernels.gpu import compat, configs, moe
from qplug_kernels.grids import facts

from .launches import Build, record
from .shipped import DTYPES, MULTIPROCESSORS

MANY, TOPK, FEATURES, OUTPUTS = 2, 2, 4096, 1024
"""Experts, how many each token meets, inputs and outputs of one."""


@dataclass(frozen=True, slots=True)
class Case:
    """Experts, and how many tokens each of them meets."""

    format: str
    dtype: str
    tokens: int
    group_size: int = 128

    @property
    def name(self) -> str:
        """Return e.g. `experts int4 g128 fp16 m16`."""
        return f"experts {self.format} g{self.group_size} {self.dtype} m{self.tokens}"

    @property
    def bits(self) -> int:
        """Of a code."""
        return {"nf4": 4, "rows": 8}.get(self.format) or int(self.format.removeprefix("int"))

    def weight(self) -> QuantizedWeight:
        """Return a linear of this kind; its values decide nothing."""
        many = FEATURES // self.group_size
        grid: Grid
        if self.format == "nf4":
            table = torch.frombuffer(bytearray(TABLES["nf4"]), dtype=torch.float32)
            grid = CodebookGrid(table, torch.ones(OUTPUTS * many), self.group_size)
        elif self.format == "rows":
            grid = RowGrid(torch.ones(OUTPUTS))
        else:
            zeros = torch.zeros(OUTPUTS, many, dtype=torch.int16)
            scales = torch.ones(OUTPUTS, many, dtype=DTYPES[self.dtype])
            grid = AffineGrid(scales, zeros, self.group_size)
        codes = torch.zeros(OUTPUTS, FEATURES, dtype=torch.uint8)
        return QuantizedWeight(codes, self.bits, grid)


CASES = (
    Case("int4", "fp16", 8),
    Case("int4", "fp16", 16),
    Case("int4", "bf16", 16),
    Case("nf4", "bf16", 16, 64),
    Case("rows", "fp16", 16, FEATURES),
)


def built(case: Case, arch: str) -> Iterator[Build]:
    """Yield the launch with the router's weight; that without differs behind the loop alone."""
    weight = case.weight()
    problem = Problem(
        **facts(weight), dtype=DTYPES[case.dtype], device="cuda", arch=arch,
        triton_version=compat.VERSION,
    )  # fmt: skip
    kernel = choose(problem).kernel
    stacked = experts.stack([weight] * MANY, kernel, problem, torch.device("cpu"))
    # Tensors without memory: nothing runs on a CPU instead, and their addresses are aligned.
    operands = [tensor.to("meta") for tensor in stacked.values()]
    x = torch.empty(case.tokens, FEATURES, dtype=problem.dtype, device="meta")
    ids = torch.zeros(case.tokens, TOPK, dtype=torch.int64, device="meta")
    down = partial(torch.nn.functional.pad, pad=(0, FEATURES - OUTPUTS))
    launch = partial(
        moe.run, x, ids, torch.empty(ids.shape, device="meta"), operands, operands,
        (kernel.name, kernel.name), down,
    )  # fmt: skip
    _, build, combine = record(arch, launch)
    told = {
        "bits": case.bits,
        "format": case.format,
        "dtype": case.dtype,
        "group_size": case.group_size,
        "gathers": False,
        "codebook": case.format == "nf4",
        "loop": True,
        "tokens": build.constant("BM"),
        "features": build.constant("BN"),
        "inputs": build.constant("KP") * (16 if case.bits == 3 else 16 // case.bits),
    }
    yield replace(build, name=case.name, facts=told)
    if case is CASES[0]:
        yield replace(combine, name="experts combine", facts={"bits": 0})


def builds(arch: str) -> list[Build]:
    """Return what is shipped for a card."""
    described = configs.Card(arch, MULTIPROCESSORS[arch])
    configs.card = lambda device: described
    configs.choose.cache_clear()
    moe.configuration.cache_clear()
    os.environ["QPLUG_CONFIGS"] = "off"  # what this machine's user measured is not shipped
    return [build for case in CASES for build in built(case, arch)]
