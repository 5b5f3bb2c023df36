"""A layout is a value: where the codes, scales and zeros of one linear lie in its stored tensors.

A `Part` describes one stored tensor as two einops patterns around a bit stream: the canonical
axes are rearranged into rows of a little-endian bit stream (`stream`), each row is packed into
words (`packing`), and the rows of words are rearranged into the tensor that is stored (`stored`).
Names, shapes, dtypes, checks, documentation, the packer and the parameters of an engine's layer
all derive from it. Nothing here imports torch.

Axes: `out` = out_features, `inp` = in_features, `group` = quantization groups along `inp`,
`w` = words of one row. einops forbids names that end in `_`, and `in` is a Python word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cache
from math import prod

from .errors import QplugError

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of the dtypes that qplug reads, by safetensors' own names."""

FLOATS = ("F16", "BF16", "F32")
"""Dtypes that scales may have."""


class Holds(Enum):
    """What the numbers of a stored tensor mean."""

    CODES = "codes"
    ZEROS = "zeros"
    SCALES = "scales"
    G_IDX = "g_idx"
    WEIGHT = "weight"


_CANONICAL = {
    Holds.CODES: ("out", "inp"),
    Holds.ZEROS: ("out", "group"),
    Holds.SCALES: ("out", "group"),
    Holds.G_IDX: ("inp",),
    Holds.WEIGHT: ("out", "inp"),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype (safetensors name) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """Return e.g. `I32[576, 128]`."""
        return f"{self.dtype}{list(self.shape)}"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEMSIZE[self.dtype] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Packing:
    """How the codes of a row become words: a little-endian bit stream, lowest bit first.

    `order[i]` is the code (counted inside one word) that lies in field `i`; empty means natural.
    """

    bits: int
    word: str = "I32"
    order: tuple[int, ...] = ()

    @property
    def word_bits(self) -> int:
        """Bits of one word."""
        return 8 * ITEMSIZE[self.word]

    def words(self, codes: int) -> int:
        """Return how many words hold a row of `codes` codes."""
        return -(-codes * self.bits // self.word_bits)

    @property
    def factor(self) -> Fraction:
        """Codes per word (32/3 for 3-bit codes in 32-bit words)."""
        return Fraction(self.word_bits, self.bits)


@cache
def _axes(side: str) -> tuple[tuple[str, ...], ...]:
    """Split one side of a pattern into its axes; an axis in parentheses has several names."""
    return tuple(tuple(a.strip("()").split()) for a in re.findall(r"\([^)]*\)|\S+", side))


@cache
def swapped(pattern: str) -> str:
    """Return a pattern with its sides exchanged: the inverse rearrangement."""
    left, _, right = pattern.partition("->")
    return f"{right.strip()} -> {left.strip()}"


def _names(side: str) -> tuple[str, ...]:
    """Return every name on one side of a pattern."""
    return tuple(name for axis in _axes(side) for name in axis)


@cache
def _stored_axes(stream: str, stored: str) -> tuple[str, ...]:
    """Follow the axes through both patterns of a part."""
    rows = tuple(" ".join(axis) for axis in _axes(stream.partition("->")[2]))
    if not stored:
        return rows
    left, _, right = stored.partition("->")
    by_name = dict(zip(_names(left), rows, strict=True))
    return tuple(by_name[name] for name in _names(right))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One stored tensor of a linear, named `<module>.<name>`.

    `rule` names how stored zeros relate to the value subtracted (`zeros.RULES`); `as_is` for
    everything whose stored integer is the value itself.
    """

    name: str
    holds: Holds
    dtype: str
    stream: str
    packing: Packing | None = None
    stored: str = ""
    rule: str = "as_is"

    def __post_init__(self) -> None:
        """Refuse, at import of the format, a pattern that does not fit what the part holds."""
        left, _, right = self.stream.partition("->")
        names = _names(left)
        if names != _CANONICAL[self.holds] or sorted(_names(right)) != sorted(names):
            raise ValueError(f"{self.name}: {self.stream!r} does not start at the canonical axes")
        if self.packing is None and self.stored:
            raise ValueError(f"{self.name}: `stored` is for packed parts only")

    @property
    def axes(self) -> tuple[str, ...]:
        """What each stored axis runs over: `out`, `inp` or `group`, in stored order."""
        return _stored_axes(self.stream, self.stored)

    @property
    def packed_axis(self) -> int | None:
        """The stored axis that runs over words instead of elements; `None` if not packed."""
        if self.packing is None:
            return None
        last = " ".join(_axes(self.stream.partition("->")[2])[-1])
        return self.axes.index(last)

    def axis(self, name: str) -> int | None:
        """Return the stored axis that runs over `name`, or `None`."""
        return self.axes.index(name) if name in self.axes else None

    def spec(self, sizes: Mapping[str, int]) -> TensorSpec:
        """Return dtype and shape for the given `out`, `inp` and `group`."""
        shape = [sizes[name] for name in self.axes]
        if self.packing is not None and self.packed_axis is not None:
            shape[self.packed_axis] = self.packing.words(shape[self.packed_axis])
        return TensorSpec(self.dtype, tuple(shape))


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything about the storage of one linear, on disk or in a kernel's memory."""

    parts: tuple[Part, ...]

    def __iter__(self) -> Iterator[Part]:
        """Iterate over the parts."""
        return iter(self.parts)

    def part(self, holds: Holds) -> Part | None:
        """Return the part that holds `holds`, or `None`."""
        return next((part for part in self.parts if part.holds is holds), None)

    def specs(self, sizes: Mapping[str, int]) -> dict[str, TensorSpec]:
        """Return name, dtype and shape of every stored tensor."""
        return {part.name: part.spec(sizes) for part in self.parts}

    def check(
        self, module: str, sizes: Mapping[str, int], found: Mapping[str, TensorSpec], fix: str = ""
    ) -> list[QplugError]:
        """Compare the stored tensors of `module` (by part name) with what they must be."""
        problems = []
        for name, spec in self.specs(sizes).items():
            where = f"{module}.{name}"
            if name not in found:
                problems.append(QplugError("no such tensor", where, str(spec), fix))
            elif found[name] != spec:
                problems.append(QplugError(str(found[name]), where, str(spec), fix))
        return problems

    def row_step(self) -> int:
        """Return the smallest number of output rows that cuts no word in any part."""
        step = 1
        for part in self.parts:
            if part.packing is not None and part.axes[part.packed_axis or 0] == "out":
                factor = part.packing.factor
                step = max(step, factor.numerator if factor.denominator > 1 else int(factor))
        return step
