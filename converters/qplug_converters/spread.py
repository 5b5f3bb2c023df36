"""Codes out of whole words with plain shifts, on any device: `words.unpack` for GPUs.

`words` is made for a CPU's caches. On a GPU every operation is a launch over memory, so a slab of
rows is spread at once: a gather of the words that hold each of 32 codes, two shifts, a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNIT = 32
"""Codes that fill a whole number of words (`bits` of them) at any number of bits."""

SLAB = 1 << 24
"""Codes spread at a time: 64 MB for each of three scratch tensors."""


def unpack(
    words: Tensor,
    bits: int,
    n: int,
    *,
    transposed: bool,
    codes_transposed: bool = False,
    order: Sequence[int] = (),
) -> Tensor:
    """Take the codes out of packed rows, wherever they lie.

    Parameters and result are those of `words.unpack`; nothing is checked, and nothing waits for the
    device.
    """
    packed = words.t() if transposed else words
    rows, wide = packed.shape
    units = -(-n // UNIT)
    codes = torch.empty(rows, n, dtype=torch.uint8, device=words.device)
    at = torch.arange(UNIT, device=words.device) * bits
    low, shift = at // 32, (at % 32).to(torch.int32)
    mask = (1 << bits) - 1
    first = torch.full_like(shift, mask) & _below(32 - shift)
    # `order[i]` is the code in field i; here, the field of each code.
    field = torch.tensor([order.index(code) for code in range(len(order))], device=words.device)
    step = max(1, SLAB // max(1, units * UNIT))
    for start in range(0, rows, step):
        some = packed[start : start + step]
        if wide < units * bits:
            some = torch.nn.functional.pad(some, (0, units * bits - wide))
        unit = some.reshape(len(some), units, bits)
        # Shifts of signed words drag the sign in from the left: masked off.
        found = (unit[:, :, low] >> shift) & first
        if 32 % bits:
            # Where a code ends in the next word; for the others the shift leaves nothing of it.
            after = unit[:, :, (low + 1).clamp(max=bits - 1)].to(torch.int64) << (32 - shift)
            crosses = shift + bits > 32
            found = torch.where(crosses, found | (after & mask).to(torch.int32), found)
        flat = found.reshape(len(some), -1)
        if order:
            flat = flat.reshape(len(some), -1, len(order))[:, :, field].reshape(len(some), -1)
        codes[start : start + step] = flat[:, :n]
    return codes.t().contiguous() if codes_transposed else codes


def _below(bits: Tensor) -> Tensor:
    """Return masks of the lowest `bits` bits, 1 to 32."""
    return ((torch.ones_like(bits, dtype=torch.int64) << bits) - 1).to(torch.int32)
