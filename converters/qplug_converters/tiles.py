"""4-bit words turned from one packed axis to the other without unpacking a code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .threads import Cut, Kernel, share
from .words import checked, output, scalar

_TILES = 1 << 14
"""Tiles of 8 words in a block: 0.8 MB of scratch a thread; a quarter of it costs 1.3 times the
time, for the reason of `words._BLOCK`."""

_TILES_WIDE = 256
"""Tiles beside each other in such a block: runs of 8 KB on one side, 1 KB on the other; 64 cost
1.2 times the time."""


def transpose_nibbles(
    words: Tensor, *, transposed: bool, order: Sequence[int] = (), out: Tensor | None = None
) -> Tensor:
    """Turn 4-bit words that run down the columns into words that run along the rows, or back.

    The matrix of codes stays as it is, only the axis that is packed changes (GPTQ's qweight to
    AWQ's and back), so no code is unpacked: each tile of 8 words is an 8 x 8 matrix of nibbles,
    and is transposed by three rounds of masked swaps between pairs of words.

    Parameters
    ----------
    words
        int32 `[n / 8, m]` if `transposed` (natural order of nibbles), else `[n, m / 8]` (nibbles in
        `order`). May be strided; is not modified.
    transposed
        Whether the packed rows run down the columns of `words`; those of the result do not.
    order
        `order[i]` is the code, counted inside one word, that lies in nibble `i` of the words that
        run along the rows; empty means natural. It costs nothing.
    out
        Where to write; may be strided, must not overlap `words`.

    Returns
    -------
    Tensor
        int32 `[n, m / 8]` if `transposed`, else `[n / 8, m]`; `out` if given.

    Raises
    ------
    ValueError
        If a dtype, shape, device or `order` is not as said above.
    """
    fields = checked(words, torch.int32, 4, order) or tuple(range(8))
    rows, columns = words.shape
    if (columns if transposed else rows) % 8:
        raise ValueError(f"words {rows} x {columns} do not fill tiles of 8 x 8 nibbles")
    down, across = (rows, columns // 8) if transposed else (rows // 8, columns)
    out = output(out, torch.int32, (8 * down, across) if transposed else (down, 8 * across))
    wide = max(1, min(across, _TILES_WIDE))
    high = max(1, _TILES // wide)
    cuts: list[Cut] = []
    for r in range(0, down, high):
        for c in range(0, across, wide):
            few = slice(r, r + high), slice(8 * c, 8 * (c + wide))
            many = slice(8 * r, 8 * (r + high)), slice(c, c + wide)
            cuts.append((few, many) if transposed else (many, few))

    def kernel(source: Tensor, target: Tensor) -> Kernel:
        few = source if transposed else target
        return _NibbleTransposer(few.shape[0], few.shape[1] // 8, fields, to_rows=transposed)

    share(kernel, words, out, cuts)
    return out


class _NibbleTransposer:
    """Tiles of 8 x 8 nibbles: words `[down, 8 * across]` <-> words `[8 * down, across]`."""

    def __init__(self, down: int, across: int, order: tuple[int, ...], *, to_rows: bool) -> None:
        self.order, self.to_rows = order, to_rows
        self.tiles = torch.empty(8, down, across, dtype=torch.int32)
        half = torch.empty(4, down, across, dtype=torch.int32)
        self.rounds = []
        for h, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
            a, b = self.tiles.view(-1, 2, h, down, across).unbind(1)
            constants = scalar(4 * h, torch.int32), scalar(mask, torch.int32)
            self.rounds.append((a, b, half.view(-1, h, down, across), *constants))

    def __call__(self, source: Tensor, target: Tensor) -> None:
        """Fill the block `target` from the block `source`."""
        few, many = (source, target) if self.to_rows else (target, source)
        rows = many.view(-1, 8, many.shape[1]).transpose(0, 1)
        if self.to_rows:
            for tile, code in zip(self.tiles, self.order, strict=True):
                tile.copy_(few[:, code::8])
        else:
            self.tiles.copy_(rows)
        for a, b, t, shift, mask in self.rounds:
            torch.bitwise_right_shift(a, shift, out=t)
            t.bitwise_xor_(b).bitwise_and_(mask)
            b.bitwise_xor_(t)
            torch.bitwise_left_shift(t, shift, out=t)
            a.bitwise_xor_(t)
        if self.to_rows:
            rows.copy_(self.tiles)
        else:
            for tile, code in zip(self.tiles, self.order, strict=True):
                few[:, code::8].copy_(tile)
