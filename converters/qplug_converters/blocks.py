"""Linears read a block of output rows at a time, whatever their layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import lcm

from torch import Tensor

from .checkpoint import Checkpoint
from .codec import decode, pack_part, unpack_part
from .errors import QplugError
from .layout import Holds, Layout, Part
from .scheme import Scheme
from .weight import QuantizedWeight

BLOCK = 1 << 24
"""Codes decoded at a time by one thread: at most 8 bytes a code with everything derived, so that
`threads.MOST_WORKERS` stay under 1 GiB."""


def stored_names(layout: Layout, module: str) -> list[str]:
    """Return the names of the tensors of one linear."""
    return [f"{module}.{part.name}" for part in layout]


def rows_of(part: Part, tensor: Tensor, sizes: Mapping[str, int], start: int, stop: int) -> Tensor:
    """Return output rows `start` to `stop` of a stored tensor as a view; `sizes` of the whole."""
    if start == 0 and stop == sizes["out"]:
        return tensor
    span = part.span(sizes, start, stop)
    return tensor if span is None else tensor.narrow(*span)


@lru_cache(1024)  # linears of a model are alike, and of small ones this is a tenth of the work
def blocks_of(scheme: Scheme, *layouts: Layout, most: int = BLOCK) -> Sequence[tuple[int, int]]:
    """Cut the output rows into blocks of at most `most` codes that cut no word of any layout."""
    step = lcm(*(layout.row_step(scheme.sizes) for layout in layouts))
    rows = max(step, most // scheme.in_features // step * step)
    cuts = range(0, scheme.out_features, rows)
    return tuple((at, min(at + rows, scheme.out_features)) for at in cuts)


def read_rows(
    checkpoint: Checkpoint,
    layout: Layout,
    scheme: Scheme,
    module: str,
    start: int,
    stop: int,
    order: Tensor | None = None,
) -> QuantizedWeight:
    """Decode output rows `start` to `stop` of a linear, or those that stand there in `order`."""
    stored = {part.name: checkpoint.tensor(f"{module}.{part.name}") for part in layout}
    return decode_rows(stored, layout, scheme, module, start, stop, order)


def decode_rows(
    stored: Mapping[str, Tensor],
    layout: Layout,
    scheme: Scheme,
    module: str,
    start: int,
    stop: int,
    order: Tensor | None = None,
) -> QuantizedWeight:
    """Decode output rows `start` to `stop` of the stored tensors of a linear, by part name.

    With `order`, int64 `[out_features]`, the rows that stand there in it.
    """
    sizes = scheme.sizes
    if order is None:
        some = {part.name: rows_of(part, stored[part.name], sizes, start, stop) for part in layout}
    else:
        some = {p.name: _gathered(p, stored[p.name], sizes, order[start:stop]) for p in layout}
    try:
        return decode(layout, replace(scheme, out_features=stop - start), some, start)
    except QplugError as error:
        place(error, module)
        raise


def _gathered(part: Part, tensor: Tensor, sizes: Mapping[str, int], rows: Tensor) -> Tensor:
    """Return some output rows of a stored tensor, in any order."""
    axis = part.axis("out")
    if axis is None:
        return tensor
    if part.packing is None or part.packed_axis != axis:
        return tensor.index_select(axis, rows)
    held = unpack_part(part, tensor, sizes)  # words along the rows: as a rule, of zeros
    return pack_part(part, held.index_select(0, rows))


def has_codes(layout: Layout) -> bool:
    """Whether a layout holds codes on a grid (dense does not)."""
    return layout.part(Holds.CODES) is not None


def place(error: QplugError, module: str) -> None:
    """Say in which linear an error was met, if it does not yet."""
    if not error.where.startswith(module):
        error.where = f"{module}.{error.where}" if error.where else module
