"""A table of 16 entries, read by PRMT: which nibble stands for which entry, and the constants.

`prmt` with a nibble n as selector returns byte n of eight where n < 8, else the *sign* of byte
n - 8, repeated in all bits: S. With eight bytes A for the nibbles below 8 and eight bytes B for the
others,

    prmt(A, n) ^ prmt(B, n ^ 8)  =  A[j] ^ S(B[j])  for n = j,
                                    B[j] ^ S(A[j])  for n = j + 8.

A[j] = T[j] ^ S(T[j]) and B[j] = T[j + 8] make that T[n], if and only if T[j] and T[j + 8] agree in
their highest bit. A value of 16 bits is two such bytes: entries j and j + 8 must agree in bits 15
and 7. The codes at run time are qplug's own, so the entries may be put in any order, which works
when each of the four classes of entries that these two bits make has an even size. What is free to
make them even:

- the sign of a zero;
- a constant c that the table is multiplied by and the absmax divided by, in float32: it moves the
  entries across the places where bit 7 changes;
- an entry just beside such a place may be rounded to its other side.

Where the number of negative entries is odd and none is zero, nothing makes the classes of bit 15
even. Such a table is stored with its entries turned left by one bit: the two bits are then 14,
which is 0 in all values below 2, and 6, and c makes their classes even. Turning back costs three
instructions per two weights.

A rounding of the table is the same for all weights of a code, so c is the one of 4096 with the
smallest error. Largest error relative to an entry (entries below 2^-8 of the largest count as
that): NF4 2.1e-4 and FP4 3e-8 in float16, 1.8e-3 and 2.0e-3 in bfloat16.

Eight weights take 1 XOR, 2 shifts, 8 PRMT, 4 XOR, and 4 PRMT that put low and high bytes together:
2.4 instructions per weight, no access to memory, 3.9 for a table that is turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import frexp, inf, isfinite

import torch
from torch import Tensor

from .asm import as_float
from .compat import jit, tl

STEPS = 8192
"""c is 1 - i / STEPS for i below STEPS / 2: further halvings change exponents alone."""

SMALL = 2.0**-8
"""Entries below this share of the largest have their error measured against it."""

BYTES = {"low": 0, "high": 8}


@dataclass(frozen=True, slots=True)
class Lookup:
    """A table of 16 entries in one dtype, as PRMT reads it.

    Attributes
    ----------
    order
        The checkpoint's code of each code at run time.
    patterns
        The 16 bits of the entry of each code at run time, its sign in bit 15.
    scale
        What the table was multiplied by: absmax is divided by it.
    error
        Largest relative error of an entry.
    turn
        1 where the constants are turned left by one bit, else 0.
    """

    order: tuple[int, ...]
    patterns: tuple[int, ...]
    scale: float
    error: float
    turn: int

    @property
    def codes(self) -> tuple[int, ...]:
        """The code at run time of each of the checkpoint's codes."""
        return tuple(self.order.index(code) for code in range(16))

    @property
    def asm(self) -> str:
        """PTX from `$4`, eight nibbles, to `$0` ... `$3`, two values of 16 bits each.

        Nibble 2p + lane becomes half `lane` of `$p`.
        """
        stored = [turned(pattern, self.turn) for pattern in self.patterns]
        tables = {name: _constants([p >> at & 0xFF for p in stored]) for name, at in BYTES.items()}
        lines = [
            ".reg .b32 w, v, l, h, t;",
            "mov.b32 w, $4;",
            "xor.b32 v, w, 0x88888888;",
            *_two_planes(tables, 0, self.turn),
            "shr.u32 w, w, 16;",
            "shr.u32 v, v, 16;",
            *_two_planes(tables, 2, self.turn),
        ]
        return "{ " + " ".join(lines) + " }"

    @property
    def quads(self) -> tuple[int, ...]:
        """Four signed integers of 64 bits with four entries each, the lowest code lowest."""
        values = []
        for at in range(0, 16, 4):
            quad = sum(p << 16 * i for i, p in enumerate(self.patterns[at : at + 4]))
            values.append(quad - (1 << 64) if quad >> 63 else quad)
        return tuple(values)


