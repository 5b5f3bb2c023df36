"""The numbers of a packed linear: tiles, planes, groups, and the operand that carries them.

What a tile is, `planes` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from qplug_converters.layout import Holds, Layout, Packing, Part

from .asm import MAGIC, PLANES, WORDS

SMALLEST = 16
"""Rows of words at least: inputs of one product of a tensor core."""

ROWS = {2: 32, 3: 16, 4: 64, 8: 128}
"""KP where groups allow it: tiles of 256 inputs."""

COLUMNS = 128
"""BN: less pays nowhere (0.3 to 1 instructions more per weight)."""


class Tiled(Protocol):
    """What a layout of tiles tells those that launch kernels; attributes are those of `Form`."""

    def __hash__(self) -> int: ...
    @property
    def out_features(self) -> int: ...  # noqa: D102
    @property
    def in_features(self) -> int: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def columns(self) -> int: ...  # noqa: D102
    @property
    def words(self) -> int: ...  # noqa: D102
    @property
    def group(self) -> int: ...  # noqa: D102
    @property
    def tile(self) -> int: ...  # noqa: D102
    @property
    def tiles(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Form:
    """The numbers of a packed linear.

    Attributes
    ----------
    out_features, in_features
        Of the linear, without padding.
    places
        Inputs in the layout: `in_features`, or in act order whole tiles of them.
    bits
        2, 3, 4 or 8.
    rows, columns
        KP and BN: words of a tile along the inputs, and its outputs.
    group
        Inputs of a group in the layout: it divides a tile or is a multiple of one. A group of the
        weight may be several of these.
    bf16
        Whether activations are bfloat16, not float16.
    bf16_scales
        Whether scales are.
    symmetric
        Whether all zeros are the midpoint and not stored.
    """

    out_features: int
    in_features: int
    places: int
    bits: int
    rows: int
    columns: int
    group: int
    bf16: bool
    bf16_scales: bool
    symmetric: bool = False

    @property
    def planes(self) -> int:
        """Codes of one word, or of three of 3 bits."""
        return PLANES[self.bits]

    @property
    def words(self) -> int:
        """Words that hold one code of every plane."""
        return WORDS[self.bits]

    @property
    def tile(self) -> int:
        """BK, the inputs of a tile."""
        return self.planes * self.rows

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of outputs and of inputs."""
        return -(-self.out_features // self.columns), -(-self.places // self.tile)

    @property
    def groups_of_tile(self) -> int:
        """Groups of a tile; 1 where they are longer."""
        return max(1, self.tile // self.group)

    @property
    def groups(self) -> int:
        """Groups of the layout, with those that are padding."""
        return -(-self.tiles[1] * self.tile // self.group)

    @property
    def scales_shape(self) -> tuple[int, int, int, int]:
        """Shape of the scale words."""
        each = self.groups_of_tile
        return self.tiles[0], self.groups // each, self.columns, each

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return torch.bfloat16 if self.bf16 else torch.float16

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales."""
        return torch.bfloat16 if self.bf16_scales else torch.float16

    @property
    def magic(self) -> int:
        """What is added to a zero where it is stored."""
        return 0 if self.bf16 and self.bits == 8 else MAGIC[self.bf16]

    def tensor(self, device: torch.device | str) -> Tensor:
        """Return an operand without elements whose shape tells what the words' does not."""
        numbers = (self.out_features, self.in_features, self.bits, self.group, self.bf16_scales)
        return torch.empty((0, *map(int, numbers)), dtype=self.dtype, device=device)

    @staticmethod
    def of(operands: Sequence[Tensor]) -> Form:
        """Read the numbers back from operands `words`, `scales`, `form` and perhaps `order`."""
        words, scales, form = operands[:3]
        symmetric = scales.dtype == torch.int16
        return _form(words.shape, form.shape, form.dtype, len(operands) > 3, symmetric)

    def layout(self) -> Layout:
        """Return where codes lie, for a weight padded to whole tiles."""
        return Layout(
            (
                Part(
                    name="words",
                    holds=Holds.CODES,
                    dtype="I16",
                    stream="(out bn) (inp p kp) -> (out inp bn kp) p",
                    packing=Packing(self.bits, word="I16", spread=self.bits == 3),
                    stored="(out inp bn kp) w -> out inp w bn kp",
                    lengths=(("bn", self.columns), ("p", self.planes), ("kp", self.rows)),
                ),
            )
        )


@cache
def _form(
    words: torch.Size, form: torch.Size, dtype: torch.dtype, ordered: bool, symmetric: bool
) -> Form:
    _, many_k, _, columns, rows = words
    _, n, k, bits, group, bf16_scales = form
    places = many_k * PLANES[bits] * rows if ordered else k
    bf16 = dtype == torch.bfloat16
    return Form(n, k, places, bits, rows, columns, group, bf16, bool(bf16_scales), symmetric)


def effective_group(unit: int, tile: int, in_features: int) -> int:
    """Return the largest group that a tile divides or that divides a tile, and no group cuts.

    `unit` neighbouring inputs share a scale; beyond one tile only powers of two of tiles are
    counted in the loop, or all of them.
    """
    if unit >= in_features:
        return -(-in_features // tile) * tile
    if unit % tile:
        return gcd(unit, tile)
    tiles = unit // tile
    return tile * (tiles & -tiles)
