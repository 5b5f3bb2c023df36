"""What a quantization config says, before any tensor is looked at.

Headers decide what is true; a claim is compared with them, and `inspect --config` judges it alone.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Stated:
    """What a config says of one linear.

    `group_size` is -1 for one group and `None` where nothing is said; `in_features` is said only
    by formats whose words may end in padding. `ragged` allows a short last group.
    """

    bits: int
    group_size: int | None
    sym: bool | None = None
    desc_act: bool = False
    in_features: int | None = None
    ragged: bool = True


def _none(module: str) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a config says of a model.

    Attributes
    ----------
    format : str
        Name of the format, as `formats.find` takes it.
    base : Stated
        The scheme of a linear about which nothing else is said.
    overrides : callable
        module -> its own scheme, or `None` where it has none.
    skip : callable
        module -> the entry of the config that leaves it in full precision, or `None`.
    lm_head : bool or None
        Whether the head is said to be quantized; `None`: not said.
    producer : str
        The tool that wrote the file, as the file names it.
    block : Mapping
        The raw quantization config.
    details : Mapping
        What only the format itself asks for.
    """

    format: str
    base: Stated
    overrides: Callable[[str], Stated | None] = _none
    skip: Callable[[str], str | None] = _none
    lm_head: bool | None = None
    producer: str = ""
    block: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def of(self, module: str) -> Stated:
        """Return what is said of one linear, should it be quantized."""
        return self.overrides(module) or self.base