def turned(pattern: int, turn: int) -> int:
    """Turn 16 bits left by `turn`."""
    return (pattern << turn | pattern >> (16 - turn)) & 0xFFFF


def _constants(entries: Sequence[int]) -> tuple[str, str, str, str]:
    """Return A and B, two words of four bytes each, for one byte of 16 entries."""
    low = [entry ^ (0xFF if entry & 0x80 else 0) for entry in entries[:8]]
    eights = [*low, *entries[8:]]
    words = (eights[at : at + 4] for at in range(0, 16, 4))
    first, second, third, fourth = (
        f"0x{int.from_bytes(bytes(word), 'little'):08x}" for word in words
    )
    return first, second, third, fourth


def _two_planes(tables: dict[str, tuple[str, str, str, str]], plane: int, turn: int) -> list[str]:
    """Return PTX from the four low nibbles of `w` (`v`: top bits of nibbles turned)."""
    lines = []
    for register, name in (("l", "low"), ("h", "high")):
        a0, a1, b0, b1 = tables[name]
        lines += [
            f"prmt.b32 {register}, {a0}, {a1}, w;",
            f"prmt.b32 t, {b0}, {b1}, v;",
            f"xor.b32 {register}, {register}, t;",
        ]
    for out, selector in ((plane, "0x5140"), (plane + 1, "0x7362")):
        lines.append(f"prmt.b32 ${out}, l, h, {selector};")
    if turn:
        for out in (plane, plane + 1):
            # Bits 14 to 0 from one place above, bit 15 from bit 0 of the same half.
            lines += [
                f"shl.b32 t, ${out}, 15;",
                f"shr.u32 ${out}, ${out}, 1;",
                f"lop3.b32 ${out}, ${out}, t, 0x7fff7fff, 0xE4;",
            ]
    return lines


