"""A layout is a value: where the codes, scales and zeros of one linear lie in its stored tensors.

A `Part` describes one stored tensor as two einops patterns around a bit stream: the canonical
axes are rearranged into rows of a little-endian bit stream (`stream`), each row is packed into
words (`packing`), and the rows of words are rearranged into the tensor that is stored (`stored`).
Names, shapes, dtypes, checks, documentation, the packer and the parameters of an engine's layer
all derive from it. Nothing here imports torch.

Axes: `out` = out_features, `inp` = in_features, `group` = quantization groups along `inp`,
`block` = quantization blocks of the weight flattened row by row, `nested` = blocks of those,
`w` = words of one row. einops forbids names that end in `_`, and `in` is a Python word. An axis may
be cut: `(inp h t)` with fixed lengths of `h` and `t` is in_features again, `inp` counting what is
left. `1` is an axis of length one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cache
from math import gcd, lcm, prod

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
    OFFSETS = "offsets"
    ABSMAX = "absmax"
    NESTED = "nested"
    G_IDX = "g_idx"
    WEIGHT = "weight"
    CONSTANT = "constant"


_CANONICAL = {
    Holds.CODES: ("out", "inp"),
    Holds.ZEROS: ("out", "group"),
    Holds.SCALES: ("out", "group"),
    Holds.OFFSETS: ("out", "group"),
    Holds.ABSMAX: ("block",),
    Holds.NESTED: ("nested",),
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

    `word` is the dtype of the stored words; words are bit patterns, whatever it is. `order[i]` is
    the code that lies in field `i`, both counted inside one run of `len(order)`, a word or a part
    of one; empty means natural. `per_word` says how many codes a word holds where they do not fill
    it and none crosses into the next (the top bits are idle). `planes` cuts each code into fields
    of these widths, the low bits first: of 32 codes, plane by plane, each plane is a bit stream of
    its own. `spread` says that no code crosses into the next word, and that the top bit left in
    each of `bits` words holds a bit of one code more, the lowest in the first: 16 codes of 3 bits
    in three words of 16.
    """

    bits: int
    word: str = "I32"
    order: tuple[int, ...] = ()
    per_word: int = 0
    planes: tuple[int, ...] = ()
    spread: bool = False

    @property
    def word_bits(self) -> int:
        """Bits of one word."""
        return 8 * ITEMSIZE[self.word]

    def words(self, codes: int) -> int:
        """Return how many words hold a row of `codes` codes."""
        if self.planes:
            return -(-codes // 32) * 32 * self.bits // self.word_bits
        if self.spread:
            return -(-codes // self.whole) * self.bits
        if self.per_word:
            return -(-codes // self.per_word)
        return -(-codes * self.bits // self.word_bits)

    @property
    def factor(self) -> Fraction:
        """Codes per word (32/3 for 3-bit codes in 32-bit words)."""
        return Fraction(self.per_word or Fraction(self.word_bits, self.bits))

    @property
    def whole(self) -> int:
        """The fewest codes that end on a word, or on a run of words that share one more."""
        return 32 if self.planes else self.factor.numerator


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
    return tuple(name for axis in _axes(side) for name in axis if name != "1")


@cache
def _stored_axes(stream: str, stored: str) -> tuple[str, ...]:
    """Follow the axes through both patterns of a part."""
    rows = tuple(" ".join(axis) for axis in _axes(stream.partition("->")[2]))
    if not stored:
        return rows
    left, _, right = stored.partition("->")
    by_name = {"1": "1"}
    for axis, row in zip(_axes(left), rows, strict=True):
        by_name |= {name: name for name in axis} if len(axis) > 1 else {axis[0]: row}
    return tuple(" ".join(by_name[name] for name in axis) for axis in _axes(right))


@cache
def _free(axis: tuple[str, ...], lengths: tuple[tuple[str, int], ...]) -> str:
    """Return the one axis of a cut canonical axis whose length is not fixed."""
    fixed = dict(lengths)
    (free,) = (name for name in axis if name not in fixed)
    return free


@cache
def _starts_right(holds: Holds, stream: str, lengths: tuple[tuple[str, int], ...]) -> bool:
    """Whether a pattern starts at the canonical axes of what a part holds, and loses none."""
    left, _, right = stream.partition("->")
    named = [_free(axis, lengths) for axis in _axes(left)]
    return sorted(named) == sorted(_CANONICAL[holds]) and sorted(_names(right)) == sorted(
        _names(left)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One stored tensor of a linear, named `<module>.<name>`.

    Attributes
    ----------
    name, dtype
        As stored; the dtype by safetensors' name.
    holds
        What its numbers mean.
    stream
        Canonical axes to rows of a bit stream; for what is not packed, to the stored tensor.
    packing
        How a row of codes or zeros becomes words; `None` for what is not packed.
    stored
        Rows of words to the stored tensor; empty if they are that. An axis of several may be taken
        apart again, by the same names.
    rule
        How stored zeros relate to the value subtracted (`zeros.RULES`); `as_is` for everything
        whose stored integer is the value itself.
    lengths
        Lengths of the axes that cut a canonical one, by name.
    multiple
        The number of groups is padded with zeros to a multiple of this.
    block
        Weights, laid row after row, that share one entry (absmax only).
    shift
        What is added to a code or zero where it is stored unpacked (int8 files: -128).
    shared
        One value for the whole linear, stored as `[1]`: what the patterns say is spread from it.
    constant
        The bytes that the tensor always has in this scheme; such a part has no patterns but a
        shape, `constant_shape`.
    """

    name: str
    holds: Holds
    dtype: str
    stream: str = ""
    packing: Packing | None = None
    stored: str = ""
    rule: str = "as_is"
    lengths: tuple[tuple[str, int], ...] = ()
    multiple: int = 1
    block: int = 0
    shift: int = 0
    shared: bool = False
    constant: bytes = b""
    constant_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse, at import of the format, a pattern that does not fit what the part holds."""
        if self.holds is Holds.CONSTANT:
            if len(self.constant) != TensorSpec(self.dtype, self.constant_shape).nbytes:
                raise ValueError(f"{self.name}: {len(self.constant)} bytes are not its shape")
            return
        if not _starts_right(self.holds, self.stream, self.lengths):
            raise ValueError(f"{self.name}: {self.stream!r} does not start at the canonical axes")
        if self.packing is None and self.stored:
            raise ValueError(f"{self.name}: `stored` is for packed parts only")

    def _free(self, axis: tuple[str, ...]) -> str:
        """Return the one axis of a cut canonical axis whose length is not fixed."""
        return _free(axis, self.lengths)

    @property
    def axes(self) -> tuple[str, ...]:
        """What each stored axis runs over: `out`, `inp`, `group` …, in stored order."""
        if self.holds is Holds.CONSTANT:
            return ("1",) * len(self.constant_shape)
        if self.shared:
            return ("1",)
        return _stored_axes(self.stream, self.stored)

    def split_of(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the lengths that take stored axes apart: all but the first of each."""
        lengths = self.sizes_of(sizes)
        inner = (name for axis in _axes(self.stream.partition("->")[2]) for name in axis[1:])
        return {name: lengths[name] for name in inner} | dict(self.lengths)

    def sizes_of(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the length of every axis that the patterns name."""
        found = {**dict(self.lengths), "1": 1}
        for axis in _axes(self.stream.partition("->")[0]):
            free = self._free(axis)
            length = sizes[free]
            if free == "group":
                length = -(-length // self.multiple) * self.multiple
            found[free] = length // prod(found[name] for name in axis if name != free)
        return found

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
        """Return dtype and shape for the given sizes of the canonical axes (`Scheme.sizes`)."""
        if self.holds is Holds.CONSTANT:
            return TensorSpec(self.dtype, self.constant_shape)
        lengths = self.sizes_of(sizes)
        shape = [prod(lengths[name] for name in axis.split()) for axis in self.axes]
        if self.packing is not None and self.packed_axis is not None:
            shape[self.packed_axis] = self.packing.words(shape[self.packed_axis])
        return TensorSpec(self.dtype, tuple(shape))

    def span(self, sizes: Mapping[str, int], start: int, stop: int) -> tuple[int, int, int] | None:
        """Return where output rows `start` to `stop` lie: (stored axis, first, length).

        `None` if the part does not run over output rows. `start` is a multiple of the layout's
        `row_step`, and `stop` is one or the last row.
        """
        if self.holds is Holds.ABSMAX:
            per_entry = self.block * prod(length for _, length in self.lengths)
            first = start * sizes["inp"] // per_entry
            last = -(-stop * sizes["inp"] // per_entry)
            return self.axes.index("block"), first, last - first
        found = self._out_axis(sizes)
        if found is None:
            return None
        axis, numerator, denominator = found
        first, last = start * numerator // denominator, -(-stop * numerator // denominator)
        if self.packing is not None and self.packed_axis == axis:
            first, last = self.packing.words(first), self.packing.words(last)
        return axis, first, last - first

    def _out_axis(self, sizes: Mapping[str, int]) -> tuple[int, int, int] | None:
        """Return the stored axis over output rows, and its elements (before packing) per row."""
        at = next((n for n, axis in enumerate(self.axes) if axis.split()[0] == "out"), None)
        if at is None:
            return None
        lengths = self.sizes_of(sizes)
        inner = prod(lengths[name] for name in self.axes[at].split()[1:])
        left = next(a for a in _axes(self.stream.partition("->")[0]) if "out" in a)
        return at, inner, prod(lengths[name] for name in left if name != "out")

    def cut(self, axis: str) -> tuple[int, int]:
        """Return by what fixed lengths `axis` is cut: on its stored axis, and canonically.

        A stored axis of n times the first holds n times the second of it.
        """
        fixed = dict(self.lengths)
        stored = next(names for names in self.axes if axis in names.split())
        left = next(names for names in _axes(self.stream.partition("->")[0]) if axis in names)
        return (
            prod(fixed.get(name, 1) for name in stored.split()),
            prod(fixed.get(name, 1) for name in left),
        )

    def row_step(self, sizes: Mapping[str, int]) -> int:
        """Return the smallest number of output rows that cuts no word and no block."""
        if self.holds is Holds.ABSMAX:
            return self.block // gcd(sizes["inp"], self.block)
        found = self._out_axis(sizes)
        if found is None:
            return 1
        axis, numerator, denominator = found
        packed = self.packing is not None and self.packed_axis == axis
        whole = self.packing.whole if packed and self.packing is not None else 1
        # The smallest r for which r * numerator / denominator is a multiple of `whole`.
        step = denominator * whole
        return step // gcd(numerator, step)


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

    def row_step(self, sizes: Mapping[str, int]) -> int:
        """Return the smallest number of output rows that cuts no word in any part."""
        return lcm(*(part.row_step(sizes) for part in self.parts))
