"""The layout of codes of a table: nibbles in the order that PRMT reads, tile by tile.

    tensor  shape                    dtype     meaning
    words   [nN, nK, BN, KP]         int16     codes, tile by tile: BN outputs by BK = 4 * KP inputs
    absmax  [nN, nK, BN, groups]     float32   of each group of a tile, divided by the table's scale
    form    [0, out, in, table + 1]  of x      the numbers of `Form` that shapes above do not tell

Words: the unit is the 32-bit pair of rows 2j and 2j + 1 of a column. Its nibble 2p + lane is the
code of input p * KP + 2j + lane of the tile, so that one PRMT reads both lanes of two planes, and
the bytes it returns lie side by side (`lookup`, where codes get the order that PRMT needs).

Blocks lie along the rows laid end to end. A group of the layout is the largest number of inputs, up
to a tile, that no block's border cuts in any row: the block where in_features is a multiple of it,
else a common divisor of both; absmax is repeated for each of the groups of a block, exactly. Below
32 the kernel refuses. Nested absmax are expanded when the file is read.

Padding: any code beyond the last input (activations are 0 there) and output, absmax 0. A tile is
self-contained: packing a shard that begins and ends on tiles gives the tiles of the whole.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
from torch import Tensor

from qplug_converters.formats.bnb_4bit import TABLES as NAMED
from qplug_converters.layout import Holds, Layout, Packing, Part
from qplug_converters.weight import CodebookGrid

from ..problem import Problem
from .form import COLUMNS
from .lookup import Lookup, lookup
from .planes import SLAB, pad

TABLES: list[tuple[float, ...]] = [struct.unpack("<16f", table) for table in NAMED.values()]
"""Tables of this process; an operand says by its shape which is meant, and the file's own tables
come first, so that their places are the same in every process."""

SMALLEST = 32
"""Inputs of the smallest group that a plane of matrix operands is made of."""


@dataclass(frozen=True, slots=True)
class Form:
    """The numbers of a packed linear.

    Attributes
    ----------
    out_features, in_features
        Of the linear, without padding.
    rows, columns
        KP and BN: words of a tile along the inputs, and its outputs.
    group
        Inputs that share an absmax, at most a tile.
    table
        Place in `TABLES`.
    bf16
        Whether activations are bfloat16, not float16.
    """

    out_features: int
    in_features: int
    rows: int
    columns: int
    group: int
    table: int
    bf16: bool

    @property
    def words(self) -> int:
        """Words that hold one code of every plane."""
        return 1

    @property
    def tile(self) -> int:
        """BK, the inputs of a tile."""
        return 4 * self.rows

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of outputs and of inputs."""
        return -(-self.out_features // self.columns), -(-self.in_features // self.tile)

    @property
    def groups(self) -> int:
        """Groups of a tile."""
        return self.tile // self.group

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return torch.bfloat16 if self.bf16 else torch.float16

    @property
    def lookup(self) -> Lookup:
        """The table as PRMT reads it."""
        return lookup(TABLES[self.table], self.dtype)

    def layout(self) -> Layout:
        """Where codes lie (those of `Lookup.codes`), for a weight padded to whole tiles."""
        return Layout(
            (
                Part(
                    name="words",
                    holds=Holds.CODES,
                    dtype="I16",
                    stream="(out bn) (inp p j lane) -> (out inp bn) (j p lane)",
                    packing=Packing(4, word="I16"),
                    stored="(out inp bn) w -> out inp bn w",
                    lengths=(("bn", self.columns), ("p", 4), ("j", self.rows // 2), ("lane", 2)),
                ),
            )
        )

    def tensor(self, device: torch.device) -> Tensor:
        """Return what other operands do not tell, as the shape of a tensor without elements."""
        shape = (0, self.out_features, self.in_features, self.table + 1)
        return torch.empty(shape, dtype=self.dtype, device=device)

    @staticmethod
    def of(operands: Sequence[Tensor]) -> Form:
        """Read it back from the operands."""
        words, absmax, form = operands
        return _form(words.shape, absmax.shape, form.shape, form.dtype == torch.bfloat16)


@cache
def _form(words: torch.Size, absmax: torch.Size, form: torch.Size, bf16: bool) -> Form:
    _, out_features, in_features, table = form
    rows, columns = words[3], words[2]
    group = 4 * rows // absmax[3]
    return Form(out_features, in_features, rows, columns, group, table - 1, bf16)


def choose_form(problem: Problem) -> Form:
    """Return the layout of a linear that this kernel can multiply by."""
    group = gcd(problem.block, 256)
    if problem.table not in TABLES:
        TABLES.append(problem.table)
    return Form(
        out_features=problem.out_features,
        in_features=problem.in_features,
        rows=64 if group >= 64 else 32,
        columns=COLUMNS,
        group=group,
        table=TABLES.index(problem.table),
        bf16=problem.dtype == torch.bfloat16,
    )


def pack(codes: Tensor, form: Form) -> Tensor:
    """Return the words of the checkpoint's codes uint8 `[out, in]`, in slabs of outputs."""
    device = codes.device
    new = torch.tensor(form.lookup.codes, dtype=torch.uint8, device=device)
    both = (new[:, None] << 4 | new[None, :]).flatten()
    many_n, many_k = form.tiles
    shape = (many_n, many_k, form.columns, form.rows)
    words = torch.empty(shape, dtype=torch.int16, device=device)
    step = max(1, SLAB // (many_k * form.tile * form.columns))
    for at in range(0, many_n, step):
        tiles = min(step, many_n - at)
        slab = codes[at * form.columns : (at + tiles) * form.columns]
        slab = pad(slab, tiles * form.columns, many_k * form.tile)
        # Both lanes of a plane are one byte, and that is recoded at once.
        octets = slab[:, ::2] | slab[:, 1::2] << 4
        octets = both.index_select(0, octets.flatten().int())
        cut = octets.view(tiles, form.columns, many_k, 4, form.rows // 2).permute(0, 2, 1, 4, 3)
        words[at : at + tiles] = cut.contiguous().view(torch.int16).view(tiles, *shape[1:])
    return words


def unpack(words: Tensor, form: Form) -> Tensor:
    """Return the checkpoint's codes uint8 `[out, in]`: the inverse of `pack`."""
    many_n, many_k = form.tiles
    octets = words.view(torch.uint8).view(many_n, many_k, form.columns, form.rows // 2, 4)
    octets = octets.permute(0, 2, 1, 4, 3).reshape(many_n * form.columns, -1)
    nibbles = torch.stack((octets & 15, octets >> 4), -1).flatten(1)
    order = torch.tensor(form.lookup.order, dtype=torch.uint8, device=words.device)
    return order[nibbles.int()][: form.out_features, : form.in_features]


def spread(grid: CodebookGrid, form: Form) -> Tensor:
    """Return the operand `absmax`: one for each group of each output, 0 in the padding."""
    many_n, many_k = form.tiles
    device, columns, groups = grid.absmax.device, form.columns, form.groups
    spread = torch.zeros((many_n, many_k, columns, groups), dtype=torch.float32, device=device)
    first = grid.skip + torch.arange(0, form.in_features, form.group, device=device)
    step = max(1, SLAB // (many_k * form.tile * columns))
    for at in range(0, many_n, step):
        outputs = range(at * columns, min((at + step) * columns, form.out_features))
        row = torch.arange(outputs.start, outputs.stop, device=device)[:, None] * form.in_features
        absmax = grid.absmax[(row + first) // grid.blocksize].double() / form.lookup.scale
        tiles = min(step, many_n - at)
        cut = pad(absmax.float(), tiles * columns, many_k * groups)
        cut = cut.view(tiles, columns, many_k, groups)
        spread[at : at + tiles] = cut.transpose(1, 2)
    return spread


def reference(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight float64 `[out, in]` that the operands mean, the table rounded."""
    words, absmax, _ = operands
    form = Form.of(operands)
    found = form.lookup
    patterns = torch.tensor(found.patterns, dtype=torch.int32, device=words.device)
    table = patterns.to(torch.int16).view(form.dtype).double()[list(found.codes)]
    factors = absmax.transpose(1, 2).reshape(absmax.shape[0] * form.columns, -1)
    factors = factors.double().repeat_interleave(form.group, 1)
    return table[unpack(words, form).int()] * factors[: form.out_features, : form.in_features]
