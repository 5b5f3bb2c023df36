"""4-bit codes of a table (NF4, FP4, any 16 entries) on a GPU: PRMT lookup, tensor cores.

    tensor  shape                    dtype     meaning
    words   [nN, nK, BN, KP]         int16     codes, as `nibbles` says
    absmax  [nN, nK, BN, groups]     float32   of each group of a tile, divided by the table's scale
    form    [0, out, in, table + 1]  of x      the numbers of the layout
    x       [M, K]                   float16, bfloat16
    result  [M, N]                   as x      x @ w.T + bias

w = table[code] * absmax of its block. The product of a group runs over the table's entries in the
dtype of x, into float32; its sum is multiplied by absmax in float32. 1/2 + 4 / g bytes per weight:
0.5625 for blocks of 64.

Rounding: the table's entries to the dtype of x (`lookup`: 2.1e-4 for NF4 in float16, 1.8e-3 in
bfloat16), then as any product of that dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qplug_converters.scheme import Kind
from qplug_converters.weight import CodebookGrid, QuantizedWeight

from ..problem import Kernel, Problem
from . import compat, configs, dequantize, loop, nibbles, planes, workspace
from .compat import jit_for_any, tl
from .configs import Config
from .lookup import decode
from .nibbles import SMALLEST, Form
from .routing import Routing, extent

FEW = 256
"""Most tokens that are multiplied without the weight in memory."""


@jit_for_any("M", "splits")
def codebook_kernel(
    x, words, absmax, bias, y, partial, count, M, N, K, x_stride, many_k, splits,
    BN: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, GROUPS: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr, BIAS: tl.constexpr, JOINED: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TEXT: tl.constexpr,
    QUADS: tl.constexpr, pairs=None, experts=None, weights=None, share=1,
):  # fmt: skip
    """Multiply one tile of outputs by BM tokens over one split of K.

    Programs of the same weights follow each other: all but the first find them in the cache. With
    `experts`, tokens are pairs of a block of `routing`, and the tile is one of that block's expert.
    """
    EACH: tl.constexpr = 4 // GROUPS
    tile_m, tile_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = loop.share(many_k, splits, split)
    tile, tokens = tile_n, tile_m * BM + tl.arange(0, BM)
    source = tokens
    if experts is not None:
        expert = tl.load(experts + tile_m)
        if expert < 0:
            return
        tile += expert * tl.num_programs(1)
        tokens = tl.load(pairs + tokens)
        source = tokens // share
    rows = tokens < M
    column = tl.arange(0, BN)
    start = tile.to(tl.int64) * many_k + first
    w = words + start * (BN * KP) + column[:, None] * KP + tl.arange(0, KP)[None, :]
    s = absmax + start * (BN * GROUPS)
    s += column[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    xp = x + source.to(tl.int64)[:, None] * x_stride
    xp += first * (4 * KP) + loop.reach(EACH, KP, JOINED)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    # With its own number of stages, a loop pipelines loads that feed no product too: absmax.
    for t in tl.range(first, last, num_stages=STAGES):
        w0 = tl.load(w)
        v = decode(w0, TEXT, QUADS, BN, KP, DTYPE, WIDE)
        scales = loop.apart(tl.load(s), GROUPS, BN)
        for g in tl.static_range(GROUPS):
            k = (t * 4 + g * EACH) * KP
            p = loop.products(
                v[g * EACH : (g + 1) * EACH], xp + g * (EACH * KP), x, rows, k, K, EACH, BN, KP,
                DTYPE, WIDE, EVEN_K, False, JOINED,
            )  # fmt: skip
            acc += p * scales[g][:, None]
        w += BN * KP
        s += BN * GROUPS
        xp += 4 * KP
    if weights is not None:
        acc *= tl.load(weights + tokens, mask=rows, other=0.0)[None, :]
    loop.finish(
        acc, y, bias, partial, count, tile_m * tl.num_programs(1) + tile_n, split, splits, tokens,
        tile_n * BN + column, M, N, BN, BM, SPLIT, BIAS, DTYPE, WIDE or weights is not None,
    )  # fmt: skip


@jit_for_any("first", "outputs")
def codebook_slab(
    words, absmax, slab, first, outputs, places, stride, many_k, BN: tl.constexpr,
    KP: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    TEXT: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Decode one tile into `slab`, whose row 0 is the first output of tile `first`."""
    tile_k, tile_n = tl.program_id(0), tl.program_id(1)
    tile = (first + tile_n).to(tl.int64) * many_k + tile_k
    column, r = tl.arange(0, BN), tl.arange(0, KP)
    w = tl.load(words + tile * (BN * KP) + column[:, None] * KP + r[None, :])
    v = decode(w, TEXT, QUADS, BN, KP, DTYPE, WIDE)
    s = absmax + tile * (BN * GROUPS) + column[:, None] * GROUPS
    scales = loop.apart(tl.load(s + tl.arange(0, GROUPS)[None, :]), GROUPS, BN)
    for p in tl.static_range(4):
        value = v[p].to(tl.float32) * scales[p * GROUPS // 4][:, None]
        k = (tile_k * 4 + p) * KP + r
        dequantize.store_plane(
            value, slab, tile_n * BN + column, k, outputs, places, stride, DTYPE, WIDE
        )


@functools.cache
def _constants(form: Form, ptx: bool) -> dict[str, Any]:
    """Return the compile-time numbers of a layout."""
    return {
        "BN": form.columns,
        "KP": form.rows,
        "GROUPS": form.groups,
        "DTYPE": tl.bfloat16 if form.bf16 else tl.float16,
        "WIDE": compat.interpreted(),
        "TEXT": form.lookup.asm if ptx else "",
        "QUADS": () if ptx else form.lookup.quads,
    }


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    if problem.kind is not Kind.CODEBOOK:
        return f"codes are on a grid of kind {problem.kind.value}, not in a table"
    if problem.bits != 4:
        return f"the table is of {problem.bits} bits, and PRMT reads one of 4"
    reason = configs.cannot(problem)
    if reason is None and problem.block % SMALLEST:
        reason = (
            f"blocks of {problem.group_size} weights over rows of {problem.in_features} end at "
            f"inputs that are no multiples of {SMALLEST}, the shortest product of a tile"
        )
    return reason


def prepare(weight: QuantizedWeight, problem: Problem) -> dict[str, Tensor]:
    """Return the operands of the table."""
    grid, device = weight.grid, weight.codes.device
    assert isinstance(grid, CodebookGrid)
    form = nibbles.choose_form(problem)
    configs.ready(form, device)
    return {
        "words": nibbles.pack(weight.codes, form),
        "absmax": nibbles.spread(grid, form),
        "form": form.tensor(device),
    }


def layout(operands: Sequence[Tensor]) -> Form:
    """Return the layout of operands that fit it."""
    form = Form.of(operands)
    many_n, many_k = form.tiles
    wanted = (
        ("words", torch.int16, (many_n, many_k, form.columns, form.rows)),
        ("absmax", torch.float32, (many_n, many_k, form.columns, form.groups)),
    )
    for tensor, (name, dtype, shape) in zip(operands, wanted, strict=False):
        planes.check_tensor(name, tensor, dtype, shape, operands[0].device)
    return form


check = functools.partial(planes.check, layout)


def run(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply `x [M, K]`."""
    form = check(x, operands, bias)
    if x.device.type == "cpu" and not compat.interpreted():
        return reference(x, operands, bias)
    if x.shape[0] > FEW:
        write = functools.partial(write_slab, operands, form)
        return dequantize.multiply(x, form.out_features, form.columns, bias, write)
    return launch(x, operands, bias, configuration(form, x.shape[0], x.device))


def reference(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply in float64 by what the operands mean: the definition, and what runs on a CPU."""
    return planes.product(x, nibbles.reference(operands), bias)


def configuration(form: Form, tokens: int, device: torch.device) -> Config:
    """Return how a number of tokens is multiplied."""
    return settled(configs.choose(form, tokens, device))


def settled(config: Config) -> Config:
    """Return a configuration with 8 warps for 32 tokens: 4 spill 12 to 90 registers (sm_89, 90).

    Fewer tokens take 4 warps of about 250 registers, at 3.8 to 4.1 instructions per weight; 8 of
    128 would take 4.1 to 4.7, and may be the better of the two when they are measured.
    """
    return replace(config, warps=8) if config.tokens == 32 else config


def launch(
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    config: Config,
    routing: Routing | None = None,
) -> Tensor:
    """Multiply `x [M, K]` with one launch, whatever M.

    With `routing`, operands are those of the first of the experts, which lie one behind the other.
    """
    form = Form.of(operands)
    words, absmax = operands[:2]
    x = planes.aligned(x)
    width, (many_n, many_k) = x.shape[1], form.tiles
    tokens, blocks, dtype, more = extent(x, config.tokens, routing)
    wide = compat.interpreted()
    y = x.new_empty((tokens, form.out_features), dtype=torch.float32 if wide else dtype)
    space = workspace.of(x.device)
    splits = config.splits_within(form, blocks, workspace.FLOATS, workspace.COUNTERS)
    with compat.on(x.device):
        codebook_kernel[blocks, many_n, splits](
            x, words, absmax, y if bias is None else bias, y, space.partial, space.count, tokens,
            form.out_features, width, x.stride(0), many_k, splits, **_constants(form, config.ptx),
            BM=config.tokens, SPLIT=splits > 1, EVEN_K=width % form.tile == 0,
            BIAS=bias is not None, JOINED=config.joined, STAGES=config.stages,
            num_warps=config.warps, num_stages=config.stages, **more,
        )  # fmt: skip
    return y.to(dtype)


def write_slab(operands: Sequence[Tensor], form: Form, tile: int, slab: Tensor) -> None:
    """Decode outputs from the first of `tile` on into `slab [n, in_features]`."""
    words, absmax = operands[:2]
    ptx = configs.card(slab.device).arch.startswith("sm_")
    with dequantize.room(slab) as out, compat.on(slab.device):
        codebook_slab[form.tiles[1], -(-len(slab) // form.columns)](
            words, absmax, out, tile, len(slab), form.in_features, out.stride(0), form.tiles[1],
            **_constants(form, ptx),
        )  # fmt: skip


def decode_all(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight `[out, in]` in the dtype of the activations."""
    form = Form.of(operands)
    if operands[0].device.type == "cpu" and not compat.interpreted():
        return nibbles.reference(operands).float().to(form.dtype)
    write = functools.partial(write_slab, operands, form)
    return dequantize.whole(form.out_features, form.in_features, operands[2], write)


KERNEL = Kernel(
    name="triton_codebook",
    title=f"table entries read by PRMT up to {FEW} tokens, above that weights slab by slab",
    cannot=cannot,
    prepare=prepare,
    run=run,
    dequantize=decode_all,
    device="cuda",
)
