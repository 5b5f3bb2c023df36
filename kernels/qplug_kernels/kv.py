"""Keys and values quantized to 8 bits and written into a paged cache: what it means, and the ops.

    tensor              shape                                    dtype
    key, value          [tokens, kv_heads, head_size]            float16, bfloat16 or float32
    key_cache,          [blocks, block_size, kv_heads,           int8, float8_e4m3fn, float8_e5m2
      value_cache         head_size]                               or float8_e4m3fnuz
    slot_mapping        [slots], slots <= tokens                 int64 or int32
    k_scale, v_scale    [] or [1], per tensor; [kv_heads]        float32
    k_scale_cache,      [blocks, block_size, kv_heads]           float32
      v_scale_cache

Token t goes to place `slot % block_size` of block `slot // block_size`, slot = slot_mapping[t]. A
negative slot is padding: nothing is written. Tokens behind the end of `slot_mapping` are padding
too. Two tokens with one slot leave either of them. A value's head size may differ from a key's.

    code = encode(float32(x) / scale)         scale given, or of a token and head: absmax / largest

in float32, both divisions rounded to nearest, then rounded once to the nearest code (ties to even)
and saturated; `LARGEST` is 127, 448, 57344 or 240. x = code * scale. A NaN stays NaN in floats of
8 bits (one bit pattern, no sign) and becomes 0 in int8. A scale out of an absmax leaves NaN out,
takes infinity for the largest float32 and is at least 2^-126: it is always finite and positive.

Caches may have any strides but 1 for the head's elements, which covers every order that vLLM uses:
NHD, HND, keys and values in one tensor, and scales kept in the same page. The same bits as vLLM's
`reshape_and_cache_flash` for given scales; its dynamic scales are at least 1e-6, it multiplies by
their reciprocals and rounds int8 ties away from 0, so some codes differ by one.

One token of 8 heads of 128: 4096 bytes read (16-bit), 2048 + 64 (scales) written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A way to write a number in 8 bits.

    Attributes
    ----------
    largest
        The largest number; where an absmax goes.
    mantissa, bias
        Of a float of 8 bits: how many bits of mantissa, and what is subtracted from the exponent.
        0 in integers.
    nan
        The bits of NaN; in integers, those of 0.
    ptx
        Its name in the conversions of PTX, where they have it.
    """

    largest: float
    mantissa: int = 0
    bias: int = 0
    nan: int = 0
    ptx: str = ""


CODES = {
    torch.int8: Code(largest=127.0),
    torch.float8_e4m3fn: Code(largest=448.0, mantissa=3, bias=7, nan=0x7F, ptx="e4m3"),
    torch.float8_e5m2: Code(largest=57344.0, mantissa=2, bias=15, nan=0x7F, ptx="e5m2"),
    torch.float8_e4m3fnuz: Code(largest=240.0, mantissa=3, bias=8, nan=0x80),
}
"""What a cache may hold. `float8_e4m3fnuz` is what AMD's gfx942 multiplies: no negative zero."""

SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32: no device flushes it, and 0 divided by it is 0."""


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes of float32 `x` in a dtype out of `CODES`: nearest, ties to even, saturated.

    This defines the bits.
    """
    code = CODES[dtype]
    if dtype == torch.int8:
        # NaN becomes 0; round() ties to even.
        return x.nan_to_num(0.0).clamp(-128, 127).round().to(torch.int8)
    codes = x.clamp(-code.largest, code.largest).to(dtype).view(torch.uint8)
    return codes.masked_fill(x.isnan(), code.nan).view(dtype)


def dynamic_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 scales `[tokens, kv_heads]` of `x [tokens, kv_heads, head_size]`."""
    magnitude = x.float().abs().nan_to_num(0.0, posinf=torch.finfo(torch.float32).max)
    return (magnitude.amax(-1) / CODES[dtype].largest).clamp_min(SMALLEST_SCALE)


def _scatter(x: Tensor, cache: Tensor, slots: Tensor, scales: Tensor) -> None:
    """Write tokens `x` with scales that broadcast to them into the slots of a cache."""
    codes = encode(x.float() / scales, cache.dtype)
    blocks, places = slots // cache.shape[1], slots % cache.shape[1]
    cache.view(torch.uint8)[blocks, places] = codes.view(torch.uint8)


def _live(x: Tensor, cache: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that have a slot, and their slots."""
    live = slot_mapping >= 0
    slots = slot_mapping[live].long()
    capacity = cache.shape[0] * cache.shape[1]
    if slots.numel() and int(slots.max()) >= capacity:
        raise IndexError(f"slot_mapping holds slot {int(slots.max())}, the cache has {capacity}")
    return x[: len(slot_mapping)][live], slots


