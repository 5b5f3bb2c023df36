"""Whole-word routes between packed rows and uint8 codes, in plain torch.

A packed row is a little-endian bit stream in int32 words: code `i` lies in bits
`[i * bits, (i + 1) * bits)`. Done literally, every code costs a shift, a mask and a strided byte.
Here every step moves a whole vector, and three observations carry it:

* *Transpose words, not codes.* A 4-bit matrix has eight times fewer words than codes, so a layout
  that packs down the columns (GPTQ) costs one transpose of words more than one along the rows.
* *Spreading fields is arithmetic.* Two fields of `k` bits in one integer move to distance `d` by
  `x + (2**d - 2**k) * (x >> k)`: two vector passes where shift, or, mask are three. A widening
  cast (uint8 -> int16), which torch vectorises, makes the room. Packing is the inverse.
* *Where words and codes run along different axes (AWQ), fields are planes.* Byte `j` of a block of
  words is a narrowing cast, and a shift or mask of it gives whole runs of rows of codes.

Blocks of a matrix are shared among threads (`threads`). Codes that only change the axis along which
they are packed need no unpacking (`tiles`).

Given up: codes of 3, 5, 6 and 7 bits cross bytes and words, so their bytes move one by one (two
thirds of the speed of 4 bits), and so do codes in an `order` that run along the words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd

import torch
from torch import Tensor

from .threads import Cut, Kernel, share

WORD_BITS = 32

_UNIT = 32
"""Codes that fill a whole number of words (`bits` of them) at any number of bits."""

_BLOCK = 1 << 20
"""Codes of a block: up to 4 MB of scratch a thread. 2**18 codes are 1.3 (GPTQ) to 2 (AWQ) times
slower: a pass is then short against Python's share of it, which holds the interpreter's lock."""

_LEAST = 1 << 17
"""Codes below which a block is not cut further to give another thread something to do."""

_RUN = 4096
"""Bytes of a row of codes in a block: a page, so that fresh pages are met once. 1.1 to 1.5 times
faster than 1024."""

_PAD = 16
"""Words (one cache line) between packed rows before they are turned: at a stride of a power of two
the lines of a column share few cache sets. GPTQ packs 1.1 times faster, AWQ no faster."""

_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_Round = tuple[Tensor, Tensor, Tensor, Tensor, int]


def unpack(
    words: Tensor,
    bits: int,
    n: int,
    *,
    transposed: bool,
    codes_transposed: bool = False,
    order: Sequence[int] = (),
    out: Tensor | None = None,
) -> Tensor:
    """Take the codes out of packed rows.

    Parameters
    ----------
    words
        int32 `[rows, w]`, or `[w, rows]` if `transposed`; `w = ceil(n * bits / 32)`. May be
        strided; is not modified.
    bits
        Bits of a code, 1 to 8. 2, 4 and 8 are the fast ones.
    n
        Codes of a row.
    transposed
        Whether a packed row runs down a column of `words` (GPTQ's qweight).
    codes_transposed
        Whether a packed row becomes a column of the result (AWQ's qweight, all qzeros).
    order
        `order[i]` is the code, counted inside one word, that lies in field `i`; empty means
        natural. Needs `bits` that divide 32.
    out
        Where to write; may be strided, must not overlap `words`.

    Returns
    -------
    Tensor
        uint8 `[rows, n]`, or `[n, rows]` if `codes_transposed`; `out` if given.

    Raises
    ------
    ValueError
        If a dtype, shape, device, `bits` or `order` is not as said above.
    """
    order = checked(words, torch.int32, bits, order)
    packed = words.t() if transposed else words
    rows, w = packed.shape
    if n < 0 or w != _words(n, bits):
        raise ValueError(f"rows of {w} words, expected {_words(n, bits)} for {n} {bits}-bit codes")
    out = output(out, torch.uint8, (n, rows) if codes_transposed else (rows, n))
    planes = codes_transposed and bits in (2, 4, 8)
    make = _PlaneUnpacker if planes else _RowUnpacker
    _convert(make, packed, out.t() if codes_transposed else out, bits, order, planes)
    return out


def pack(
    codes: Tensor,
    bits: int,
    *,
    transposed: bool,
    codes_transposed: bool = False,
    order: Sequence[int] = (),
    out: Tensor | None = None,
) -> Tensor:
    """Put codes into packed rows: the inverse of `unpack`.

    Parameters
    ----------
    codes
        uint8 `[rows, n]`, or `[n, rows]` if `codes_transposed`; all below `2**bits`. May be
        strided; is not modified.
    bits, transposed, codes_transposed, order
        As for `unpack`.
    out
        Where to write; may be strided, must not overlap `codes`.

    Returns
    -------
    Tensor
        int32 `[rows, w]`, or `[w, rows]` if `transposed`; `w = ceil(n * bits / 32)`. Bits past the
        last code are zero. `out` if given.

    Raises
    ------
    ValueError
        If a dtype, shape, device, `bits` or `order` is not as said above, or a code does not fit
        in `bits` (it would spill into its neighbour); `out` is then partly written.
    """
    order = checked(codes, torch.uint8, bits, order)
    plain = codes.t() if codes_transposed else codes
    rows, n = plain.shape
    w = _words(n, bits)
    out = output(out, torch.int32, (w, rows) if transposed else (rows, w))
    planes = codes_transposed and bits in (2, 4, 8)
    make = _PlanePacker if planes else _RowPacker
    _convert(make, out.t() if transposed else out, plain, bits, order, planes)
    return out


def _words(n: int, bits: int) -> int:
    """Return how many words hold `n` codes."""
    return -(-n * bits // WORD_BITS)


def checked(tensor: Tensor, dtype: torch.dtype, bits: int, order: Sequence[int]) -> tuple[int, ...]:
    """Refuse what the kernels cannot take; return `order`, empty if it is the natural one."""
    if tensor.dtype != dtype or tensor.ndim != 2 or tensor.device.type != "cpu":
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"found {found}, expected a matrix of {dtype} on the CPU")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits = {bits}, expected 1 to 8")
    if order and (WORD_BITS % bits or sorted(order) != list(range(WORD_BITS // bits))):
        raise ValueError(f"order {tuple(order)} does not permute the {bits}-bit codes of a word")
    return () if list(order) == sorted(order) else tuple(order)


def output(out: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """Return a fresh tensor, or `out` if it is of this dtype and shape."""
    if out is None:
        return torch.empty(shape, dtype=dtype)
    if out.dtype != dtype or out.shape != shape or out.device.type != "cpu":
        found = f"{out.dtype} {list(out.shape)} on {out.device}"
        raise ValueError(f"out is {found}, expected {dtype} {list(shape)} on the CPU")
    return out


def _convert(
    make: Callable[[int, int, int, tuple[int, ...]], Kernel],
    packed: Tensor,
    codes: Tensor,
    bits: int,
    order: tuple[int, ...],
    planes: bool,
) -> None:
    """Run a kernel over all blocks of `packed` `[rows, w]` and `codes` `[rows, n]`.

    The axis along which codes lie next to each other in memory, rows if `planes`, gets `_RUN`.
    """
    rows, n = codes.shape
    units = -(-n // _UNIT)
    block = max(_LEAST, min(_BLOCK, codes.numel() // torch.get_num_threads())) // _UNIT
    if planes:
        high = max(1, min(rows, _RUN))
        wide = max(1, block // high)
    else:
        wide = max(1, min(units, _RUN // _UNIT))
        high = max(1, block // wide)
    cuts: list[Cut] = []
    for u in range(0, units, wide):
        for r in range(0, rows, high):
            some = slice(r, r + high)
            in_words = slice(u * bits, (u + wide) * bits)
            in_codes = slice(u * _UNIT, (u + wide) * _UNIT)
            cuts.append(((some, in_words), (some, in_codes)))
    share(lambda _, part: make(part.shape[0], part.shape[1], bits, order), packed, codes, cuts)


def scalar(value: int, dtype: torch.dtype) -> Tensor:
    """Return a 0-d tensor: as a shift or mask it is 1.4 times faster than a Python integer."""
    return torch.tensor(value, dtype=dtype)


def _pairs(codes: Tensor) -> Tensor | None:
    """View codes `[rows, n]` as int16 `[rows, n / 2]`; `None` where strides forbid it."""
    if codes.stride(1) != 1 or any(
        x % 2 for x in (codes.shape[1], codes.stride(0), codes.storage_offset())
    ):
        return None
    return codes.view(torch.int16)


def _fit(codes: Tensor, bits: int) -> None:
    """Refuse codes of more than `bits` bits; costs 2 % of packing."""
    if bits < 8 and (top := int(codes.amax())) >> bits:
        raise ValueError(f"found code {top}, expected {bits}-bit codes")


class _Rows:
    """Scratch of the kernels whose codes run along the packed rows, and the views they work in.

    A lane is the fewest codes that fill whole bytes (2 at 4 bits, 4 at 2, else mostly 8), in an
    integer with one byte a code. A round halves (or doubles) the distance between fields in it:
    `(source, shifted, target)` are the lanes as integers of `2 * h` bytes, `h = 4, 2, 1`.
    """

    def __init__(self, rows: int, n: int, bits: int, order: tuple[int, ...], pad: int) -> None:
        self.n, self.bits, self.order = n, bits, order
        self.lane = 8 // gcd(8, bits)
        self.direct = self.lane > 1 and not order and n % _UNIT == 0
        held = self.lane * bits // 8
        units, w = -(-n // _UNIT), _words(n, bits)
        whole = torch.zeros(rows, units * bits + pad, dtype=torch.int32)[:, : units * bits]
        self.words = whole[:, :w]
        self.raw = whole.view(torch.uint8)
        self.lanes = torch.zeros(rows, units * _UNIT // self.lane, dtype=_INT[self.lane])
        self.codes = self.lanes.view(torch.uint8) if self.lane > 1 else self.raw
        self.ordered = torch.zeros_like(self.codes) if order else self.codes
        self.moves: list[tuple[Tensor, Tensor]] = []
        """(bytes of words, lanes) whose contents correspond."""
        if held == 1 and self.lane > 1:
            self.moves = [(self.raw, self.lanes)]
        elif self.lane > 1:
            loose = self.lanes.view(torch.uint8)
            self.moves = [(self.raw[:, j::held], loose[:, j :: self.lane]) for j in range(held)]
        self.shifted = torch.empty_like(self.lanes)

    def round(self, h: int, source: Tensor, target: Tensor, now: int, then: int) -> _Round:
        """Return what moves pairs of fields from `now` to `then` bits apart in `2 * h` bytes."""
        whole = _INT[2 * h]
        views = source.view(whole), self.shifted.view(whole), target.view(whole)
        return *views, scalar(now, whole), (1 << then) - (1 << now)

    def in_order(self) -> list[tuple[Tensor, Tensor]]:
        """Return (field i of each word, the code it holds) as views of `codes` and `ordered`."""
        per = len(self.order)
        pairs = enumerate(self.order)
        return [(self.codes[:, i::per], self.ordered[:, code::per]) for i, code in pairs]


class _RowUnpacker(_Rows):
    """Words `[rows, w]` -> codes `[rows, n]`."""

    def __init__(self, rows: int, n: int, bits: int, order: tuple[int, ...]) -> None:
        super().__init__(rows, n, bits, order, pad=0)
        self.turned = torch.empty(self.words.shape[1], rows, dtype=torch.int32)
        # Lanes filled byte by byte keep their upper bytes zero, so the rounds leave them alone.
        spread = self.lanes if len(self.moves) == 1 else torch.empty_like(self.lanes)
        if self.lane > 1:
            self.codes = spread.view(torch.uint8)
            self.ordered = self.ordered if order else self.codes
        self.rounds = []
        source = self.lanes
        for h in (h for h in (4, 2, 1) if h < self.lane):
            self.rounds.append(self.round(h, source, spread, h * bits, 8 * h))
            source = spread

    def __call__(self, words: Tensor, codes: Tensor) -> None:
        """Fill the block `codes` from the block `words`."""
        if words.stride(0) == 1:
            # Runs first, then the transpose inside the cache: 1.7 times faster than one copy that
            # reads columns at a stride whose lines share cache sets (out_features = 14336).
            self.turned.copy_(words.t())
            self.words.copy_(self.turned.t())
        else:
            self.words.copy_(words)
        for packed, loose in self.moves:
            loose.copy_(packed)
        target = _pairs(codes) if self.direct else None
        for i, (source, shifted, spread, shift, factor) in enumerate(self.rounds):
            final = target is not None and i == len(self.rounds) - 1
            torch.bitwise_right_shift(source, shift, out=shifted)
            torch.add(source, shifted, alpha=factor, out=target if final else spread)
        if self.order:
            for field, plain in self.in_order():
                plain.copy_(field)
        if target is None:
            codes.copy_(self.ordered[:, : self.n])


class _RowPacker(_Rows):
    """Codes `[rows, n]` -> words `[rows, w]`."""

    def __init__(self, rows: int, n: int, bits: int, order: tuple[int, ...]) -> None:
        super().__init__(rows, n, bits, order, pad=_PAD)
        distances = [h for h in (1, 2, 4) if h < self.lane]
        self.rounds = [self.round(h, self.lanes, self.lanes, 8 * h, h * bits) for h in distances]

    def __call__(self, words: Tensor, codes: Tensor) -> None:
        """Fill the block `words` from the block `codes`."""
        _fit(codes, self.bits)
        given = _pairs(codes) if self.direct else None
        if given is None:
            self.ordered[:, : self.n].copy_(codes)
            self.ordered[:, self.n :].zero_()
        if self.order:
            for field, plain in self.in_order():
                field.copy_(plain)
        for source, shifted, target, shift, factor in self.rounds:
            source, given = (source, None) if given is None else (given, None)
            torch.bitwise_right_shift(source, shift, out=shifted)
            torch.add(source, shifted, alpha=factor, out=target)
        for packed, loose in self.moves:
            packed.copy_(loose)
        words.copy_(self.words)


class _Planes:
    """Scratch of the kernels for 2, 4 and 8 bits whose codes run across the packed rows."""

    def __init__(self, rows: int, n: int, bits: int, order: tuple[int, ...]) -> None:
        self.n, self.bits = n, bits
        self.per = WORD_BITS // bits
        self.fields = 8 // bits
        self.order = order or tuple(range(self.per))
        w = _words(n, bits)
        self.words = torch.empty(w, rows, dtype=torch.int32)
        self.byte = torch.empty(w, rows, dtype=torch.uint8)
        ragged = n % self.per != 0
        self.spare = torch.zeros(w * self.per, rows, dtype=torch.uint8) if ragged else None

    def of(self, codes: Tensor) -> list[list[Tensor]]:
        """Return, byte by byte of a word, the planes `[w, rows]` of codes of its fields."""
        inside = [codes[code :: self.per] for code in self.order]
        return [inside[i : i + self.fields] for i in range(0, self.per, self.fields)]


class _PlaneUnpacker(_Planes):
    """Words `[rows, w]` -> codes `[rows, n]` whose rows are columns in memory."""

    def __init__(self, rows: int, n: int, bits: int, order: tuple[int, ...]) -> None:
        super().__init__(rows, n, bits, order)
        self.turned = torch.empty(rows, self.words.shape[0], dtype=torch.int32)
        self.mask, self.shift = scalar((1 << bits) - 1, torch.uint8), scalar(bits, torch.uint8)
        self.eight = scalar(8, torch.int32)

    def __call__(self, words: Tensor, codes: Tensor) -> None:
        """Fill the block `codes` from the block `words`."""
        if words.stride(1) == 1:
            self.turned.copy_(words)  # as in _RowUnpacker
            self.words.copy_(self.turned.t())
        else:
            self.words.copy_(words.t())
        target = codes.t() if self.spare is None else self.spare
        for j, planes in enumerate(self.of(target)):
            if j:
                torch.bitwise_right_shift(self.words, self.eight, out=self.words)
            if self.bits == 8:
                planes[0].copy_(self.words)
                continue
            self.byte.copy_(self.words)
            for i, plane in enumerate(planes[:-1], 2):
                torch.bitwise_and(self.byte, self.mask, out=plane)
                rest = planes[-1] if i == self.fields else self.byte
                torch.bitwise_right_shift(self.byte, self.shift, out=rest)
        if self.spare is not None:
            codes.t().copy_(self.spare[: self.n])


class _PlanePacker(_Planes):
    """Codes `[rows, n]` whose rows are columns in memory -> words `[rows, w]`."""

    def __init__(self, rows: int, n: int, bits: int, order: tuple[int, ...]) -> None:
        super().__init__(rows, n, bits, order)
        self.wide = torch.empty_like(self.byte, dtype=torch.int32)

    def __call__(self, words: Tensor, codes: Tensor) -> None:
        """Fill the block `words` from the block `codes`."""
        _fit(codes, self.bits)
        source = codes.t()
        if self.spare is not None:
            self.spare[: self.n].copy_(source)
            source = self.spare
        for j, (byte, *rest) in enumerate(self.of(source)):
            for i, plane in enumerate(rest, 1):
                byte = torch.add(byte, plane, alpha=1 << i * self.bits, out=self.byte)
            if j == 0:
                self.words.copy_(byte)
                continue
            # The top byte is signed, so that no sum leaves the range of int32.
            self.wide.copy_(byte if j < 3 else byte.view(torch.int8))
            self.words.add_(self.wide, alpha=1 << 8 * j)
        words.copy_(self.words.t())
