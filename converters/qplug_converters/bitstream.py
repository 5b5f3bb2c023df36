"""The one primitive, in NumPy and bit by bit: rows of codes in a little-endian bit stream.

This is the definition. Plans use it on the few small tensors that decide (zeros), and the fast
torch routes of `codec` and `words` are tested against it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .layout import Packing

Words = NDArray[np.unsignedinteger]
Codes = NDArray[np.uint8]

_UNSIGNED: dict[int, type[np.unsignedinteger]] = {
    8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64
}  # fmt: skip


def as_unsigned(words: NDArray[np.generic], packing: Packing) -> Words:
    """View stored words (signed on disk) as unsigned ones of the same width."""
    return np.ascontiguousarray(words).view(_UNSIGNED[packing.word_bits])


def unpack(words: NDArray[np.generic], packing: Packing, codes: int) -> Codes:
    """Read `[rows, words]` as rows of a bit stream: uint8 `[rows, codes]`.

    Code i of a row lies at bits [i * bits, (i + 1) * bits), lowest bit first; with an `order`,
    field i of a run of `len(order)` holds code `order[i]` of that run. `per_word` and `planes` are
    as `Packing` says.
    """
    if packing.planes:
        return _unpack_planes(words, packing, codes)
    if packing.spread:
        return _unpack_spread(words, packing, codes)
    if packing.per_word:
        each = as_unsigned(words, packing).reshape(-1, 1)
        loose = unpack(each, replace(packing, per_word=0), packing.per_word)
        return np.ascontiguousarray(loose.reshape(words.shape[0], -1)[:, :codes])
    rows, bits = words.shape[0], packing.bits
    octets = as_unsigned(words, packing).view(np.uint8)
    if 8 % bits == 0:  # no code crosses a byte: 20 times faster than bit by bit
        mask, times = np.uint8((1 << bits) - 1), 8 // bits
        # Field by field: long runs are 10 times faster than one operation over short ones.
        fields_of = np.empty((rows, octets.shape[1], times), np.uint8)
        for n in range(times):
            np.right_shift(octets, np.uint8(n * bits), out=fields_of[:, :, n])
            if n < times - 1:
                np.bitwise_and(fields_of[:, :, n], mask, out=fields_of[:, :, n])
        found = fields_of.reshape(rows, -1)
    else:
        stream = np.unpackbits(octets, axis=1, bitorder="little")
        fields = stream.shape[1] // bits
        places = (1 << np.arange(bits)).astype(np.uint8)
        wide = stream[:, : fields * bits].reshape(rows, fields, bits)
        found = (wide * places).sum(2, dtype=np.uint8)
    if packing.order:
        step = len(packing.order)
        natural = np.empty_like(found.reshape(rows, -1, step))
        natural[:, :, list(packing.order)] = found.reshape(rows, -1, step)
        found = natural.reshape(rows, -1)
    return np.ascontiguousarray(found[:, :codes])


def pack(codes: NDArray[np.integer], packing: Packing) -> Words:
    """Write rows of codes as rows of words, the inverse of `unpack`; tail bits are zero."""
    rows, count = codes.shape
    if packing.planes:
        return _pack_planes(codes, packing)
    if packing.spread:
        return _pack_spread(codes, packing)
    if packing.per_word:
        loose = np.zeros((rows, packing.words(count) * packing.per_word), np.uint8)
        loose[:, :count] = codes
        each = pack(loose.reshape(-1, packing.per_word), replace(packing, per_word=0))
        return each.reshape(rows, -1)
    bits, words = packing.bits, packing.words(count)
    if packing.order:
        step = len(packing.order)
        padded = np.zeros((rows, words * packing.word_bits // bits), np.uint8)
        padded[:, :count] = codes
        codes = padded.reshape(rows, -1, step)[:, :, list(packing.order)].reshape(rows, -1)
    if 8 % bits == 0:
        step = 8 // bits
        octets = np.zeros((rows, words * packing.word_bits // 8, step), np.uint8)
        octets.reshape(rows, -1)[:, : codes.shape[1]] = codes
        whole = octets[:, :, 0]
        for at in range(1, step):
            whole = whole | octets[:, :, at] << np.uint8(at * bits)
        return np.ascontiguousarray(whole).view(_UNSIGNED[packing.word_bits])
    wide = np.unpackbits(codes.astype(np.uint8)[:, :, None], axis=2, bitorder="little")
    stream = np.zeros((rows, words * packing.word_bits), np.uint8)
    stream[:, : codes.shape[1] * bits] = wide[:, :, :bits].reshape(rows, -1)
    return np.packbits(stream, axis=1, bitorder="little").view(_UNSIGNED[packing.word_bits])


def _planes(packing: Packing) -> list[tuple[int, Packing]]:
    """Return the lowest bit of each plane, and the packing of its 32 fields."""
    lows = [sum(packing.planes[:n]) for n in range(len(packing.planes))]
    return [
        (low, replace(packing, bits=width, planes=()))
        for low, width in zip(lows, packing.planes, strict=True)
    ]


def _unpack_planes(words: NDArray[np.generic], packing: Packing, codes: int) -> Codes:
    """Read rows of 32 codes, each stored plane by plane."""
    rows = words.shape[0]
    raw = as_unsigned(words, packing).reshape(-1, packing.words(32))
    found = np.zeros((len(raw), 32), np.uint8)
    at = 0
    for low, plane in _planes(packing):
        count = plane.words(32)
        found |= unpack(raw[:, at : at + count], plane, 32) << np.uint8(low)
        at += count
    return np.ascontiguousarray(found.reshape(rows, -1)[:, :codes])


def _pack_planes(codes: NDArray[np.integer], packing: Packing) -> Words:
    """Write rows of 32 codes plane by plane."""
    rows, count = codes.shape
    padded = np.zeros((rows, -(-count // 32) * 32), np.uint8)
    padded[:, :count] = codes
    units = padded.reshape(-1, 32)
    parts = [
        pack((units >> np.uint8(low)) & np.uint8((1 << plane.bits) - 1), plane)
        for low, plane in _planes(packing)
    ]
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _whole(packing: Packing) -> Packing:
    """Return how words hold the codes that do not cross one, where top bits are spread."""
    return replace(packing, spread=False, per_word=packing.word_bits // packing.bits)


def _unpack_spread(words: NDArray[np.generic], packing: Packing, codes: int) -> Codes:
    """Read rows of words whose top bits hold one code more for every `bits` words."""
    raw = as_unsigned(words, packing).reshape(-1, packing.bits)
    found = np.empty((len(raw), packing.whole), np.uint8)
    found[:, :-1] = unpack(raw, _whole(packing), packing.whole - 1)
    tops = (raw >> np.uint64(packing.word_bits - 1)).astype(np.uint8)
    found[:, -1] = (tops << np.arange(packing.bits, dtype=np.uint8)).sum(1)
    return np.ascontiguousarray(found.reshape(words.shape[0], -1)[:, :codes])


def _pack_spread(codes: NDArray[np.integer], packing: Packing) -> Words:
    """Write rows of codes, each last of a run in the top bits of its words."""
    rows, count = codes.shape
    padded = np.zeros((rows, -(-count // packing.whole) * packing.whole), np.uint8)
    padded[:, :count] = codes
    runs = padded.reshape(-1, packing.whole)
    words = pack(runs[:, :-1], _whole(packing))
    tops = (runs[:, -1:] >> np.arange(packing.bits, dtype=np.uint8)) & np.uint8(1)
    words |= tops.astype(words.dtype) << words.dtype.type(packing.word_bits - 1)
    return words.reshape(rows, -1)