def check(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    dynamic: bool,
) -> None:
    """Refuse operands that are not those of the table.

    Raises
    ------
    ValueError
        Naming the operand, what it is and what it should be.
    """
    heads = key.shape[1] if key.dim() == 3 else -1
    for name, x, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if x.dim() != 3 or x.shape[:2] != key.shape[:2]:
            same = "" if name == "key" else f", tokens and heads as in key {list(key.shape)}"
            raise ValueError(
                f"{name} is {list(x.shape)}, expected [tokens, kv_heads, head_size]{same}"
            )
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dtype != key.dtype:
            raise ValueError(
                f"{name} is {x.dtype} beside {key.dtype} keys, expected float16, bfloat16 or "
                "float32, the same for both"
            )
        if cache.dim() != 4 or cache.shape[2:] != x.shape[1:] or cache.shape[1] == 0:
            raise ValueError(
                f"{name}_cache is {list(cache.shape)}, "
                f"expected [blocks, block_size, {x.shape[1]}, {x.shape[2]}]"
            )
        if cache.shape[:2] != key_cache.shape[:2]:
            raise ValueError(
                f"value_cache has blocks {list(cache.shape[:2])}, key_cache "
                f"{list(key_cache.shape[:2])}; expected the same"
            )
        if cache.dtype not in CODES or cache.dtype != key_cache.dtype:
            raise ValueError(
                f"{name}_cache is {cache.dtype} beside {key_cache.dtype} keys, expected one of "
                f"{', '.join(str(dtype) for dtype in CODES)}, the same for both "
                "(view a cache of bytes as one of them)"
            )
        for what, tensor in ((name, x), (f"{name}_cache", cache)):
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(
                    f"{what} has strides {list(tensor.stride())}, expected 1 for the last axis"
                )
    if slot_mapping.dim() != 1 or slot_mapping.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"slot_mapping is {slot_mapping.dtype} {list(slot_mapping.shape)}, "
            "expected int64 or int32 [slots]"
        )
    if slot_mapping.shape[0] > key.shape[0]:
        raise ValueError(f"slot_mapping has {slot_mapping.shape[0]} slots for {key.shape[0]} keys")
    for name, scales in (("k_scale", k_scales), ("v_scale", v_scales)):
        if dynamic:
            good = scales.shape == key_cache.shape[:3]
            name, expected = f"{name}_cache", str(list(key_cache.shape[:3]))
        else:
            good = scales.numel() == 1 or scales.shape == (heads,)
            expected = f"[], [1] or [{heads}]"
        if not good or scales.dtype != torch.float32:
            raise ValueError(
                f"{name} is {scales.dtype} {list(scales.shape)}, expected float32 {expected}"
            )
    names = {"value": value, "key_cache": key_cache, "value_cache": value_cache}
    names |= {"slot_mapping": slot_mapping, "k_scale": k_scales, "v_scale": v_scales}
    for name, tensor in names.items():
        if tensor.device != key.device:
            raise ValueError(f"{name} is on {tensor.device}, key on {key.device}")


@torch.library.custom_op(
    "qplug::kv_scatter", mutates_args=("key_cache", "value_cache"), device_types="cpu"
)
def kv_scatter(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Quantize keys and values with given scales and write them into a paged cache.

    Parameters
    ----------
    key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale
        As in the table of this module.

    Raises
    ------
    ValueError
        If an operand is not what the table says, before anything is written.
    IndexError
        On a CPU, if a slot lies beyond the cache; a GPU skips such slots.
    """
    check(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, dynamic=False)
    for x, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        tokens, slots = _live(x, cache, slot_mapping)
        _scatter(tokens, cache, slots, scale.view(-1, 1))


@torch.library.custom_op(
    "qplug::kv_scatter_dynamic",
    mutates_args=("key_cache", "value_cache", "k_scale_cache", "v_scale_cache"),
    device_types="cpu",
)
def kv_scatter_dynamic(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Quantize keys and values with a scale per token and head, written beside them.

    Parameters
    ----------
    key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping
        As in the table of this module.

    Raises
    ------
    ValueError
        If an operand is not what the table says, before anything is written.
    IndexError
        On a CPU, if a slot lies beyond the cache; a GPU skips such slots.
    """
    check(
        key, value, key_cache, value_cache, slot_mapping, k_scale_cache, v_scale_cache, dynamic=True
    )
    for x, cache, scale_cache in (
        (key, key_cache, k_scale_cache),
        (value, value_cache, v_scale_cache),
    ):
        tokens, slots = _live(x, cache, slot_mapping)
        scales = dynamic_scales(tokens, cache.dtype)
        _scatter(tokens, cache, slots, scales[..., None])
        scale_cache[slots // cache.shape[1], slots % cache.shape[1]] = scales


@kv_scatter.register_fake
def _fake(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    check(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, dynamic=False)


@kv_scatter_dynamic.register_fake
def _dynamic_fake(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    check(
        key, value, key_cache, value_cache, slot_mapping, k_scale_cache, v_scale_cache, dynamic=True
    )


@kv_scatter.register_kernel("cuda")
def _cuda(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    from .gpu.kv import scatter

    scatter(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, dynamic=False)


@kv_scatter_dynamic.register_kernel("cuda")
def _dynamic_cuda(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    from .gpu.kv import scatter

    scatter(
        key, value, key_cache, value_cache, slot_mapping, k_scale_cache, v_scale_cache, dynamic=True
    )
