"""What PTX instructions do, bit by bit: runs the kernels' inline assembly without a GPU.

`run(text, inputs)` executes the text on whole arrays of words. Every instruction is written out of
its definition in the PTX ISA manual; one that is not here raises, as does a register that is read
before it was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

Words = np.ndarray
"""uint32, any shape."""


def run(text: str, inputs: Sequence[Words], outputs: int) -> list[Words]:
    """Return `$0` ... of a text whose inputs are the operands after its outputs."""
    registers = {f"${outputs + at}": words.astype(np.uint32) for at, words in enumerate(inputs)}
    declared = set(re.findall(r"\w+", " ".join(re.findall(r"\.reg\s+\.b32\s+([^;]*);", text))))
    shape = inputs[0].shape

    def read(operand: str) -> Words:
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", operand):
            return np.full(shape, int(operand, 0), dtype=np.uint32)
        return registers[operand]

    for line in re.sub(r"\.reg[^;]*;", "", text).strip().strip("{}").split(";"):
        if not line.strip():
            continue
        name, *operands = re.split(r"[\s,]+", line.strip())
        target, *sources = operands
        if target.startswith("$"):
            if int(target[1:]) >= outputs:
                raise ValueError(f"{line.strip()}: writes an input")
        elif target not in declared:
            raise ValueError(f"{line.strip()}: `{target}` is not declared")
        registers[target] = INSTRUCTIONS[name](*map(read, sources))
    return [registers[f"${at}"] for at in range(outputs)]


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """Bytes of b:a picked by nibbles; a nibble's top bit asks for the byte's sign, repeated."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for at in range(4):
        nibble = (selector >> np.uint32(4 * at)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        picked = np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32)
        result |= picked << np.uint32(8 * at)
    return result


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit (a, b, c) of a table of eight."""
    code = int(table.flat[0])
    result = np.zeros_like(a)
    for index in range(8):
        if code >> index & 1:
            term = a if index & 4 else ~a
            term = term & (b if index & 2 else ~b)
            result |= term & (c if index & 1 else ~c)
    return result


def shift(left: bool) -> Callable[[Words, Words], Words]:
    """Shifts of 32 and more give 0."""

    def shifted(a: Words, by: Words) -> Words:
        wide, count = a.astype(np.uint64), np.minimum(by, 32).astype(np.uint64)
        return ((wide << count) if left else (wide >> count)).astype(np.uint32)

    return shifted


def halves(dtype: torch.dtype, operation: Callable[..., np.ndarray]) -> Callable[..., Words]:
    """Apply an operation to both 16-bit floats of a word: exact in float64, rounded once."""

    def values(words: Words) -> np.ndarray:
        bits = torch.from_numpy(np.ascontiguousarray(words).view(np.int16).copy())
        return bits.view(dtype).double().numpy()

    def applied(*words: Words) -> Words:
        result = torch.from_numpy(operation(*map(values, words))).to(dtype)
        return result.view(torch.int16).numpy().view(np.uint32).reshape(words[0].shape)

    return applied


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "not.b32": lambda a: ~a,
    "shr.u32": shift(left=False),
    "shr.b32": shift(left=False),
    "shl.b32": shift(left=True),
    "lop3.b32": lop3,
    "prmt.b32": prmt,
}
for _name, _dtype in (("f16x2", torch.float16), ("bf16x2", torch.bfloat16)):
    for _rounding in ("", ".rn"):
        INSTRUCTIONS |= {
            f"add{_rounding}.{_name}": halves(_dtype, lambda a, b: a + b),
            f"sub{_rounding}.{_name}": halves(_dtype, lambda a, b: a - b),
            f"mul{_rounding}.{_name}": halves(_dtype, lambda a, b: a * b),
            f"fma{_rounding}.{_name}": halves(_dtype, lambda a, b, c: a * b + c),
        }
