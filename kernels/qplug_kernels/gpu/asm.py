"""Integers out of packed words as 16-bit floats: texts of PTX, and the same in Triton's operations.

One 32-bit register holds two neighbouring words (inputs k and k + 1 of one output) of 16 bits. A
field of `bits` at `position` of each is masked onto the exponent of a magic number M, whose last
place is 1, by one lop3: the result is M + code * 2^position, exactly, while position + bits are
within the mantissa (10 bits of float16 above M = 1024, 7 of bfloat16 above M = 128). A subtraction
or a multiply-add then gives code - zero, exactly. Fields higher up are shifted down first; bits of
the upper word enter the lower one from the top, where no mask reaches.

    bits  float16 (shift: positions)       bfloat16 (shift: positions)
    2     0: 0 2 4 6 8   10: 0 2 4          0: 0 2 4   6: 0 2 4   12: 0 2
    3     0: 0 3 6   9: 0 3, each word      0: 0 3   6: 0 3   12: 0, each word
    4     0: 0 4   8: 0 4                   0: 0   4: 0   8: 0   12: 0
    8     0: 0   8: 0                       both nibbles of a byte: (16 * (128 + high) - 2176) +
                                            (128 + low - zero), exact at each step

The sixteenth plane of 3 bits is bit 15 of its three words. A zero comes as M + zero, a pair of
equal 16-bit floats (8 bits in bfloat16: as the zero itself, since 128 + 255 has 9 bits); texts of
symmetric grids have the midpoint written in. bfloat16 has no subtraction before sm_90: everything
is a multiply-add by 1 or -1.

`tests/kernels/gpu/test_asm.py` runs every text through a model of the instructions.
"""

from __future__ import annotations

from functools import cache

from .compat import jit, tl

PLANES = {2: 8, 3: 16, 4: 4, 8: 2}
"""Planes in a word, or of 3 bits in three words."""

WORDS = {2: 1, 3: 3, 4: 1, 8: 1}
"""Words that hold one code of every plane."""

MAGIC = {False: 1024, True: 128}
"""The number whose last place is 1, by whether the dtype is bfloat16."""

_MANTISSA = {False: 10, True: 7}


def bits_of(value: float, bf16: bool) -> int:
    """Return the 16 bits of a number that float16 or bfloat16 holds exactly."""
    import numpy as np

    if bf16:
        return int(np.float32(value).view(np.uint32)) >> 16
    return int(np.float16(value).view(np.uint16))


def _pair(value: float, bf16: bool) -> str:
    bits = bits_of(value, bf16)
    return f"0x{bits << 16 | bits:08x}"


def _mask(bits: int, position: int) -> str:
    field = ((1 << bits) - 1) << position
    return f"0x{field << 16 | field:08x}"


def place(bits: int, plane: int, bf16: bool) -> tuple[int, int, int]:
    """Return where a plane lies: word, shift, and position after it (plane 15 of 3 bits: none)."""
    per_word = 5 if bits == 3 else 16 // bits
    word, field = divmod(plane, per_word)
    fields_at_once = (_MANTISSA[bf16] - bits) // bits + 1 if bits < 8 else 1
    shift, position = divmod(field, fields_at_once)
    return word, shift * fields_at_once * bits, position * bits


