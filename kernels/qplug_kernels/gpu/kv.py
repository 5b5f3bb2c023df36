"""Triton kernel that quantizes keys and values and writes them into a paged cache.

Operands, formula and the PyTorch that defines the bits: `qplug_kernels.kv`.

One program takes one token and as many heads as fill about 1024 numbers, of keys and of values, so
that each of 128 threads reads 16 bytes of either before it writes any. A row of the tile is a head:
the absmax of a token and head is a reduction along it. Offsets are 64 bits wide from the slot on.

Floats of 8 bits are rounded once, from float32, by one of two ways with the same bits:

    PTX, sm_89 and above   cvt.rn.satfinite, two numbers an instruction. As text, since Triton's own
                           cast goes through float16 on sm_89, which rounds twice, does not exist
                           below, and loses carries in the interpreter of 3.9 (31.4 becomes 16).
    everywhere else        integer operations, about 12 a number: sm_75 to sm_86, AMD (whose
                           compiler aborts on some casts), the interpreter.
"""

from __future__ import annotations

from struct import pack, unpack
from typing import Any

import torch
from torch import Tensor

from ..kv import CODES, check
from .compat import jit, jit_for_any, on, tl
from .configs import card

TILE = 1024
"""Most numbers of keys, and of values, in one program."""

PER_THREAD = 8
"""Numbers of 16 bits that a thread reads at once."""


def _text(ptx: str) -> str:
    """Return PTX that makes four codes, one register, out of four registers of float32."""
    return (
        "{ .reg .b16 low, high;"
        f" cvt.rn.satfinite.{ptx}x2.f32 low, $2, $1;"
        f" cvt.rn.satfinite.{ptx}x2.f32 high, $4, $3;"
        " mov.b32 $0, {low, high}; }"
    )


@jit
def integer_codes(x):
    """Return int8 codes of float32 `x` as bytes."""
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -128.0), 127.0), 0.0)
    # The last place of 1.5 * 2^23 is 1: the sum is rounded to the nearest even integer.
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.uint8)


@jit
def float_codes(
    x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, NAN: tl.constexpr
):
    """Return codes of 8-bit floats of float32 `x` as bytes; LARGEST as the bits of a float32."""
    shift: tl.constexpr = 23 - MANTISSA
    half: tl.constexpr = (1 << (shift - 1)) - 1
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    capped = tl.minimum(magnitude, LARGEST)
    # A carry out of the mantissa is the next exponent.
    normal = ((capped + half + ((capped >> shift) & 1)) >> shift) - ((127 - BIAS) << MANTISSA)
    # The last place of this power of two is the smallest number of the format.
    power: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    power_bits: tl.constexpr = (151 - BIAS - MANTISSA) << 23
    small = (capped.to(tl.float32, bitcast=True) + power).to(tl.int32, bitcast=True) - power_bits
    codes = tl.where(capped < ((128 - BIAS) << 23), small, normal)
    signed = codes | ((bits >> 24) & 0x80)
    # Where NaN takes the place of negative zero, there is none.
    codes = tl.where(codes == 0, 0, signed) if NAN == 0x80 else signed
    return tl.where(magnitude > 0x7F800000, NAN, codes).to(tl.uint8)


