"""8-bit rows (LLM.int8) on a GPU: integers decoded in registers, one scale for each output.

    tensor  shape                 dtype     meaning
    words   [nN, nK, 1, BN, KP]   int16     codes, as `planes` says
    scales  [nN * BN]             float32   absmax / 127 of each output
    form    [0, ...]              of x      the numbers of the layout
    x       [M, K]                float16, bfloat16
    result  [M, N]                as x      x @ w.T + bias

w = (code - 128) * absmax / 127. The product runs over the exact integers code - 128, in the dtype
of x, into float32, and is scaled once, in float32, at the end. 1 byte per weight.

Outlier columns. LLM.int8 rounds each token of x to 8 bits by its largest input, which ruins the
others where one input is far larger; so inputs with a value above a threshold (6.0) in any token
are taken out of that product, kept in 16 bits, and multiplied by 16-bit weights, decoded from the
same int8 rows. Files hold nothing about them: which inputs they are is a property of x. Here every
input is multiplied in 16 bits by the weights that LLM.int8 multiplies its outlier columns by: all
columns are outlier columns, the rounding of x does not happen, and there is no threshold to cross.
The result is nearer to x @ w.T than LLM.int8's own at every threshold (a test computes both;
docs/adr/0009).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qplug_converters.scheme import Kind
from qplug_converters.weight import INVERSE_127, QuantizedWeight, RowGrid

from ..problem import Kernel, Problem
from . import asm, compat, configs, dequantize, loop, planes, workspace
from .compat import jit, jit_for_any, tl
from .configs import Config
from .form import COLUMNS, Form
from .routing import Routing, extent

FEW = 256
"""Most tokens that are multiplied without the weight in memory."""

ROWS = 64
"""KP. 128 saves 0.1 to 0.3 instructions per weight (2.0 of 2.1 on sm_80, 2.3 of 2.4 on sm_90,
16 tokens) and costs half as many registers more, spills some of them on sm_100, and takes twice the
shared memory. A byte per weight leaves an H200 time for 7."""


@jit
def integers(
    words, BN: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    TEXTS: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Return code - 128 of both planes `[BN, KP]`."""
    zero = loop.zero_of(words, words, 8, True, BN, KP, DTYPE, WIDE, CONSTRAINTS)
    return loop.decode(words, words, words, zero, 8, 0, 2, DTYPE, WIDE, TEXTS, CONSTRAINTS)


@jit_for_any("M", "splits")
def rows_kernel(
    x, words, scales, bias, y, partial, count, M, N, K, x_stride, many_k, splits,
    BN: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, BIAS: tl.constexpr, JOINED: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr, TEXTS: tl.constexpr, CONSTRAINTS: tl.constexpr,
    pairs=None, experts=None, weights=None, share=1,
):  # fmt: skip
    """Multiply one tile of outputs by BM tokens over one split of K.

    Programs of the same weights follow each other: all but the first find them in the cache. With
    `experts`, tokens are pairs of a block of `routing`, and the tile is one of that block's expert.
    """
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
    w = words + (tile.to(tl.int64) * many_k + first) * (BN * KP)
    w += column[:, None] * KP + tl.arange(0, KP)[None, :]
    xp = x + source.to(tl.int64)[:, None] * x_stride
    xp += loop.reach(2, KP, JOINED)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for t in range(first, last):
        w0 = tl.load(w)
        v = integers(w0, BN, KP, DTYPE, WIDE, TEXTS, CONSTRAINTS)
        # Carried along, as other loops do, `xp` costs 0.04 instructions per weight more here.
        k = t * (2 * KP)
        acc = loop.products(
            v, xp + k, x, rows, k, K, 2, BN, KP, DTYPE, WIDE, EVEN_K, False, JOINED, acc
        )
        w += BN * KP
    acc = acc * tl.load(scales + tile * BN + column)[:, None]
    if weights is not None:
        acc *= tl.load(weights + tokens, mask=rows, other=0.0)[None, :]
    loop.finish(
        acc, y, bias, partial, count, tile_m * tl.num_programs(1) + tile_n, split, splits, tokens,
        tile_n * BN + column, M, N, BN, BM, SPLIT, BIAS, DTYPE, WIDE or weights is not None,
    )  # fmt: skip