@cache
def lookup(table: tuple[float, ...], dtype: torch.dtype) -> Lookup:
    """Return how PRMT reads `table` in `dtype`.

    Parameters
    ----------
    table
        16 finite entries.
    dtype
        float16 or bfloat16.

    Raises
    ------
    ValueError
        If there are not 16 entries, or one is not finite.
    """
    if len(table) != 16 or not all(map(isfinite, table)):
        raise ValueError(f"a table of {len(table)} entries {table}, expected 16 finite ones")
    values = torch.tensor(table, dtype=torch.float64)
    fraction, exponent = frexp(values.abs().max().item())
    power = 2.0 ** ((exponent - 1 if fraction == 0.5 else exponent) if fraction else 0)
    c = 1 - torch.arange(STEPS // 2, dtype=torch.float64) / STEPS
    scaled = c[:, None] * (values / power)
    best: tuple[float, int, Tensor, int] = (inf, 0, values, 0)
    for turn in (0, 1):
        for signs in _signs(values, turn):
            magnitudes, errors = _even(scaled.abs(), signs, dtype, turn)
            error, at = errors.min(0)
            if error.item() < best[0]:
                best = (error.item(), int(at), magnitudes[at] + (signs.int() << 15), turn)
        if best[0] < inf:
            break
    error_, at_, patterns, turn = best
    order = _pairs(patterns.tolist(), turn)
    return Lookup(
        order,
        tuple(int(patterns[code]) for code in order),
        c[at_].item() / power,
        error_,
        turn,
    )


def _signs(values: Tensor, turn: int) -> list[Tensor]:
    """Return which entries are negative, for each useful choice of the signs of zeros.

    Unless the table is turned, an odd number of negative entries is of no use.
    """
    negative = values < 0
    zeros = torch.nonzero(values == 0).flatten()
    choices = [negative]
    if zeros.numel():
        other = negative.clone()
        other[zeros[0]] = True
        choices.append(other)
    return choices[:1] if turn else [signs for signs in choices if int(signs.sum()) % 2 == 0]


def _even(wanted: Tensor, signs: Tensor, dtype: torch.dtype, turn: int) -> tuple[Tensor, Tensor]:
    """Round `wanted [C, 16]` so that the classes of each row are even.

    Returns
    -------
    magnitudes : Tensor
        int32 `[C, 16]`, 15 bits each.
    errors : Tensor
        float64 `[C]`, the largest of each row.
    """
    shift = 7 - turn
    least = wanted.amax(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny) * SMALL

    def error(magnitudes: Tensor) -> Tensor:
        exact = magnitudes.to(torch.int16).view(dtype).double()
        return (exact - wanted).abs() / torch.maximum(wanted, least)

    near = wanted.to(dtype).view(torch.int16).int()
    below, above = ((near >> shift) << shift) - 1, ((near >> shift) + 1) << shift
    below = torch.where(below < 0, above, below)
    other = torch.where(error(below) <= error(above), below, above)
    # A zero stays one: its other side would be no zero.
    cost = torch.where(wanted == 0, inf, error(other))
    for group in (signs, ~signs) if turn == 0 else (torch.ones_like(signs),):
        bits = (near >> shift) & 1
        odd = (bits * group).sum(1) % 2 == 1
        cheapest = torch.where(group, cost, inf).argmin(1, keepdim=True)
        moved = near.scatter(1, cheapest, other.gather(1, cheapest))
        near = torch.where(odd[:, None], moved, near)
    return near, error(near).amax(1)


def _pairs(patterns: list[int], turn: int) -> tuple[int, ...]:
    """Order 16 entries so that those at j and j + 8 agree in the bits that PRMT needs."""
    classes: dict[int, list[int]] = {}
    for code, pattern in enumerate(patterns):
        classes.setdefault(turned(pattern, turn) & 0x8080, []).append(code)
    first = [code for members in classes.values() for code in members[::2]]
    second = [code for members in classes.values() for code in members[1::2]]
    return tuple(first + second)


# The device ---------------------------------------------------------------------------------------


@jit
def entries(code, QUADS: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr):
    """Return the 16 bits of the entry of each code: `Lookup.quads` says them."""
    q0, q1 = tl.full((BN, KP), QUADS[0], tl.int64), tl.full((BN, KP), QUADS[1], tl.int64)
    q2, q3 = tl.full((BN, KP), QUADS[2], tl.int64), tl.full((BN, KP), QUADS[3], tl.int64)
    odd = (code & 4) != 0
    quad = tl.where((code & 8) != 0, tl.where(odd, q3, q2), tl.where(odd, q1, q0))
    return (quad >> ((code & 3) * 16).to(tl.int64)).to(tl.int16)


@jit
def twin(
    words, QUADS: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Return four planes `[BN, KP]` in Triton's operations, as the text does."""
    even, odd = tl.split(words.reshape(BN, KP // 2, 2))
    pair = (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)
    planes = ()
    for p in tl.static_range(4):
        code = tl.join((pair >> (8 * p)) & 15, (pair >> (8 * p + 4)) & 15).reshape(BN, KP)
        value = as_float(entries(code, QUADS, BN, KP), DTYPE, WIDE)
        planes = planes + (value,)  # type: ignore[assignment]
    return planes


@jit
def decode(
    words, TEXT: tl.constexpr, QUADS: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return four planes `[BN, KP]` of entries: by PTX, or by its twin where there is no text."""
    if TEXT == "":
        return twin(words, QUADS, BN, KP, DTYPE, WIDE)
    else:
        v = tl.inline_asm_elementwise(
            TEXT, "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
        planes = ()
        for p in tl.static_range(4):
            planes = planes + (v[p].to(DTYPE, bitcast=True),)  # type: ignore[assignment]
        return planes
