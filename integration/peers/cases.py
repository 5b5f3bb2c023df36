"""Cases of a table, and the weights of two readers compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from qplug_converters.names import normal

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


def by_role(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under names that are the same for every tool: experts are called variously."""
    return {normal(name)[0]: weight.float() for name, weight in weights.items()}


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the weights that differ at all, and by how much at most.

    They must be the same by name. A zero has no sign: a tool that multiplies may give it another.
    """
    found, expected = by_role(found), by_role(expected)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:3]
    return {
        name: float((found[name] - expected[name]).abs().max())
        for name in expected
        if not torch.equal(found[name], expected[name])
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare all weights by name, exactly."""
    far = different(found, expected)
    assert not far, f"{len(far)} of {len(expected)} differ, such as {max(far.items())}"
