"""Every text of PTX against the integers it means, on random words."""

from __future__ import annotations

import numpy as np
import ptx
import pytest
import torch

from qplug_kernels.gpu import asm

COUNT = 4000
TEXTS = [
    (bits, bf16, symmetric, count)
    for bits in asm.PLANES
    for bf16 in (False, True)
    for symmetric in (False, True)
    for count in (1, 2, 4, 8, 16)
    if count <= asm.PLANES[bits]
]


def codes_of(words, bits, plane):
    """The code of a plane in three words of 16 bits, by definition."""
    if bits != 3:
        return words[0] >> (bits * plane) & ((1 << bits) - 1)
    if plane < 15:
        return words[plane // 5] >> (3 * (plane % 5)) & 7
    return sum((words[n] >> 15) << n for n in range(3))


def pairs(values, bf16):
    """Halves of a word, the lower first, as 16-bit floats."""
    dtype = torch.bfloat16 if bf16 else torch.float16
    bits = torch.from_numpy(values).to(dtype).view(torch.int16)
    assert torch.equal(bits.view(dtype).double(), torch.from_numpy(values).double()), "not exact"
    return bits.numpy().view(np.uint32)[:, 0]


@pytest.mark.parametrize(("bits", "bf16", "symmetric", "count"), TEXTS)
def test_texts_are_exact(bits, bf16, symmetric, count):
    random = np.random.default_rng(bits)
    halves = random.integers(0, 1 << 16, (3, COUNT, 2), dtype=np.uint16)
    zeros = random.integers(0, (1 << bits) + 1, COUNT).repeat(2).reshape(COUNT, 2)
    zeros[:2] = 0, 1 << bits
    magic = 0 if bf16 and bits == 8 else asm.MAGIC[bf16]
    inputs = [*(word.view(np.uint32)[:, 0] for word in halves), pairs(zeros + magic, bf16)]
    if symmetric:
        zeros = np.full_like(zeros, 1 << (bits - 1))
        inputs[3] = random.integers(0, 1 << 32, COUNT, dtype=np.uint32)
    for first in range(0, asm.PLANES[bits], count):
        text = asm.text(bits, bf16, symmetric, first, count)
        assert "sub.bf16x2" not in text, "needs sm_90"
        assert "add.bf16x2" not in text, "needs sm_90"
        found = ptx.run(text, inputs, count)
        for n in range(count):
            codes = codes_of(halves.astype(np.int64), bits, first + n)
            assert np.array_equal(found[n], pairs(codes - zeros, bf16)), (first, n)


def test_constraints_name_every_operand():
    assert asm.constraints(2) == "=&r,=&r,r,r,r,r"
