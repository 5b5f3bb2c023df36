"""Kernels that the gate must refuse, one fault each, and the one without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl

from .launches import Build, record


def two_planes(shift: int) -> str:
    """Return PTX that turns the codes at bits 0 and 4 above `shift` into float16, less 8."""
    return f"""{{
        .reg .b32 t, m, n, f, h;
        mov.b32 m, 0x64006400;  // 1024
        mov.b32 n, 0xe408e408;  // -1032
        mov.b32 f, 0x2c002c00;  // 1 / 16
        mov.b32 h, 0xd480d480;  // -72
        shr.u32 t, $2, {shift};
        lop3.b32 $0, t, 0x000f000f, m, 0xEA;
        add.f16x2 $0, $0, n;
        lop3.b32 $1, t, 0x00f000f0, m, 0xEA;
        fma.rn.f16x2 $1, $1, f, h;
    }}"""


@triton.jit
def int4(
    x, q, s, y, M, N, K, stride, FAULT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Multiply by int4 weights in planes, zero 8, one scale for a tile of 4 * KP inputs."""
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    row, column = tl.arange(0, KP), tl.arange(0, BN)
    tile = tl.program_id(0).to(tl.int64) * (K // (4 * KP))
    words = q + tile * BN * KP + column[:, None] * KP + row[None, :]
    scales = s + tile * BN + column
    inputs = x + token.to(tl.int64)[:, None] * stride + row[None, :]
    inside = token[:, None] < M
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(0, K // (4 * KP)):
        w = tl.load(words)
        both: tl.constexpr = (tl.float16, tl.float16)
        v = tl.inline_asm_elementwise(LOW, "=&r,=&r,r", [w], both, is_pure=True, pack=2)
        v += tl.inline_asm_elementwise(HIGH, "=&r,=&r,r", [w], both, is_pure=True, pack=2)
        p = tl.zeros((BN, BM), tl.float32)
        for plane in tl.static_range(4):
            value = v[plane]
            if FAULT == "shifts":
                code = (w >> (4 * plane)) & 15
                value = (code | 0x6400).to(tl.float16, bitcast=True) - 1032.0
            if FAULT == "cast":
                value = ((w >> (4 * plane)) & 15).to(tl.float16) - 8.0
            if FAULT == "round trip":  # sums along the inputs go through shared memory
                value = tl.cumsum(value, 1)
            a = tl.load(inputs + plane * KP, mask=inside, other=0.0)
            if FAULT == "no product":
                p += tl.sum(value.to(tl.float32), 1)[:, None] + tl.sum(a.to(tl.float32), 1)[None, :]
            else:
                p = tl.dot(value, a.T, p)
        acc += p * tl.load(scales).to(tl.float32, bitcast=True)[:, None]
        words += BN * KP
        scales += BN
        inputs += 4 * KP
    output = tl.program_id(0) * BN + column
    tl.store(y + token[None, :] * N + output[:, None], acc, mask=(token < M)[None, :])


def launch(fault: str = "", misaligned: bool = False, **options: int) -> None:
    """Launch it as for 4096 inputs and outputs."""
    features = 4096
    x = torch.empty(16 * features + 1, dtype=torch.float16)[int(misaligned) :]
    q = torch.empty(features * features // 4 + 1, dtype=torch.int16)[int(misaligned) :]
    s = torch.empty(features * features // 256, dtype=torch.int32)
    y = torch.empty(16, features)
    int4[features // 128, 1](
        x, q, s, y, 16, features, features, features, FAULT=fault, LOW=two_planes(0),
        HIGH=two_planes(8), BM=16, BN=128, KP=64, **{"num_warps": 4, "num_stages": 3, **options},
    )  # fmt: skip


FACTS = {
    "bits": 4, "format": "int4", "dtype": "fp16", "group_size": 256, "gathers": False,
    "codebook": False, "loop": True, "tokens": 16, "features": 128, "inputs": 256,
}  # fmt: skip
FAULTS: dict[str, Callable[[], None]] = {
    "right": launch,
    **{name: partial(launch, name) for name in ("cast", "shifts", "round trip", "no product")},
    "no hints": partial(launch, misaligned=True),
    "spills": partial(launch, maxnreg=64),
    "no pipeline": partial(launch, num_stages=1),
    "too many stages": partial(launch, num_stages=24),
}


def builds(arch: str) -> list[Build]:
    """Return the right kernel and the wrong ones, the same for every card."""
    made = []
    for name, run in FAULTS.items():
        (build,) = record(arch, run)
        made.append(replace(build, name=name, facts=FACTS))
    right = made[0]
    made.append(replace(right, name="half a tile", facts={**FACTS, "inputs": 512}))
    made.append(replace(right, name="does not compile", types={**right.types, "q": "*i17"}))
    return made
