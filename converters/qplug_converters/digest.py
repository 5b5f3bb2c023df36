"""The hash of a linear, the same in whatever layout it is stored.

The hash is the BLAKE3 of a few lines of text, each ended by a line feed: `qplug linear 1`,
`<n> bits` (0 where there are no codes), and `<name> <dtype> <shape> <blake3>` for each part there
is, in the order of `PARTS`. The bytes hashed for a part, little-endian and row by row:

| part      | dtype | shape           | what                                                     |
|-----------|-------|-----------------|----------------------------------------------------------|
| `codes`   | U8    | [out, bytes]    | each row a bit stream along in_features, lowest bit      |
|           |       |                 | first, filled up with zeros to a whole byte              |
| `scales`  | F32   | [out, groups]   | widened (of a grid of rows: [out, 1])                    |
| `zeros`   | I16   | [out, groups]   | the value subtracted; a symmetric grid has its midpoint  |
| `offsets` | F32   | [out, groups]   | widened                                                  |
| `table`   | F32   | [2^bits]        | of a codebook                                            |
| `absmax`  | F32   | [blocks]        | of a codebook, as dequantized where it is quantized      |
| `block`   | I32   | [1]             | of a codebook: the weights that share an absmax          |
| `g_idx`   | I32   | [in]            | the group of each input (not of a codebook)              |
| `weight`  | any   | [out, in]       | of a linear that holds no codes, in its own dtype        |
"""

from __future__ import annotations

import torch
from blake3 import blake3
from torch import Tensor

from . import words
from .weight import AffineGrid, CodebookGrid, OffsetGrid, QuantizedWeight, RowGrid

PARTS = ("codes", "scales", "zeros", "offsets", "table", "absmax", "block", "g_idx", "weight")
"""Every part that a linear may have, in the order in which their hashes are hashed."""

_NAMES = {torch.float32: "F32", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, which is copied where it is not contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


class LinearHash:
    """The hash of one linear, fed with blocks of output rows in their order.

    Parts may be fed on their own, each in the order of its rows.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._hashes: dict[str, blake3] = {}
        self._shapes: dict[str, tuple[str, list[int]]] = {}

    def feed(self, weight: QuantizedWeight) -> None:
        """Add a block of rows."""
        self.codes(weight.codes)
        grid = weight.grid
        if isinstance(grid, AffineGrid):
            self.part("scales", grid.scales.float())
            self.part("zeros", grid.zeros)
        elif isinstance(grid, OffsetGrid):
            self.part("scales", grid.scales.float())
            self.part("offsets", grid.offsets.float())
        elif isinstance(grid, RowGrid):
            self.part("scales", grid.absmax.float()[:, None])
        else:
            self.part("absmax", grid.absmax.float())
        if not {"g_idx", "block"} & self._hashes.keys():
            self._once(weight)

    def _once(self, weight: QuantizedWeight) -> None:
        """Add what does not run over rows."""
        grid = weight.grid
        if isinstance(grid, CodebookGrid):
            self.part("table", grid.table.float())
            self.part("block", torch.tensor([grid.blocksize], dtype=torch.int32))
        elif isinstance(grid, AffineGrid):
            self.part("g_idx", grid.group_of_inputs(weight.in_features).to(torch.int32))
        else:
            size = grid.group_size if isinstance(grid, OffsetGrid) else weight.in_features
            self.groups_in_order(weight.in_features, size)

    def groups_in_order(self, in_features: int, group_size: int) -> None:
        """Add the group of each input where they lie in order."""
        self.part("g_idx", torch.arange(in_features, dtype=torch.int32) // group_size)

    def codes(self, codes: Tensor) -> None:
        """Add rows of codes, uint8 `[rows, in]`."""
        packed = words.pack(codes.cpu(), self.bits, transposed=False)
        used = -(-codes.shape[1] * self.bits // 8)
        self.part("codes", packed.view(torch.uint8)[:, :used])

    def row_words(self, rows: Tensor) -> None:
        """Add rows of codes that fill whole words, int32 `[rows, k]`."""
        self.part("codes", rows.view(torch.uint8))

    def dense(self, weight: Tensor, dtype: str) -> None:
        """Add rows of a linear that holds no codes, in its dtype by safetensors' name."""
        self._add("weight", dtype, weight)

    def part(self, name: str, tensor: Tensor) -> None:
        """Add rows of a part, canonical and in the dtype of the table."""
        self._add(name, _NAMES[tensor.dtype], tensor)

    def _add(self, name: str, dtype: str, tensor: Tensor) -> None:
        if name not in self._hashes:
            self._hashes[name] = blake3()
            self._shapes[name] = dtype, [0, *tensor.shape[1:]]
        self._shapes[name][1][0] += tensor.shape[0]
        if tensor.numel():
            self._hashes[name].update(bytes_of(tensor))

    def hexdigest(self) -> str:
        """Return the hash of everything added."""
        lines = ["qplug linear 1", f"{self.bits} bits"]
        for name in PARTS:
            if name in self._hashes:
                dtype, shape = self._shapes[name]
                lines.append(f"{name} {dtype} {shape} {self._hashes[name].hexdigest()}")
        return blake3("".join(f"{line}\n" for line in lines).encode()).hexdigest()
