"""What only the codes of a linear can tell: whether shifting them brings zeros into a range.

torch is imported when it is asked.
"""

from __future__ import annotations

from .checkpoint import Checkpoint
from .format import Format
from .route import Look
from .scheme import Kind, ModelScheme


def looker(checkpoint: Checkpoint, found: Format, model: ModelScheme) -> Look:
    """Return what a plan asks where zeros lie outside a target's range; answers are kept."""
    known: dict[tuple[str, int, int], bool] = {}

    def look(module: str, low: int, high: int) -> bool:
        from .blocks import blocks_of, read_rows
        from .moves import room_to_shift, to_zeros

        asked = (module, low, high)
        if asked not in known:
            scheme = model.linears[module]
            layout = found.layout(scheme)
            blocks = (
                read_rows(checkpoint, layout, scheme, module, start, stop)
                for start, stop in blocks_of(scheme, layout)
            )
            if scheme.kind is Kind.OFFSET:
                blocks = (to_zeros(block, "") for block in blocks)
            known[asked] = all(room_to_shift(block, low, high) for block in blocks)
        return known[asked]

    return look
