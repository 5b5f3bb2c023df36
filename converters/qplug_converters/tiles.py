"""Packed codes as rows of words, whichever way they are stored, block by block of output rows.

The *row words* of a linear are int32 `[out, k]`: each output row is a little-endian bit stream
along in_features, in natural order. What tools store is one of three forms of them:

* `ROWS`: the row words themselves;
* `COLUMNS` `[k, out]` (GPTQ): the same words, turned;
* `TILES` `[in, out / 8]` (AWQ, 4 bits): tiles of 8 x 8 nibbles, each transposed, and then turned.
  A tile is transposed by three rounds of masked swaps between pairs of words, so that no code is
  unpacked; the order of nibbles in a word is the order in which the words of a tile are taken, and
  costs nothing.

A block of row words stays in the cache, so whoever makes a conversion out of `read` and `write`
can hash or compare it on the way for the price of the hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .words import scalar

_BLOCK = 1 << 18
"""Words of a block: 1 MB, and as much for each of three scratch tensors. Half of it is as fast, a
quarter 1.3 times slower: calls then cost more than passes."""
_MOST_ROWS = 1024
_MOST_SHAPES = 4
_HALVES = ((2, 0x00FF00FF), (1, 0x0F0F0F0F))
"""The rounds after the first: how far apart the words of a pair lie, and what is swapped."""


class Kind(Enum):
    """Which of the three forms."""

    ROWS = "rows"
    COLUMNS = "columns"
    TILES = "tiles"


@dataclass(frozen=True, slots=True)
class Form:
    """How row words are stored; `order[i]` is the code in nibble `i` of a word of `TILES`."""

    kind: Kind
    order: tuple[int, ...] = ()


def rows_at_once(k: int) -> int:
    """Return how many output rows make a block: a multiple of 8."""
    return max(8, min(_MOST_ROWS, _BLOCK // max(1, k)) // 8 * 8)


def _keep(known: dict[tuple[int, int], Any], shape: tuple[int, int], scratch: object) -> None:
    """Keep scratch of the last few shapes."""
    known.pop(shape, None)
    known[shape] = scratch
    if len(known) > _MOST_SHAPES:
        del known[next(iter(known))]


class Turners:
    """Scratch for blocks of some shapes; for one thread."""

    def __init__(self) -> None:
        self._turners: dict[tuple[int, int], Turner] = {}
        self._tilers: dict[tuple[int, int], Tiler] = {}

    def of(self, rows: int, k: int) -> Turner:
        """Return scratch for blocks of this shape."""
        turner = self._turners.get((rows, k)) or Turner(rows, k)
        _keep(self._turners, (rows, k), turner)
        return turner

    def tiles_of_columns(
        self, columns: Tensor, order: tuple[int, ...]
    ) -> Iterator[tuple[int, Tensor]]:
        """Turn columns `[k, out]` into tiles, some words of every column at a time.

        Yields (first row, tiles `[rows, out / 8]`), valid until the next. Both sides are read and
        written from front to back, which is twice as fast as by way of row words.
        """
        k, out = columns.shape
        step = max(1, min(k, _BLOCK // out))
        for start in range(0, k, step):
            few = min(step, k - start)
            tiler = self._tilers.get((few, out)) or Tiler(few, out)
            _keep(self._tilers, (few, out), tiler)
            yield 8 * start, tiler(columns[start : start + few], order)

    def blocks(self, form: Form, stored: Tensor, rows: int) -> Iterator[tuple[int, Turner, Tensor]]:
        """Yield the row words of a stored tensor, block by block.

        Each comes as its first row, the scratch that was used (to write it elsewhere), and the
        words `[rows, k]`, which are valid until the next one.
        """
        across = {Kind.ROWS: 1, Kind.COLUMNS: 0, Kind.TILES: 0}[form.kind]
        k = stored.shape[across] // (8 if form.kind is Kind.TILES else 1)
        step = rows_at_once(k)
        for start in range(0, rows, step):
            turner = self.of(min(step, rows - start), k)
            yield start, turner, turner.read(form, stored, start)


class Tiler:
    """Scratch for blocks of `k` words of every column of `out` columns, turned into tiles.

    Not for use by two threads at once.
    """

    def __init__(self, k: int, out: int) -> None:
        self.k, self.across = k, out // 8
        self._planes = torch.empty(8, k * self.across, dtype=torch.int32)
        self._ordered = torch.empty_like(self._planes)
        self._half = torch.empty(4, k * self.across, dtype=torch.int32)
        self._made = torch.empty(k, 8, self.across, dtype=torch.int32)

    def __call__(self, columns: Tensor, order: tuple[int, ...]) -> Tensor:
        """Return tiles `[8 * k, out / 8]` of columns `[k, out]`; valid until the next call."""
        self._planes.copy_(columns.reshape(-1, 8).t())
        for plane, code in zip(self._ordered, order, strict=True):
            plane.copy_(self._planes[code])
        for h, mask in ((4, 0x0000FFFF), *_HALVES):
            a, b = self._ordered.view(-1, 2, h, self._half.shape[1]).unbind(1)
            t = self._half.view(a.shape)
            _swap(a, b, t, scalar(4 * h, torch.int32), scalar(mask, torch.int32))
        self._made.copy_(self._ordered.view(8, self.k, self.across).transpose(0, 1))
        return self._made.view(8 * self.k, self.across)


def translate(one: Form, two: Form, stored: Tensor, out: Tensor, rows: int) -> None:
    """Bring the row words of `rows` output rows from one form into another."""
    if (one.kind, two.kind) == (Kind.COLUMNS, Kind.TILES):
        for start, made in Turners().tiles_of_columns(stored, two.order):
            out[start : start + len(made)].copy_(made)
        return
    for start, turner, words in Turners().blocks(one, stored, rows):
        turner.write(two, words, out, start)


class Turner:
    """Scratch for blocks of `rows` rows of `k` words, and what moves them.

    Not for use by two threads at once.
    """

    def __init__(self, rows: int, k: int) -> None:
        self.rows, self.k = rows, k
        self._words = torch.empty(rows, k, dtype=torch.int32)
        self._turned = torch.empty(k, rows, dtype=torch.int32)
        if rows % 8 == 0:
            self._tiles = torch.empty(8, rows // 8, k, dtype=torch.int32)
            self._half = torch.empty(4, rows // 8, k, dtype=torch.int32)
            self._rounds = []
            for h, mask in _HALVES:
                a, b = self._tiles.view(-1, 2, h, rows // 8, k).unbind(1)
                half = self._half.view(-1, h, rows // 8, k)
                constants = scalar(4 * h, torch.int32), scalar(mask, torch.int32)
                self._rounds.append((a, b, half, *constants))
            self._sixteen = scalar(16, torch.int32)
            self._low = scalar(0xFFFF, torch.int32)

    def read(self, form: Form, stored: Tensor, start: int) -> Tensor:
        """Return the row words `[rows, k]` from row `start` on; valid until the next call."""
        if form.kind is Kind.ROWS:
            found = stored[start : start + self.rows]
            return found if found.is_contiguous() else self._words.copy_(found)
        if form.kind is Kind.COLUMNS:
            # Runs first, then the transpose inside the cache: 4 times faster than one copy.
            self._turned.copy_(stored[:, start : start + self.rows])
            return self._words.copy_(self._turned.t())
        self._runs(self._turned).copy_(self._tiled(stored, start))
        self._tiles.view(self.rows, self.k).copy_(self._turned.t())
        self._swap()
        self._first(form.order, to_tiles=False)
        return self._words

    def write(self, form: Form, words: Tensor, stored: Tensor, start: int) -> None:
        """Put the row words `[rows, k]` where rows from `start` on are stored."""
        if form.kind is Kind.ROWS:
            stored[start : start + self.rows].copy_(words)
        elif form.kind is Kind.COLUMNS:
            self._turned.copy_(words.t())
            stored[:, start : start + self.rows].copy_(self._turned)
        else:
            self._first(form.order, to_tiles=True, words=words)
            self._swap()
            self._turned.copy_(self._tiles.view(self.rows, self.k).t())
            self._tiled(stored, start).copy_(self._runs(self._turned))

    def _runs(self, turned: Tensor) -> Tensor:
        """View `[k, rows]` as word of a tile, nibble, tile along out: `[k, 8, rows / 8]`."""
        return turned.view(self.k, 8, self.rows // 8)

    def _tiled(self, stored: Tensor, start: int) -> Tensor:
        """View the block in `[in, out / 8]` in the same way."""
        first, count = start // 8, self.rows // 8
        return stored.view(self.k, 8, stored.shape[1])[:, :, first : first + count]

    def _swap(self) -> None:
        """Transpose tiles of 4 x 4 nibbles inside those of 8 x 8."""
        for a, b, t, shift, mask in self._rounds:
            _swap(a, b, t, shift, mask)

    def _first(
        self, order: tuple[int, ...], *, to_tiles: bool, words: Tensor | None = None
    ) -> None:
        """Swap the halves of words four apart, from row words into tiles or back."""
        words = self._words if words is None else words
        rows = words.view(self.rows // 8, 8, self.k).transpose(0, 1)
        for few in _runs(order):
            half = [order[i] for i in few], [order[i + 4] for i in few]
            pair = rows[_slice(half[0])], rows[_slice(half[1])]
            first = few[0]
            tiles = self._tiles[first : first + len(few)], self._tiles[first + 4 :][: len(few)]
            (a, b), (c, d) = (pair, tiles) if to_tiles else (tiles, pair)
            t = self._half[: len(few)]
            torch.bitwise_right_shift(a, self._sixteen, out=t)
            t.bitwise_xor_(b).bitwise_and_(self._low)
            torch.bitwise_xor(b, t, out=d)
            torch.bitwise_left_shift(t, self._sixteen, out=t)
            torch.bitwise_xor(a, t, out=c)


def _swap(a: Tensor, b: Tensor, t: Tensor, shift: Tensor, mask: Tensor) -> None:
    """Swap the upper fields of `a` with the lower ones (`mask`) of `b`; `t` is scratch."""
    torch.bitwise_right_shift(a, shift, out=t)
    t.bitwise_xor_(b).bitwise_and_(mask)
    b.bitwise_xor_(t)
    torch.bitwise_left_shift(t, shift, out=t)
    a.bitwise_xor_(t)


@cache
def _runs(order: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Cut 0 to 3 where `order`, there and four on, is no evenly spaced slice: calls cost, too."""
    halves = order[:4], order[4:]
    even = all(h[0] < h[1] and len({b - a for a, b in pairwise(h)}) == 1 for h in halves)
    return ((0, 1, 2, 3),) if even else ((0,), (1,), (2,), (3,))


def _slice(spaced: list[int]) -> slice:
    """Return the slice of evenly spaced indices."""
    step = spaced[1] - spaced[0] if len(spaced) > 1 else 1
    return slice(spaced[0], spaced[-1] + 1, step)
