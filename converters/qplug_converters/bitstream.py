"""The one primitive, in NumPy and bit by bit: rows of codes in a little-endian bit stream.

This is the definition. Plans use it on the few small tensors that decide (zeros), and the fast
torch routes of `codec` and `words` are tested against it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .layout import Packing

Words = NDArray[np.unsignedinteger]
Codes = NDArray[np.uint8]

_UNSIGNED = {"U8": np.uint8, "I16": np.uint16, "I32": np.uint32}


def as_unsigned(words: NDArray[np.generic], packing: Packing) -> Words:
    """View stored words (signed on disk) as unsigned ones of the same width."""
    return np.ascontiguousarray(words).view(_UNSIGNED[packing.word])


def unpack(words: NDArray[np.generic], packing: Packing, codes: int) -> Codes:
    """Read `[rows, words]` as rows of a bit stream: uint8 `[rows, codes]`.

    Code i of a row lies at bits [i * bits, (i + 1) * bits), lowest bit first; with an `order`,
    field i of a word holds code `order[i]` of that word.
    """
    rows, bits = words.shape[0], packing.bits
    octets = as_unsigned(words, packing).view(np.uint8)
    if 8 % bits == 0:  # no code crosses a byte: 20 times faster than bit by bit
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        mask = np.uint8((1 << bits) - 1)
        found = ((octets[:, :, None] >> shifts) & mask).reshape(rows, -1)
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
    bits, words = packing.bits, packing.words(count)
    if packing.order:
        step = len(packing.order)
        padded = np.zeros((rows, words * step), np.uint8)
        padded[:, :count] = codes
        codes = padded.reshape(rows, -1, step)[:, :, list(packing.order)].reshape(rows, -1)
    if 8 % bits == 0:
        step = 8 // bits
        octets = np.zeros((rows, words * packing.word_bits // 8, step), np.uint8)
        octets.reshape(rows, -1)[:, : codes.shape[1]] = codes
        whole = octets[:, :, 0]
        for at in range(1, step):
            whole = whole | octets[:, :, at] << np.uint8(at * bits)
        return np.ascontiguousarray(whole).view(_UNSIGNED[packing.word])
    wide = np.unpackbits(codes.astype(np.uint8)[:, :, None], axis=2, bitorder="little")
    stream = np.zeros((rows, words * packing.word_bits), np.uint8)
    stream[:, : codes.shape[1] * bits] = wide[:, :, :bits].reshape(rows, -1)
    return np.packbits(stream, axis=1, bitorder="little").view(_UNSIGNED[packing.word])
