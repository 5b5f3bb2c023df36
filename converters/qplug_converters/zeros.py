"""How stored zeros relate to the value subtracted: several rules are in circulation for GPTQ v1.

`checkpoint_format: gptq` stores z - 1. The rules `plain`, `field` and `word` differ only where a
stored field is 2^bits - 1; `legacy3` and `word:B` belong to old releases of one tool. Sources:
AutoGPTQ 0.7.1 (`plain`), GPTQModel 7.7.0 (`word`, and `field` for bits that do not divide 32),
GPTQModel <= 6.0.3 (`legacy3`), GPTQModel < 7.3.2 under `dynamic` (`word:B`, B the base bits).
All functions work on NumPy rows of words, without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import bitstream
from .errors import QplugError
from .layout import Packing

Zeros = NDArray[np.int16]


def _word_ones(bits: int) -> np.uint32:
    """Return a 1 in every field of a word, for bits that divide 32."""
    return np.uint32(sum(1 << at for at in range(0, 32, bits)))


def _legacy3(words: int) -> NDArray[np.uint32]:
    """Return the constants GPTQModel <= 6.0.3 added to 3-bit words, per three words."""
    return np.resize(np.array([0x24924924, 0x92492492, 0x49249249], np.uint32), words)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: an addition to whole words, then an addition to fields.

    `ones(bits, words)` is added to the words modulo 2^32 when reading and subtracted when
    writing; `shift` is added to the fields, wrapping within the field if `wraps`.
    """

    summary: str
    shift: int = 0
    wraps: bool = False
    ones: Callable[[int, int], NDArray[np.uint32] | np.uint32] | None = None

    def span(self, bits: int) -> tuple[int, int]:
        """Return the lowest and highest zero the rule can store."""
        top = (1 << bits) - 1
        return (0, top) if self.wraps or self.ones is not None else (self.shift, top + self.shift)


RULES: dict[str, Rule] = {
    "as_is": Rule("the stored field is the zero (v2)"),
    "plain": Rule("field + 1, up to 2^bits (AutoGPTQ)", shift=1),
    "field": Rule("(field + 1) mod 2^bits (GPTQModel, 3 bits)", shift=1, wraps=True),
    "word": Rule(
        "whole word + 0x11…1, carries cross fields (GPTQModel)", ones=lambda b, n: _word_ones(b)
    ),
    "word:2": Rule("word with the 2-bit constant", ones=lambda b, n: _word_ones(2)),
    "word:4": Rule("word with the 4-bit constant", ones=lambda b, n: _word_ones(4)),
    "word:8": Rule("word with the 8-bit constant", ones=lambda b, n: _word_ones(8)),
    "legacy3": Rule("three-word constants (GPTQModel <= 6.0.3)", ones=lambda b, n: _legacy3(n)),
}
"""Every rule by the name that `--zero-rule` takes."""


def applies(rule: str, bits: int) -> str | None:
    """Return why `rule` cannot be used at `bits`, or `None`."""
    if rule not in RULES:
        return f"no zero rule `{rule}`; there are {', '.join(RULES)}"
    if rule == "legacy3" and bits != 3:
        return f"rule `legacy3` is for 3 bits, not {bits}"
    if rule.startswith("word") and 32 % bits:
        return f"rule `{rule}` is for 2, 4 and 8 bits, not {bits}"
    return None


def decode(words: NDArray[np.generic], packing: Packing, count: int, rule: str) -> Zeros:
    """Read stored words `[rows, words]` as zeros, int16 `[rows, count]`.

    Raises
    ------
    QplugError
        If the rule is not defined for these bits.
    """
    if reason := applies(rule, packing.bits):
        raise QplugError(reason, fix="leave out --zero-rule, or pick another one")
    known, raw = RULES[rule], bitstream.as_unsigned(words, packing)
    if known.ones is not None:
        raw = raw + known.ones(packing.bits, raw.shape[1])
    zeros = bitstream.unpack(raw, packing, count).astype(np.int16) + np.int16(known.shift)
    return zeros & np.int16((1 << packing.bits) - 1) if known.wraps else zeros


def encode(zeros: NDArray[np.integer], packing: Packing, rule: str) -> bitstream.Words:
    """Write zeros `[rows, count]` as stored words, the inverse of `decode`.

    Raises
    ------
    QplugError
        If a zero lies outside what the rule can store.
    """
    if reason := applies(rule, packing.bits):
        raise QplugError(reason)
    known = RULES[rule]
    low, high = known.span(packing.bits)
    if zeros.size and (zeros.min() < low or zeros.max() > high):
        raise QplugError(
            f"zeros from {zeros.min()} to {zeros.max()}", "zeros", f"{low} to {high} (rule {rule})"
        )
    fields = (zeros.astype(np.int16) - np.int16(known.shift)) & np.int16((1 << packing.bits) - 1)
    words = bitstream.pack(fields, packing)
    return words if known.ones is None else words - known.ones(packing.bits, words.shape[1])
