"""Many tokens, and gradients: a slab of outputs decoded to 16 bits, then torch's own matmul.

    tensor  shape     dtype  meaning
    slab    [n, K]    of x   fl(w) of n outputs, inputs at the places of the layout
    x       [M, K]    of x   the activations, inputs at the places of the layout
    result  [M, N]    of x   x @ slab.T + bias, slab by slab

A slab is as large as stays in the second-level cache between both kernels (`SHARE`), so that most
of it is neither written to memory nor read back. Where so few outputs would not occupy the card it
is larger, up to `MOST`, and passes through memory: the matmul's tiles of 128 x 128 are to fill all
multiprocessors `WAVES` times. On an H200 slabs stay in the cache from about 3000 tokens on for 4096
inputs (22 MB), and are 56 MB at 1024. No more than one slab is allocated at a time.

Repeated calls give the same bits where torch's matmul does: that is the promise of its library, for
one version, card and shape, and not of this file.

Through memory the weights cost 2 * (bits / 8 + 2) bytes each. What that is worth against a fused
kernel, and so from how many tokens it is used, is arithmetic so far (H200, 4096 x 28672, int4: 69
us of decoding beside 344 us of matmul at 1024 tokens), not a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .compat import interpreted, jit, tl

SHARE = 0.45
"""Of the second-level cache that a slab may fill: half belongs to the far partition on some cards,
and activations and results pass through too."""

TILE = 128
"""Outputs, and tokens, of a tile of a dense matmul."""

WAVES = 4
"""How often a slab's matmul is to fill the card: its last wave is then at least 4/5 full."""

MOST = 64 << 20
"""Bytes of a slab, whatever the card would like: a layer of an 8B model has seven times that."""


@jit
def store_plane(
    value, slab, row, k, outputs, places, stride, DTYPE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Round `value [BN, KP]` and store it at rows `row [BN]` and places `k [KP]` of the slab."""
    at = row.to(tl.int64)[:, None] * stride + k[None, :]
    mask = (row < outputs)[:, None] & (k < places)[None, :]
    tl.store(slab + at, value if WIDE else value.to(DTYPE), mask=mask)


def whole(outputs: int, places: int, like: Tensor, write: Callable[[int, Tensor], None]) -> Tensor:
    """Return the weight `[outputs, places]` in the dtype and on the device of `like`."""
    weight = torch.empty((outputs, places), dtype=like.dtype, device=like.device)
    write(0, weight)
    return weight


@contextmanager
def room(slab: Tensor) -> Iterator[Tensor]:
    """Give the memory that a kernel writes `slab` to: in the interpreter, float32 to round here."""
    if not interpreted():
        yield slab
        return
    wide = torch.full(slab.shape, torch.nan)
    yield wide
    slab.copy_(wide)


@cache
def _card(device: torch.device) -> tuple[int, int]:
    """Return the bytes of the second-level cache and the multiprocessors of a device."""
    if device.type != "cuda":
        return 1 << 20, 4
    facts = torch.cuda.get_device_properties(device)
    return facts.L2_cache_size, facts.multi_processor_count


def rows_of(tokens: int, outputs: int, places: int, columns: int, device: torch.device) -> int:
    """Return the outputs of a slab, a multiple of `columns`."""
    cached, multiprocessors = _card(device)
    in_cache = int(cached * SHARE) // (2 * places)
    busy = -(-WAVES * multiprocessors // -(-tokens // TILE)) * TILE
    busy = min(busy, MOST // (2 * places))
    slabs = max(1, -(-outputs // max(in_cache, busy, columns)))
    return -(-outputs // slabs // columns) * columns


def empty_slab(rows: int, places: int, like: Tensor) -> Tensor:
    """Return `[rows, places]` whose rows begin at multiples of 32 bytes."""
    stride = -(-places // 16) * 16
    return torch.empty((rows, stride), dtype=like.dtype, device=like.device)[:, :places]


def multiply(
    x: Tensor,
    outputs: int,
    columns: int,
    bias: Tensor | None,
    write: Callable[[int, Tensor], None],
) -> Tensor:
    """Return `x @ w.T + bias`.

    Parameters
    ----------
    x
        `[M, K]`, inputs at the places of the layout.
    outputs
        N.
    columns
        Outputs of a tile of the layout.
    bias
        `[N]` or `None`.
    write
        `write(tile, slab [n, K])` decodes outputs from the first of `tile` on.
    """
    tokens, places = x.shape
    result = x.new_empty(tokens, outputs)
    step = rows_of(tokens, outputs, places, columns, x.device)
    slab = empty_slab(min(step, outputs), places, x)
    for at in range(0, outputs, step):
        part = slab[: min(step, outputs - at)]
        write(at // columns, part)
        out = result[:, at : at + step]
        if bias is None:
            torch.mm(x, part.T, out=out)
        else:
            torch.addmm(bias[at : at + step], x, part.T, out=out)
    return result
