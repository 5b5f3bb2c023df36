"""Names of stored tensors that a module cannot bear: other ones while loaded, the file's on save.

bitsandbytes keeps codes in `weight` and the rest in `weight.absmax`, `weight.quant_map`: a module
has no attribute with a dot, and `QuantLinear.weight` is a property. compressed-tensors' names begin
with `weight`, which Transformers' rules for fusing dense experts take for dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from transformers.core_model_loading import WeightRenaming


class TableRenaming(WeightRenaming):
    """One renaming for all tensors of a model: exact names, a dictionary look-up each.

    The loader applies it after the model's own renamings, and its reverse before theirs on saving.

    Parameters
    ----------
    table
        Name -> other name.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        super().__init__("\0qplug", "\0qplug")  # matches nothing
        self.table = dict(table)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the other name, and the name itself as the pattern that matched."""
        found = self.table.get(source_key)
        if found is None:
            return source_key, None
        self._was_used = True  # transforms that were not used are dropped before a save
        return found, source_key

    def reverse_transform(self) -> TableRenaming:
        """Return the renaming back."""
        return TableRenaming({new: old for old, new in self.table.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