@jit
def codes_of(
    x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, NAN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Return codes of float32 `x` as bytes."""
    if MANTISSA == 0:
        return integer_codes(x)
    if ASM == "":
        return float_codes(x, MANTISSA, BIAS, LARGEST, NAN)
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4)


@jit
def write_heads(
    x, inside, cache, columns, scales, given,
    MAXIMUM: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr,
    NAN: tl.constexpr, DYNAMIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Quantize heads `x` and write them; `cache` and `scales` point at the heads of one slot."""
    x = x.to(tl.float32)
    if DYNAMIC:
        magnitude = tl.where(x == x, tl.minimum(tl.abs(x), 3.4028234663852886e38), 0.0)
        scale = tl.div_rn(tl.max(magnitude, 1), tl.full([x.shape[0]], MAXIMUM, tl.float32))
        scale = tl.maximum(scale, 1.1754943508222875e-38)
        tl.store(scales, scale, mask=given)
    else:
        scale = tl.load(scales, mask=given, other=1.0)
    codes = codes_of(tl.div_rn(x, scale[:, None].broadcast_to(x.shape)),
                     MANTISSA, BIAS, LARGEST, NAN, ASM)  # fmt: skip
    tl.store(cache[:, None] + columns[None, :], codes, mask=inside)


@jit_for_any("slots")
def kv_kernel(
    key, value, key_cache, value_cache, k_scales, v_scales, slot_mapping, slots,
    key_token, key_head, value_token, value_head,
    kc_block, kc_place, kc_head, vc_block, vc_place, vc_head,
    ks_block, ks_place, ks_head, vs_block, vs_place, vs_head,
    HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_KEY: tl.constexpr,
    TILE_VALUE: tl.constexpr, MAXIMUM: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    LARGEST: tl.constexpr, NAN: tl.constexpr, DYNAMIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Strides are in elements, of `[token, head]`, `[block, place, head]`; given scales have 0."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if (slot < 0) | (slot >= slots):
        return
    block = slot // BLOCK_SIZE
    place = slot % BLOCK_SIZE
    heads = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    given = heads < HEADS
    heads = heads.to(tl.int64)

    key_columns = tl.arange(0, TILE_KEY)
    key_inside = given[:, None] & (key_columns < KEY_SIZE)[None, :]
    k = tl.load(key + token * key_token + heads[:, None] * key_head + key_columns[None, :],
                mask=key_inside, other=0.0)  # fmt: skip
    value_columns = tl.arange(0, TILE_VALUE)
    value_inside = given[:, None] & (value_columns < VALUE_SIZE)[None, :]
    v = tl.load(value + token * value_token + heads[:, None] * value_head + value_columns[None, :],
                mask=value_inside, other=0.0)  # fmt: skip

    write_heads(
        k, key_inside, key_cache + block * kc_block + place * kc_place + heads * kc_head,
        key_columns, k_scales + block * ks_block + place * ks_place + heads * ks_head, given,
        MAXIMUM, MANTISSA, BIAS, LARGEST, NAN, DYNAMIC, ASM,
    )  # fmt: skip
    write_heads(
        v, value_inside, value_cache + block * vc_block + place * vc_place + heads * vc_head,
        value_columns, v_scales + block * vs_block + place * vs_place + heads * vs_head, given,
        MAXIMUM, MANTISSA, BIAS, LARGEST, NAN, DYNAMIC, ASM,
    )  # fmt: skip


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def constants(
    heads: int,
    key_size: int,
    value_size: int,
    block_size: int,
    dtype: torch.dtype,
    dynamic: bool,
    convert: bool,
) -> dict[str, Any]:
    """Return what the kernel is compiled for; `convert`: the device has PTX's conversions."""
    code = CODES[dtype]
    tile_key, tile_value = _power_of_two(key_size), _power_of_two(value_size)
    tile_heads = min(_power_of_two(heads), max(1, TILE // max(tile_key, tile_value)))
    return {
        "HEADS": heads,
        "KEY_SIZE": key_size,
        "VALUE_SIZE": value_size,
        "BLOCK_SIZE": block_size,
        "TILE_HEADS": tile_heads,
        "TILE_KEY": tile_key,
        "TILE_VALUE": tile_value,
        "MAXIMUM": code.largest,
        "MANTISSA": code.mantissa,
        "BIAS": code.bias,
        "LARGEST": unpack("i", pack("f", code.largest))[0],
        "NAN": code.nan,
        "DYNAMIC": dynamic,
        "ASM": _text(code.ptx) if convert and code.ptx else "",
    }


def converts(arch: str) -> bool:
    """Whether a card has PTX's conversions to floats of 8 bits."""
    return arch.startswith("sm_") and int(arch[3:]) >= 89


def _scale_strides(scales: Tensor, dynamic: bool) -> tuple[int, ...]:
    """Return strides over blocks, places and heads."""
    if dynamic:
        return scales.stride()
    return (0, 0, scales.stride(0) if scales.numel() > 1 else 0)


def scatter(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    dynamic: bool,
) -> None:
    """Launch the kernel.

    Parameters
    ----------
    key, value, key_cache, value_cache, slot_mapping
        As in the table of `qplug_kernels.kv`.
    k_scales, v_scales
        Scales, or, if `dynamic`, the caches of scales.

    Raises
    ------
    ValueError
        If an operand is not what the table says, before the launch.
    """
    check(key, value, key_cache, value_cache, slot_mapping, k_scales, v_scales, dynamic)
    _, heads, key_size = key.shape
    if not slot_mapping.numel() or not key_cache.numel() or not value_cache.numel():
        return
    block_size = key_cache.shape[1]
    arch = card(key.device).arch
    constexprs = constants(
        heads, key_size, value.shape[2], block_size, key_cache.dtype, dynamic, converts(arch)
    )
    tile_heads = constexprs["TILE_HEADS"]
    tile = tile_heads * max(constexprs["TILE_KEY"], constexprs["TILE_VALUE"])
    lanes = 64 if arch.startswith("gfx9") else 32
    grid = (slot_mapping.shape[0], -(-heads // tile_heads))
    with on(key.device):
        kv_kernel[grid](
            key, value, key_cache.view(torch.uint8), value_cache.view(torch.uint8),
            k_scales, v_scales, slot_mapping, key_cache.shape[0] * block_size,
            *key.stride()[:2], *value.stride()[:2],
            *key_cache.stride()[:3], *value_cache.stride()[:3],
            *_scale_strides(k_scales, dynamic), *_scale_strides(v_scales, dynamic),
            **constexprs, num_warps=max(1, tile // (PER_THREAD * lanes)), enable_fp_fusion=False,
        )  # fmt: skip
