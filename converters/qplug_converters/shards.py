"""The safetensors files of a checkpoint: headers checked, tensors as views of memory maps.

A file is untrusted: its header is checked against the file before anything is read from it.
Nothing here imports torch until a tensor is asked for.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import QplugError, Unsupported
from .layout import ITEMSIZE, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

REPAIR = "download the file again, or correct it"
MAX_HEADER = 100_000_000
"""Bytes: the limit of the safetensors library itself."""

_NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16,
    "BF16": np.uint16, "F32": np.float32, "F64": np.float64, "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
}  # fmt: skip
"""NumPy has no bfloat16 or float8: those come as unsigned integers of the same width."""

_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Copy-on-write, for torch wants writable memory and nothing is ever written; without a reserve,
or Linux refuses a file larger than the memory (Python names the flag since 3.13)."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of a tensor lie."""

    file: Path
    offset: int
    spec: TensorSpec


def _unique(where: str) -> Any:
    """Return a JSON hook that refuses an object with two entries of one name."""

    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise QplugError(f"two entries named {twice!r}", where, "one", REPAIR)
        return found

    return hook


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, other values and undecodable text are errors."""
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_unique(path.name))
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise QplugError(f"no JSON ({error})", path.name, "a JSON object", REPAIR) from None
    if not isinstance(found, dict):
        kind = "null" if found is None else type(found).__name__
        raise QplugError(f"a JSON {kind}", path.name, "a JSON object", REPAIR)
    return found


def unreadable(path: Path, error: OSError) -> QplugError:
    """Say that the system refuses to read a file."""
    return QplugError(
        f"cannot be read ({error.strerror})", str(path), fix="check the path and its permissions"
    )


def read_header(path: Path) -> dict[str, Location]:
    """Read the header of a safetensors file: where each tensor lies.

    The checks are those of the safetensors library (no hole, no overlap, sizes that match shapes)
    and one it lacks (no name twice), each naming the tensor.

    Raises
    ------
    QplugError
        If the file is truncated or its header lies.
    """
    name = path.name
    damaged = "download the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise QplugError(
                    f"a header of {length} bytes in a file of {size}",
                    name,
                    "a whole safetensors file",
                    damaged,
                )
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        # Decoded here: json itself would guess UTF-16 and UTF-32 too, which no other reader does.
        header = json.loads(raw.decode(), object_pairs_hook=_unique(name))
    except (ValueError, RecursionError) as error:
        raise QplugError(f"no JSON header ({error})", name, "a safetensors file", damaged) from None
    if not isinstance(header, dict):
        raise QplugError("a header that is no object", name, "a safetensors file", damaged)
    header.pop("__metadata__", None)
    start = 8 + length
    found: dict[str, Location] = {}
    spans = []
    for tensor, entry in header.items():
        where = f"{name}: {tensor}"
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end))
            whole = whole and isinstance(dtype, str) and bool(tensor.encode())
        except (KeyError, TypeError, ValueError):  # UnicodeError is a ValueError
            whole = False
        if not whole:
            raise QplugError("a damaged entry", where, "dtype, shape and data_offsets", damaged)
        if dtype not in ITEMSIZE:
            raise Unsupported(
                f"dtype {dtype!r}",
                where,
                f"one of {', '.join(ITEMSIZE)}",
                "save it again in one of these dtypes",
            )
        if end - begin != ITEMSIZE[dtype] * prod(shape):
            raise QplugError(
                f"{end - begin} bytes",
                where,
                f"{ITEMSIZE[dtype] * prod(shape)} for {TensorSpec(dtype, shape)}",
                damaged,
            )
        spans.append((begin, end, where))
        found[tensor] = Location(path, start + begin, TensorSpec(dtype, shape))
    at = 0
    for begin, end, where in sorted(spans):
        if begin != at:
            raise QplugError(f"data from byte {begin}", where, f"from byte {at}", damaged)
        at = end
    if start + at != size:
        raise QplugError(
            f"{size - start} bytes of data",
            name,
            f"{at} (the shard is truncated or padded)",
            damaged,
        )
    return found


class Shards:
    """The tensors of some safetensors files.

    Attributes
    ----------
    files : tuple of Path
        The files.
    locations : dict
        Every tensor by name, in file order.
    headers : dict
        Dtype and shape of every tensor, in file order.
    problems : list of QplugError
        Names that stand in more than one file; for the caller to raise, with what else is wrong.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.locations: dict[str, Location] = {}
        self.problems: list[QplugError] = []
        for file in self.files:
            for name, location in read_header(file).items():
                if name in self.locations:
                    both = f"in {self.locations[name].file.name} and {file.name}"
                    self.problems.append(QplugError(both, name, "one tensor of this name", REPAIR))
                self.locations[name] = location
        self.headers = {name: location.spec for name, location in self.locations.items()}
        self._maps: dict[Path, mmap.mmap] = {}

    def _bytes(self, name: str) -> tuple[mmap.mmap, Location]:
        location = self.locations[name]
        if location.file not in self._maps:
            try:
                with location.file.open("rb") as file:
                    self._maps[location.file] = mmap.mmap(
                        file.fileno(), 0, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE
                    )
            except OSError as error:
                raise unreadable(location.file, error) from None
        return self._maps[location.file], location

    def peek(self, name: str) -> NDArray[np.generic]:
        """Return a tensor as a NumPy view, without torch; bfloat16 comes as uint16."""
        data, location = self._bytes(name)
        dtype = np.dtype(_NUMPY[location.spec.dtype])
        count = prod(location.spec.shape)
        if location.offset % dtype.itemsize:  # legal in the format, not for a typed view
            raw = bytearray(data[location.offset : location.offset + location.spec.nbytes])
            return np.frombuffer(raw, dtype, count).reshape(location.spec.shape)
        return np.frombuffer(data, dtype, count, location.offset).reshape(location.spec.shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of the memory map."""
        import torch

        from .codec import TORCH_DTYPES

        spec = self.locations[name].spec
        if 0 in spec.shape:
            return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        view = torch.from_numpy(self.peek(name).view(np.uint8).reshape(-1))
        return view.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor."""
        data, location = self._bytes(name)
        return memoryview(data)[location.offset : location.offset + location.spec.nbytes]
