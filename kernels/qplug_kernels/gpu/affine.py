"""2, 3, 4 and 8-bit integers on a GPU, few tokens: planes decoded in registers, tensor cores.

    tensor  shape                    dtype     meaning
    words   [nN, nK, words, BN, KP]  int16     codes, as `planes` says
    scales  [nN, nS, BN, groups]     int32     scale, and magic + zero, of each output and group
                                     int16     scale alone (symmetric)
    form    [0, ...]                 of x      the numbers of the layout
    order   [nK * BK], absent when   int32     the input at each place, -1 where there is none
            inputs are in order
    x       [M, K]                   float16, bfloat16
    result  [M, N]                   as x      x @ w.T + bias

w = (code - zero) * scale. The product of a group runs over the exact integers code - zero, in the
dtype of x, into float32; its sum is multiplied by the scale in float32. So a result has one
rounding of products in the tensor core's float32 sums and one to the dtype of x. bits / 8 + 4 / g
bytes per weight, 2 / g where no zeros are stored.

Rounding: scales that a file holds in float32 are rounded to float16 (2^-11). Offsets that a file
holds instead of zeros (awq_gemv_fast, llm_awq) are taken for the zeros that they were made of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qplug_converters.weight import QuantizedWeight

from ..grids import with_zeros
from ..problem import Kernel, Problem
from . import asm, compat, configs, dequantize, loop, planes, workspace
from .compat import jit_for_any, tl
from .configs import Config
from .form import Form
from .gather import gather
from .routing import Routing, extent

FEW = 256
"""Most tokens of the loop over packed words. By arithmetic alone (H200, 4096 x 28672, 4 bits): each
64 tokens take 11 us of instructions and more, decoding to memory 69 us before the first product."""

ALL = 30
"""The shift that leaves of every tile's number 0."""