class _Text:
    """Lines of one text; constants are moved to registers once, words shifted once."""

    def __init__(self, bits: int, bf16: bool, symmetric: bool, count: int) -> None:
        self.bits, self.bf16, self.symmetric = bits, bf16, symmetric
        self.words = [f"${count + word}" for word in range(3)]
        self.zero = f"${count + 3}"
        self.type = "bf16x2" if bf16 else "f16x2"
        self.lines: list[str] = []
        self.known: dict[str, str] = {}

    def register(self, line: str) -> str:
        """Emit `line`, in which `@` is a new register, unless it was before; return it."""
        if line not in self.known:
            self.known[line] = f"r{len(self.known)}"
            self.lines.append(line.replace("@", self.known[line]))
        return self.known[line]

    def constant(self, value: float) -> str:
        return self.register(f"mov.b32 @, {_pair(value, self.bf16)};")

    def shifted(self, word: int, shift: int) -> str:
        return (
            self.register(f"shr.u32 @, {self.words[word]}, {shift};")
            if shift
            else (self.words[word])
        )

    def minus_zero(self, position: int) -> str:
        """Return the register that a field at `position` is corrected by, scaled by 2^-position."""
        magic = MAGIC[self.bf16]
        if self.symmetric:
            return self.constant(-(magic / 2**position + 2 ** (self.bits - 1)))
        offset = self.constant(magic - magic / 2**position)
        if self.bf16:
            minus_one = self.constant(-1)
            return self.register(f"fma.rn.bf16x2 @, {self.zero}, {minus_one}, {offset};")
        return self.register(f"sub.f16x2 @, {offset}, {self.zero};")

    def correct(self, out: str, position: int) -> None:
        """Turn M + code * 2^position in `out` into code - zero."""
        if position or self.symmetric:
            correction = self.minus_zero(position)
            factor = self.constant(2.0**-position)
            if position == 0 and not self.bf16:
                self.lines.append(f"add.f16x2 {out}, {out}, {correction};")
                return
            self.lines.append(f"fma.rn.{self.type} {out}, {out}, {factor}, {correction};")
        elif self.bf16:
            minus_one = self.constant(-1)
            self.lines.append(f"fma.rn.bf16x2 {out}, {self.zero}, {minus_one}, {out};")
        else:
            self.lines.append(f"sub.f16x2 {out}, {out}, {self.zero};")

    def field(self, out: str, source: str, mask: str, upon: str) -> None:
        self.lines.append(f"lop3.b32 {out}, {source}, {mask}, {upon}, 0xEA;")

    def plane(self, out: str, plane: int) -> None:
        magic = self.constant(MAGIC[self.bf16])
        if self.bits == 3 and plane == 15:
            for bit in range(3):
                source = self.shifted(bit, 15 - bit)
                self.field(out, source, _mask(1, bit), out if bit else magic)
            self.correct(out, 0)
        elif self.bits == 8 and self.bf16:
            self.byte(out, plane, magic)
        else:
            word, shift, position = place(self.bits, plane, self.bf16)
            self.field(out, self.shifted(word, shift), _mask(self.bits, position), magic)
            self.correct(out, position)

    def byte(self, out: str, plane: int, magic: str) -> None:
        """8 bits as bfloat16, which has 7 of mantissa: each nibble by itself."""
        low = self.register(
            f"lop3.b32 @, {self.shifted(0, 8 * plane)}, {_mask(4, 0)}, {magic}, 0xEA;"
        )
        self.field(out, self.shifted(0, 8 * plane + 4), _mask(4, 0), magic)
        one, sixteen = self.constant(1), self.constant(16)
        # 16 * high - 128 (symmetric: - 256) is exact, and so are the sums that follow.
        offset = self.constant(-2304 if self.symmetric else -2176)
        self.lines.append(f"fma.rn.bf16x2 {out}, {out}, {sixteen}, {offset};")
        if not self.symmetric:
            low = self.register(f"fma.rn.bf16x2 @, {self.zero}, {self.constant(-1)}, {low};")
        self.lines.append(f"fma.rn.bf16x2 {out}, {out}, {one}, {low};")


@cache
def text(bits: int, bf16: bool, symmetric: bool, first: int, count: int) -> str:
    """Return PTX that gives `count` planes from `first` on.

    Operands: `count` outputs, three words (all the first where there is but one), the zero pair
    (symmetric grids: anything).
    """
    made = _Text(bits, bf16, symmetric, count)
    for n in range(count):
        made.plane(f"${n}", first + n)
    registers = ", ".join(made.known.values())
    return "\n".join(["{", f".reg .b32 {registers};", *made.lines, "}"])


def constraints(count: int) -> str:
    """Return the constraints of `text`: outputs are written before all inputs are read."""
    return ",".join(["=&r"] * count + ["r"] * 4)


@jit
def as_float(bits, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Read 16 bits as a number of DTYPE; in float32 if WIDE.

    Widened by hand, since the interpreter takes the bits of bfloat16 for integers.
    """
    if not WIDE:
        return bits.to(DTYPE, bitcast=True)
    elif DTYPE == tl.bfloat16:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(DTYPE, bitcast=True).to(tl.float32)


@jit
def twin_plane(
    w0, w1, w2, z, BITS: tl.constexpr, PLANE: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr
):
    """Return code - zero of one plane in Triton's operations; `z` as `text` takes it."""
    if BITS == 3:
        if PLANE == 15:
            code = ((w0 >> 15) & 1) | ((w1 >> 14) & 2) | ((w2 >> 13) & 4)
        else:
            if PLANE < 5:
                word = w0
            elif PLANE < 10:
                word = w1
            else:
                word = w2
            code = (word >> (3 * (PLANE % 5))) & 7
    else:
        code = (w0 >> (BITS * PLANE)) & ((1 << BITS) - 1)
    if DTYPE == tl.bfloat16:
        # Few cards have arithmetic of bfloat16: 2^23 + code - (2^23 + zero) in float32, whose upper
        # half is the difference, since it has no more than eight bits.
        magic: tl.constexpr = 0 if BITS == 8 else 128
        above = z.to(tl.float32) + (8388608.0 - magic)
        value = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - above
        if WIDE:
            return value
        else:
            half = (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
            return half.to(tl.bfloat16, bitcast=True)
    else:
        return as_float(code | 0x6400, DTYPE, WIDE) - z


@jit
def twin(
    w0, w1, w2, z, BITS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return COUNT planes from FIRST on, as the text does."""
    planes = ()
    for n in tl.static_range(COUNT):
        planes = planes + (twin_plane(w0, w1, w2, z, BITS, FIRST + n, DTYPE, WIDE),)  # type: ignore[assignment]
    return planes
