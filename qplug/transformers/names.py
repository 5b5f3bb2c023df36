"""What tensors are called: by the file, by the loader's own renaming, and in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qplug_converters.format import Format
from qplug_converters.layout import Holds, TensorSpec
from qplug_converters.scheme import Scheme

from . import compat
from .linear import buffer_name
from .renaming import TableRenaming


class Names:
    """The loader's renaming, asked in advance."""

    def __init__(self, model: Any) -> None:
        self.prefix = model.base_model_prefix
        self.renamings, self.converters = compat.renamings_of(model)
        self.known: dict[str, Any] = model.state_dict()

    def of(
        self, key: str, known: Mapping[str, Any] | None = None, last: TableRenaming | None = None
    ) -> tuple[str, str | None]:
        """Return the model's name for a tensor, and the pattern of a converter that takes it."""
        known = self.known if known is None else known
        renamings = [*self.renamings, *([last] if last else [])]
        return compat.loader_name(key, renamings, self.converters, self.prefix, known)

    def renamed(self, key: str) -> str:
        """Return what the model's own renamings make of a name, its prefix aside."""
        return compat.loader_name(key, self.renamings, [], None, {})[0]

    def module(self, stem: str) -> str:
        """Return the model's name for a module that has a weight there."""
        key = f"{stem}.weight"
        name, _ = compat.loader_name(key, self.renamings, [], self.prefix, self.known)
        return name.removesuffix(".weight")

    def filled(self, headers: Mapping[str, TensorSpec]) -> set[str]:
        """Return the names in the model that the checkpoint's tensors fill as they are."""
        found = set()
        for key in headers:
            name, pattern = self.of(key)
            found.add(name)
            for converter in self.converters if pattern is not None else ():
                if pattern in converter.source_patterns:
                    first, *others = converter.target_patterns
                    found.update(name.replace(first, other) for other in others)
        return found


class Parts:
    """What the stored tensors of each quantized linear are called, out of its layout."""

    def __init__(self, known: Format, linears: Mapping[str, Scheme]) -> None:
        self.layouts = {stem: known.layout(scheme) for stem, scheme in linears.items()}
        parts = [part for layout in self.layouts.values() for part in layout]
        self.codes = next((part.name for part in parts if part.holds is Holds.CODES), "")
        self.own = {part.name for part in parts} - {"weight"}
        """Names that belong to a quantized linear and to nothing else."""

    def of(self, stem: str) -> list[str]:
        """Return the names of the parts of one linear."""
        return [part.name for part in self.layouts[stem]]

    @property
    def keys(self) -> set[str]:
        """The names of all stored tensors."""
        return {f"{stem}.{part}" for stem in self.layouts for part in self.of(stem)}

    def renamed(self, paths: Mapping[str, str], names: Names) -> dict[str, str]:
        """Return what no buffer can be called, and what it is called instead.

        Once by the name that the model's own renamings leave, which is what is met when loading,
        and once by that in the model, which is what is met when saving. `paths` says where in the
        model each linear is.
        """
        table = {}
        for stem, path in paths.items():
            for part in self.of(stem):
                if (buffer := buffer_name(part)) != part:
                    for key in (names.renamed(f"{stem}.{part}"), f"{path}.{part}"):
                        table[key] = key.removesuffix(part) + buffer
        return table