@jit_for_any("M", "splits")
def affine_kernel(
    x, words, scales, order, bias, y, partial, count, M, N, K, x_stride, many_k, splits,
    BITS: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
    GROUPS: tl.constexpr, SYMMETRIC: tl.constexpr, SHIFT: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, BIAS: tl.constexpr, GATHER: tl.constexpr, JOINED: tl.constexpr,
    DTYPE: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr, TEXTS: tl.constexpr,
    CONSTRAINTS: tl.constexpr, STAGES: tl.constexpr, pairs=None, experts=None,
    weights=None, share=1,
):  # fmt: skip
    """Multiply one tile of outputs by BM tokens over one split of K.

    With `experts`, by BM pairs of a block of `routing`, and the tile is one of that expert.
    """
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    EACH: tl.constexpr = PLANES // GROUPS
    # Programs that follow each other read the same weights.
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
        if GATHER:
            order += expert.to(tl.int64) * (many_k * PLANES * KP)
    rows = tokens < M
    column = tl.arange(0, BN)
    start = tile.to(tl.int64) * many_k
    w = words + (start + first) * (WORDS * BN * KP)
    w += column[:, None] * KP + tl.arange(0, KP)[None, :]
    if SHIFT:
        groups = (many_k + (1 << SHIFT) - 1) >> SHIFT
        s = scales + tile.to(tl.int64) * groups * BN + column[:, None]
    else:
        s = scales + (start + first) * (GROUPS * BN)
        s += column[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    xp = x + source.to(tl.int64)[:, None] * x_stride
    if not GATHER:
        xp += first * (PLANES * KP) + loop.reach(EACH, KP, JOINED)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for t in tl.range(first, last, num_stages=STAGES):
        w0 = tl.load(w)
        w1 = tl.load(w + BN * KP) if WORDS == 3 else w0
        w2 = tl.load(w + 2 * BN * KP) if WORDS == 3 else w0
        group_words = loop.apart(tl.load(s + ((t >> SHIFT) * BN if SHIFT else 0)), GROUPS, BN)
        for g in tl.static_range(GROUPS):
            word = group_words[g]
            scale = asm.as_float(word.to(tl.int16), SCALE, True)
            zero = loop.zero_of(word, w0, BITS, SYMMETRIC, BN, KP, DTYPE, WIDE, CONSTRAINTS)
            v = loop.decode(w0, w1, w2, zero, BITS, g * EACH, EACH, DTYPE, WIDE, TEXTS, CONSTRAINTS)
            k = (t * PLANES + g * EACH) * KP
            here = xp if GATHER else xp + g * (EACH * KP)
            p = loop.products(
                v, here, order, rows, k, K, EACH, BN, KP, DTYPE, WIDE, EVEN_K, GATHER, JOINED
            )
            acc += p * scale[:, None]
        w += WORDS * BN * KP
        if not GATHER:
            xp += PLANES * KP
        if not SHIFT:
            s += GROUPS * BN
    if weights is not None:
        acc *= tl.load(weights + tokens, mask=rows, other=0.0)[None, :]
    loop.finish(
        acc, y, bias, partial, count, tile_m * tl.num_programs(1) + tile_n, split, splits, tokens,
        tile_n * BN + column, M, N, BN, BM, SPLIT, BIAS, DTYPE, WIDE or weights is not None,
    )  # fmt: skip


@jit_for_any("first", "outputs")
def affine_slab(
    words, scales, slab, first, outputs, places, stride, many_k, BITS: tl.constexpr,
    BN: tl.constexpr, KP: tl.constexpr, GROUPS: tl.constexpr, SYMMETRIC: tl.constexpr,
    SHIFT: tl.constexpr, DTYPE: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr,
    TEXTS: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Decode one tile into `slab`, whose row 0 is the first output of tile `first`."""
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    EACH: tl.constexpr = PLANES // GROUPS
    tile_k, tile_n = tl.program_id(0), tl.program_id(1)
    tile = (first + tile_n).to(tl.int64)
    column, r = tl.arange(0, BN)[:, None], tl.arange(0, KP)
    w = words + (tile * many_k + tile_k) * (WORDS * BN * KP) + column * KP + r[None, :]
    w0 = tl.load(w)
    w1 = tl.load(w + BN * KP) if WORDS == 3 else w0
    w2 = tl.load(w + 2 * BN * KP) if WORDS == 3 else w0
    if SHIFT:
        groups = (many_k + (1 << SHIFT) - 1) >> SHIFT
        s = scales + (tile * groups + (tile_k >> SHIFT)) * BN + column
    else:
        s = scales + (tile * many_k + tile_k) * (GROUPS * BN)
        s += column * GROUPS + tl.arange(0, GROUPS)[None, :]
    group_words = loop.apart(tl.load(s), GROUPS, BN)
    for g in tl.static_range(GROUPS):
        word = group_words[g]
        scale = asm.as_float(word.to(tl.int16), SCALE, True)[:, None]
        zero = loop.zero_of(word, w0, BITS, SYMMETRIC, BN, KP, DTYPE, WIDE, CONSTRAINTS)
        v = loop.decode(w0, w1, w2, zero, BITS, g * EACH, EACH, DTYPE, WIDE, TEXTS, CONSTRAINTS)
        for n in tl.static_range(EACH):
            k = (tile_k * PLANES + g * EACH + n) * KP + r
            dequantize.store_plane(
                v[n].to(tl.float32) * scale, slab, tile_n * BN + tl.arange(0, BN), k, outputs,
                places, stride, DTYPE, WIDE,
            )  # fmt: skip


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    return configs.cannot(problem) or planes.cannot(problem)


def prepare(weight: QuantizedWeight, problem: Problem) -> dict[str, Tensor]:
    """Return the operands of the table, on the device of the weight."""
    device, weight = weight.codes.device, with_zeros(weight)
    places = planes.arrange(weight, problem)
    form = planes.choose_form(weight, problem, places)
    configs.ready(form, device)
    return planes.encode(weight, form, places)


def _shift(form: Form) -> int:
    """Return the power of two of tiles in a group; of all tiles, one for every length."""
    if form.group <= form.tile:
        return 0
    return ALL if form.groups == 1 else (form.group // form.tile).bit_length() - 1


@functools.cache
def constants(form: Form, ptx: bool, interpreted: bool) -> dict[str, Any]:
    """Return the compile-time numbers of a layout."""
    groups = form.groups_of_tile
    each = form.planes // groups
    texts = (
        tuple(asm.text(form.bits, form.bf16, form.symmetric, n * each, each) for n in range(groups))
        if ptx
        else ()
    )
    return {
        "BITS": form.bits,
        "BN": form.columns,
        "KP": form.rows,
        "GROUPS": groups,
        "SYMMETRIC": form.symmetric,
        "SHIFT": _shift(form),
        "DTYPE": tl.bfloat16 if form.bf16 else tl.float16,
        "SCALE": tl.bfloat16 if form.bf16_scales else tl.float16,
        "WIDE": interpreted,
        "TEXTS": texts,
        "CONSTRAINTS": asm.constraints(each) if ptx else "",
    }


def layout(operands: Sequence[Tensor]) -> Form:
    """Return the layout of operands that fit it."""
    form = Form.of(operands)
    planes.check_operands(form, operands)
    return form


check = functools.partial(planes.check, layout)


def run(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply `x [M, K]`."""
    form = check(x, operands, bias)
    if x.device.type == "cpu" and not compat.interpreted():
        return reference(x, operands, bias)
    if x.shape[0] > FEW:
        return multiply_many(x, operands, bias, form)
    return launch(x, operands, bias, configs.choose(form, x.shape[0], x.device))


def reference(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply in float64 by the exact weight: the definition, and what runs on a CPU."""
    return planes.product(x, planes.dequantize(Form.of(operands), operands), bias)


def multiply_many(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, form: Form) -> Tensor:
    """Multiply many tokens: a slab of outputs decoded, torch's product, the next slab."""
    if len(operands) == 4:
        x = gather(x, operands[3])
    write = functools.partial(write_slab, operands, form)
    return dequantize.multiply(x, form.out_features, form.columns, bias, write)


def write_slab(operands: Sequence[Tensor], form: Form, tile: int, slab: Tensor) -> None:
    """Decode outputs from the first of `tile` on into `slab [n, places]`."""
    words, scales = operands[:2]
    ptx = configs.card(slab.device).arch.startswith("sm_")
    with dequantize.room(slab) as out, compat.on(slab.device):
        affine_slab[form.tiles[1], -(-len(slab) // form.columns)](
            words, scales, out, tile, len(slab), form.places, out.stride(0), form.tiles[1],
            **constants(form, ptx, compat.interpreted()),
        )  # fmt: skip


def launch(
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    config: Config,
    routing: Routing | None = None,
) -> Tensor:
    """Multiply `x [M, K]` with one launch, and one that gathers, whatever M.

    With `routing`, operands are those of the first of the experts, which lie one behind the other;
    what each of them gathers it gathers in the loop.
    """
    form = Form.of(operands)
    words, scales, _, *ordered = operands
    order = ordered[0] if ordered else None
    if order is not None and routing is None and not config.gathers:
        x, order = gather(x, order), None
    x = planes.aligned(x)
    width, (many_n, many_k) = x.shape[1], form.tiles
    tokens, blocks, dtype, more = extent(x, config.tokens, routing)
    interpreted = compat.interpreted()
    y = x.new_empty((tokens, form.out_features), dtype=torch.float32 if interpreted else dtype)
    space = workspace.of(x.device)
    splits = config.splits_within(form, blocks, workspace.FLOATS, workspace.COUNTERS)
    with compat.on(x.device):
        affine_kernel[blocks, many_n, splits](
            x, words, scales, words if order is None else order, y if bias is None else bias, y,
            space.partial, space.count, tokens, form.out_features, width, x.stride(0), many_k,
            splits, **constants(form, config.ptx, interpreted),
            BM=config.tokens, SPLIT=splits > 1, EVEN_K=form.places % form.tile == 0,
            BIAS=bias is not None, GATHER=order is not None,
            JOINED=config.joined, STAGES=config.stages,
            num_warps=config.warps, num_stages=config.stages, **more,
        )  # fmt: skip
    return y.to(dtype)


def decode_all(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight `[out, in]` in the dtype of the activations, inputs in their own order."""
    form = Form.of(operands)
    if operands[0].device.type == "cpu" and not compat.interpreted():
        return planes.dequantize(form, operands).float().to(form.dtype)
    write = functools.partial(write_slab, operands, form)
    weight = dequantize.whole(form.out_features, form.places, operands[2], write)
    return weight if len(operands) == 3 else planes.scatter(weight, operands[3], form.in_features)


KERNEL = Kernel(
    name="triton_affine",
    title=f"integers decoded in registers up to {FEW} tokens, above that weights slab by slab",
    cannot=cannot,
    prepare=prepare,
    run=run,
    dequantize=decode_all,
    device="cuda",
)
