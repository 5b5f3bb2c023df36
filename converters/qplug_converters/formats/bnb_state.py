"""The JSON that bitsandbytes keeps beside a 4-bit weight, from a file that nobody vouches for.

Keys in the tool's order: `quant_type`, `blocksize`, `dtype`, `shape`; with double quantization
`nested_blocksize`, `nested_dtype`, `nested_offset` (bitsandbytes 0.50.2, QuantState.as_dict).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..block import INCOMPLETE, Keys
from ..errors import QplugError, raise_all
from ..format import Headers, Peek
from ..scheme import Scheme
from .bnb import MARK

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""Dtypes of an original weight, and of dequantized absmax."""

_MOST = 4096
"""Bytes of the JSON; the tool writes fewer than 200."""
_NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")
_LONGEST = 1 << 31
_LARGEST = float(np.finfo(np.float32).max)


def spelled(scheme: Scheme) -> bytes:
    """Return the JSON of a linear, spelled as bitsandbytes does (`json.dumps`, this order)."""
    book = scheme.codebook
    assert book is not None
    said: dict[str, object] = {
        "quant_type": book.name,
        "blocksize": scheme.group_size,
        "dtype": book.dtype,
        "shape": [scheme.out_features, scheme.in_features],
    }
    if book.nesting is not None:
        said |= {
            "nested_blocksize": book.nesting.blocksize,
            "nested_dtype": book.nesting.dtype,
            "nested_offset": book.nesting.offset,
        }
    return json.dumps(said).encode()


class QuantState:
    """The JSON of one linear, from an untrusted file: every key, type and range is checked."""

    def __init__(self, name: str, headers: Headers, peek: Peek) -> None:
        spec = headers[name]
        if spec.dtype != "U8" or len(spec.shape) != 1 or not 0 < spec.shape[0] <= _MOST:
            raise QplugError(str(spec), name, f"U8[1 to {_MOST}]", INCOMPLETE)
        self.raw = peek(name).tobytes()
        self.keys = Keys(_object(name, self.raw), name)
        self.quant_type: str = self._one_of("quant_type", QUANT_TYPES)
        if not self.keys.problems and self.quant_type != name.partition(MARK)[2]:
            self._wrong("quant_type", f"{self.quant_type!r}", "that of the tensor's name")
        self.blocksize: int = self._one_of("blocksize", BLOCKSIZES)
        self.dtype: str = self._one_of("dtype", tuple(DTYPES.values()))
        self.shape = self._shape()
        self.nested = any(key in self.keys.block for key in _NESTED)
        if self.nested:
            self.nested_blocksize: int = self._one_of("nested_blocksize", BLOCKSIZES)
            self.nested_dtype: str = self._one_of("nested_dtype", tuple(DTYPES.values()))
            self.nested_offset = self._offset()
        known = ("quant_type", "blocksize", "dtype", "shape", *_NESTED)
        for key in self.keys.block:
            if key not in known:
                self._wrong(key, "an unknown key, which may change the weights", ", ".join(known))
        raise_all(self.keys.problems)

    def _wrong(self, key: str, found: str, expected: str, fix: str = INCOMPLETE) -> None:
        self.keys.problem(key, found, expected, fix)

    def _one_of(self, key: str, allowed: tuple[Any, ...]) -> Any:
        value = self.keys.block.get(key)
        if type(value) is type(allowed[0]) and value in allowed:
            return value
        found = _short(value) if key in self.keys.block else "no such key"
        self._wrong(key, found, f"one of {', '.join(map(str, allowed))}")
        return allowed[0]

    def _shape(self) -> tuple[int, int]:
        shape, fix = self.keys.block.get("shape"), INCOMPLETE
        if shape is None:
            fix = "nothing else tells out_features: load it in bitsandbytes and save it again"
        elif isinstance(shape, list) and len(shape) == 3:
            fix = "fused experts: save the model with one linear per expert"
        elif isinstance(shape, list) and len(shape) == 2:
            out, inp = shape
            if type(out) is int and type(inp) is int and 0 < out < _LONGEST and 0 < inp < _LONGEST:
                return out, inp
        self._wrong("shape", _short(shape), "[out_features, in_features]", fix)
        return 1, 1

    def _offset(self) -> float:
        value = self.keys.block.get("nested_offset")
        if isinstance(value, int | float) and type(value) is not bool and abs(value) <= _LARGEST:
            return float(value)
        self._wrong("nested_offset", _short(value), "a finite float32")
        return 0.0


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _object(name: str, raw: bytes) -> dict[str, Any]:
    """Parse the JSON; an object, and no key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands in it twice")
        return found

    try:
        found = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise QplugError(f"no JSON ({error})", name, "a JSON object", INCOMPLETE) from None
    if not isinstance(found, dict):
        raise QplugError(f"a JSON {type(found).__name__}", name, "a JSON object", INCOMPLETE)
    return found