@jit_for_any("first", "outputs")
def rows_slab(
    words, scales, slab, first, outputs, places, stride, many_k, BN: tl.constexpr,
    KP: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TEXTS: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Decode one tile into `slab`, whose row 0 is the first output of tile `first`."""
    tile_k, tile_n = tl.program_id(0), tl.program_id(1)
    tile = (first + tile_n).to(tl.int64) * many_k + tile_k
    column, r = tl.arange(0, BN), tl.arange(0, KP)
    w = tl.load(words + tile * (BN * KP) + column[:, None] * KP + r[None, :])
    v = integers(w, BN, KP, DTYPE, WIDE, TEXTS, CONSTRAINTS)
    scale = tl.load(scales + (first + tile_n) * BN + column)
    for p in tl.static_range(2):
        value = v[p].to(tl.float32) * scale[:, None]
        k = (tile_k * 2 + p) * KP + r
        dequantize.store_plane(
            value, slab, tile_n * BN + column, k, outputs, places, stride, DTYPE, WIDE
        )


@functools.cache
def _constants(form: Form, ptx: bool) -> dict[str, Any]:
    """Return the compile-time numbers of a layout."""
    return {
        "BN": form.columns,
        "KP": form.rows,
        "DTYPE": tl.bfloat16 if form.bf16 else tl.float16,
        "WIDE": compat.interpreted(),
        "TEXTS": (asm.text(8, form.bf16, True, 0, 2),) if ptx else (),
        "CONSTRAINTS": asm.constraints(2) if ptx else "",
    }


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    if problem.kind is not Kind.ROWS:
        return f"weights lie on a grid of kind {problem.kind.value}, not one of 8-bit rows"
    return configs.cannot(problem)


def prepare(weight: QuantizedWeight, problem: Problem) -> dict[str, Tensor]:
    """Return the operands of the table."""
    grid, device, count = weight.grid, weight.codes.device, weight.in_features
    assert isinstance(grid, RowGrid)
    bf16 = problem.dtype == torch.bfloat16
    whole = -(-count // (2 * ROWS)) * 2 * ROWS
    form = Form(weight.out_features, count, count, 8, ROWS, COLUMNS, whole, bf16, False)
    configs.ready(form, device)
    scales = grid.absmax.float() * INVERSE_127
    padding = form.tiles[0] * form.columns - weight.out_features
    return {
        "words": planes.pack(weight.codes, form),
        "scales": torch.nn.functional.pad(scales, (0, padding)),
        "form": form.tensor(device),
    }


def layout(operands: Sequence[Tensor]) -> Form:
    """Return the layout of operands that fit it."""
    form = Form.of(operands)
    many_n, many_k = form.tiles
    wanted = (
        ("words", torch.int16, (many_n, many_k, 1, form.columns, form.rows)),
        ("scales", torch.float32, (many_n * form.columns,)),
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
    return launch(x, operands, bias, configs.choose(form, x.shape[0], x.device))


def meaning(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight float64 `[out, in]` that the operands mean."""
    words, scales, _ = operands
    form = Form.of(operands)
    codes = planes.unpack(words, form)[: form.out_features, : form.in_features]
    return (codes.double() - 128) * scales[: form.out_features].double()[:, None]


def reference(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply in float64 by what the operands mean: the definition, and what runs on a CPU."""
    return planes.product(x, meaning(operands), bias)


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
    words, scales = operands[:2]
    x = planes.aligned(x)
    width, (many_n, many_k) = x.shape[1], form.tiles
    tokens, blocks, dtype, more = extent(x, config.tokens, routing)
    wide = compat.interpreted()
    y = x.new_empty((tokens, form.out_features), dtype=torch.float32 if wide else dtype)
    space = workspace.of(x.device)
    splits = config.splits_within(form, blocks, workspace.FLOATS, workspace.COUNTERS)
    with compat.on(x.device):
        rows_kernel[blocks, many_n, splits](
            x, words, scales, y if bias is None else bias, y, space.partial, space.count, tokens,
            form.out_features, width, x.stride(0), many_k, splits, **_constants(form, config.ptx),
            BM=config.tokens, SPLIT=splits > 1, EVEN_K=width % form.tile == 0,
            BIAS=bias is not None, JOINED=config.joined, num_warps=config.warps,
            num_stages=config.stages, **more,
        )  # fmt: skip
    return y.to(dtype)


def write_slab(operands: Sequence[Tensor], form: Form, tile: int, slab: Tensor) -> None:
    """Decode outputs from the first of `tile` on into `slab [n, in_features]`."""
    words, scales = operands[:2]
    ptx = configs.card(slab.device).arch.startswith("sm_")
    with dequantize.room(slab) as out, compat.on(slab.device):
        rows_slab[form.tiles[1], -(-len(slab) // form.columns)](
            words, scales, out, tile, len(slab), form.in_features, out.stride(0), form.tiles[1],
            **_constants(form, ptx),
        )  # fmt: skip


def decode_all(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight `[out, in]` in the dtype of the activations."""
    form = Form.of(operands)
    if operands[0].device.type == "cpu" and not compat.interpreted():
        return meaning(operands).float().to(form.dtype)
    write = functools.partial(write_slab, operands, form)
    return dequantize.whole(form.out_features, form.in_features, operands[2], write)


KERNEL = Kernel(
    name="triton_rows",
    title=f"8-bit integers decoded in registers up to {FEW} tokens, above that slab by slab",
    cannot=cannot,
    prepare=prepare,
    run=run,
    dequantize=decode_all,
    device="cuda",
)
