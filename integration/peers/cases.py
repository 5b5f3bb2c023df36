"""Cases of a table, and the weights of two readers compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

Key = TypeVar("Key")


def pairs(table: Mapping[Key, tuple[str, ...]]) -> list[tuple[Key, str]]:
    """Return each key with each of its values."""
    return [(key, value) for key, values in table.items() for value in values]


def label(value: object) -> str:
    """Return what a case is called."""
    return " ".join(value) if isinstance(value, tuple) else str(value)


def reference(folder: Path) -> dict[str, Tensor]:
    """Return the weights that a golden folder comes with: float32 [out, in] by name."""
    return load_file(folder / "reference.safetensors")


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Return the names of weights that differ at all; a zero has no sign where a tool multiplied.

    The names must be the same.
    """
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:3]
    return [name for name in found if not torch.equal(found[name].float(), expected[name])]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare all weights by name, exactly."""
    far = different(found, expected)
    gaps = [float((found[name].float() - expected[name]).abs().max()) for name in far]
    assert not far, f"{len(far)} of {len(found)} differ by up to {max(gaps):g}, such as {far[0]}"
