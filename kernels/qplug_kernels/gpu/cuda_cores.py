"""2, 3, 4 and 8-bit integers where Triton has no tensor cores (sm_75): few tokens, float16.

Operands, formula and layout are those of `affine`: the same words are read, by multiply-adds of
float32 instead of products of tensor cores.

A thread holds 8 neighbouring words of one or two outputs, decodes their planes with the texts of
`asm`, and keeps a float32 sum for each of its words and tokens; the product of a group is
multiplied by the scale, and sums are added over the inputs of a tile once, behind the loop. A
result is rounded to float16 once.

Instructions per weight, sm_75, Triton 3.6, groups of 128 (counted, not run on such a card):

    tokens  2 bits  3 bits  4 bits  8 bits
    1        5.1     5.2     4.9     5.8
    2        7.7     7.8     7.1     8.7
    4       13.2    13.3    11.7    14.0

In act order the activations are gathered before: in the loop it would cost 2.5 instructions and
more. No conversion of an integer is among them. A T4 can issue about 8 for every 4-bit weight that
it reads. More than 4 tokens are several programs; above 16, weights are decoded slab by slab and
torch multiplies (its library has tensor cores there).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..problem import Kernel, Problem
from . import affine, asm, compat, configs, loop, planes, workspace
from .compat import jit_for_any, tl
from .form import Form
from .gather import gather

FEW = 16
"""Most tokens of the kernel: as dear as reading weights six times, decoding them is dearer."""

TOKENS = 4
"""Most tokens of a program: 165 to 200 registers, and no spills."""

ARCHS = ("sm_75",)
"""Where Triton runs and compiles products to multiply-adds."""

COLUMNS = 32
"""Outputs of a program: a part of a tile, so that a card of 40 multiprocessors has work."""

WARPS = {16: 4, 32: 4, 64: 4, 128: 8}
"""By the rows of words in a tile: above one number of x per thread, Triton moves it through shared
memory."""


@jit_for_any("M", "splits")
def cuda_cores_kernel(
    x, words, scales, bias, y, partial, count, M, N, K, x_stride, many_k, splits,
    BITS: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, CN: tl.constexpr,
    GROUPS: tl.constexpr, SYMMETRIC: tl.constexpr, SHIFT: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr, SCALE: tl.constexpr,
    WIDE: tl.constexpr, TEXTS: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Multiply CN outputs, a part of a tile of BN, by BM tokens over one split of K."""
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    EACH: tl.constexpr = PLANES // GROUPS
    tile_m, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = loop.share(many_k, splits, split)
    tile_n = (part // (BN // CN)).to(tl.int64)
    column = (part % (BN // CN)) * CN + tl.arange(0, CN)
    row = tl.arange(0, KP)
    x += tile_m.to(tl.int64) * BM * x_stride
    w = words + (tile_n * many_k + first) * (WORDS * BN * KP) + column[:, None] * KP + row[None, :]
    if SHIFT:
        groups = (many_k + (1 << SHIFT) - 1) >> SHIFT
        s = scales + tile_n * groups * BN + column
    else:
        s = scales + (tile_n * many_k + first) * (GROUPS * BN) + column * GROUPS
    sums = ()
    for _ in tl.static_range(BM):
        sums = sums + (tl.zeros((CN, KP), tl.float32),)  # type: ignore[assignment]
    for t in range(first, last):
        w0 = tl.load(w)
        w1 = tl.load(w + BN * KP) if WORDS == 3 else w0
        w2 = tl.load(w + 2 * BN * KP) if WORDS == 3 else w0
        for g in tl.static_range(GROUPS):
            word = tl.load(s + ((t >> SHIFT) * BN if SHIFT else g))
            scale = asm.as_float(word.to(tl.int16), SCALE, True)
            zero = loop.zero_of(word, w0, BITS, SYMMETRIC, CN, KP, DTYPE, WIDE, CONSTRAINTS)
            v = loop.decode(w0, w1, w2, zero, BITS, g * EACH, EACH, DTYPE, WIDE, TEXTS, CONSTRAINTS)
            grown = ()
            for m in tl.static_range(BM):
                p = tl.zeros((CN, KP), tl.float32)
                for n in tl.static_range(EACH):
                    k = (t * PLANES + g * EACH + n) * KP + row
                    inside = row * 0 + tile_m * BM + m < M
                    if not EVEN_K:
                        inside = inside & (k < K)
                    values = tl.load(x + m * x_stride + k, mask=inside, other=0.0)
                    p += v[n].to(tl.float32) * values.to(tl.float32)[None, :]
                grown = grown + (sums[m] + p * scale[:, None],)  # type: ignore[assignment]
            sums = grown
        w += WORDS * BN * KP
        if not SHIFT:
            s += GROUPS * BN
    token = tl.arange(0, BM)
    acc = tl.zeros((CN, BM), tl.float32)
    for m in tl.static_range(BM):
        acc = tl.where((token == m)[None, :], tl.sum(sums[m], 1)[:, None], acc)
    loop.finish(
        acc, y, bias, partial, count, tile_m * tl.num_programs(1) + part, split, splits,
        tile_m * BM + token, tile_n * BN + column, M, N, CN, BM, SPLIT, BIAS, DTYPE, WIDE,
    )  # fmt: skip


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    reason = configs.cannot_triton(problem)
    if reason is not None:
        return reason
    if problem.arch not in ARCHS:
        return f"it is for GPUs without tensor cores in Triton ({', '.join(ARCHS)})"
    if problem.dtype != torch.float16:
        return f"activations are {problem.dtype_name}, and the GPU multiplies float16"
    return planes.cannot(problem)


@cache
def constants(form: Form, tokens: int, ptx: bool, interpreted: bool) -> dict[str, Any]:
    """Return the compile-time numbers of a layout and a number of tokens."""
    return {
        **affine.constants(form, ptx, interpreted),
        "EVEN_K": form.places % form.tile == 0,
        "BM": min(TOKENS, 1 << (tokens - 1).bit_length()),
        "CN": COLUMNS,
    }


def splits_of(form: Form, blocks: int, tokens: int, multiprocessors: int) -> int:
    """Return how many programs share K: enough for four programs on each multiprocessor."""
    programs = blocks * -(-form.out_features // COLUMNS)
    if programs > workspace.COUNTERS:
        return 1
    most = workspace.FLOATS // (programs * COLUMNS * tokens)
    return max(1, min(-(-4 * multiprocessors // programs), form.tiles[1] // 2, most))


def run(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply `x [M, K]`."""
    form = affine.check(x, operands, bias)
    if x.device.type == "cpu" and not compat.interpreted():
        return affine.reference(x, operands, bias)
    if x.shape[0] > FEW:
        return affine.multiply_many(x, operands, bias, form)
    return launch(x, operands, bias, form, configs.card(x.device).multiprocessors)


def launch(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, form: Form, multiprocessors: int
) -> Tensor:
    """Multiply `x [M, K]` with one launch."""
    words, scales = operands[:2]
    if len(operands) == 4:
        x = gather(x, operands[3])
    x = planes.aligned(x)
    tokens, width = x.shape
    interpreted = compat.interpreted()
    y = x.new_empty((tokens, form.out_features), dtype=torch.float32 if interpreted else x.dtype)
    fixed = constants(form, tokens, not interpreted, interpreted)
    blocks = -(-tokens // fixed["BM"])
    splits = splits_of(form, blocks, fixed["BM"], multiprocessors)
    space = workspace.of(x.device)
    with compat.on(x.device):
        cuda_cores_kernel[blocks, -(-form.out_features // COLUMNS), splits](
            x, words, scales, y if bias is None else bias, y,
            space.partial, space.count, tokens, form.out_features, width, x.stride(0),
            form.tiles[1], splits,
            **fixed, SPLIT=splits > 1, BIAS=bias is not None,
            num_warps=WARPS[form.rows], enable_fp_fusion=True,
        )  # fmt: skip
    return y.to(x.dtype) if interpreted else y


KERNEL = Kernel(
    name="triton_cuda_cores",
    title=f"integers decoded in registers up to {FEW} tokens without tensor cores, above that "
    "weights slab by slab",
    cannot=cannot,
    prepare=affine.prepare,
    run=run,
    dequantize=affine.decode_all,
    device="cuda",
)
