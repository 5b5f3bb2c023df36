"""The safetensors files of a checkpoint: headers checked, tensors as views of memory maps.

A file is untrusted: its header is checked against the file before anything is read from it.
Of files that are elsewhere (`source.Source`), headers and the few small tensors that decide are
read by ranges, and so is a tensor that a plan has to look at; a file is fetched whole when bytes
are asked for.
Nothing here imports torch until a tensor is asked for.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import QplugError, Unsupported
from .layout import ITEMSIZE, TensorSpec
from .source import REPAIR, Source, Span, unreadable

if TYPE_CHECKING:
    from torch import Tensor

DAMAGED = "download the file again"
MAX_HEADER = 100_000_000
"""Bytes: the limit of the safetensors library itself."""

MOST_AXES = 64
"""Axes of a tensor: as many as NumPy has; a product of millions of sizes would take hours."""
MOST_NAME = 4096
"""Bytes of the name of a tensor."""
MOST_NESTED = 100
"""Lists and objects in one another in a JSON file; Python writes no more than some hundreds."""

GUESS = 1 << 17
"""Bytes of a file elsewhere that are asked for at first: most headers fit."""
WINDOW = 1 << 24
"""Bytes of small tensors elsewhere that are read ahead."""
WHOLE = 1 << 26
"""Bytes of the largest tensor elsewhere that is read by itself; for a larger one its file comes."""
GAP = 1 << 16
"""Bytes between two tensors that are rather read than asked for around."""

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
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise QplugError(f"two entries named {twice!r}", where, "one", REPAIR)
        return found

    return hook


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, other values and undecodable text are errors."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    return parse_json(raw, path.name)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """Return a JSON object from the bytes of the file `name`; see `read_json`."""
    try:
        found = json.loads(raw, object_pairs_hook=_unique(name))
    except (ValueError, RecursionError) as error:
        raise QplugError(f"no JSON ({error})", name, "a JSON object", REPAIR) from None
    if not isinstance(found, dict):
        kind = "null" if found is None else type(found).__name__
        raise QplugError(f"a JSON {kind}", name, "a JSON object", REPAIR)
    level: list[Any] = [found]
    for _ in range(MOST_NESTED):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    if level:
        found_deep = f"lists and objects nested more than {MOST_NESTED} deep"
        raise QplugError(found_deep, name, "a config", REPAIR)
    return found


def read_header(path: Path) -> dict[str, Location]:
    """Read the header of a local safetensors file: where each tensor lies.

    Raises
    ------
    QplugError
        If the file is truncated or its header lies.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(path.name, size, file.read(8))
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    return parse_header(path, size, raw)


def read_headers(source: Source, names: Sequence[str]) -> list[dict[str, Location]]:
    """Read the headers of safetensors files wherever they lie.

    Of a file elsewhere its first `GUESS` bytes are read, and the rest of the header where that is
    longer: of all files at once, without anything else of them.
    """
    paths = {name: source.path(name) for name in names}
    away = [name for name in names if not source.here(name)]
    sizes = {name: source.size(name) for name in away}
    begun = source.read([Span(name, 0, min(GUESS, sizes[name])) for name in away])
    heads = dict(zip(away, begun, strict=True))
    lengths = {name: _header_length(name, sizes[name], head[:8]) for name, head in heads.items()}
    longer = [name for name in away if 8 + lengths[name] > len(heads[name])]
    rest = source.read([Span(n, len(heads[n]), 8 + lengths[n]) for n in longer])
    for name, more in zip(longer, rest, strict=True):
        heads[name] += more
    return [
        parse_header(paths[name], sizes[name], heads[name][8 : 8 + lengths[name]])
        if name in heads
        else read_header(paths[name])
        for name in names
    ]


def _header_length(name: str, size: int, head: bytes) -> int:
    """Return the length of a header from the first eight bytes of a file of `size` bytes."""
    length = int.from_bytes(head, "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise QplugError(
            f"a header of {length} bytes in a file of {size}",
            name,
            "a whole safetensors file",
            DAMAGED,
        )
    return length


def parse_header(path: Path, size: int, raw: bytes) -> dict[str, Location]:
    """Return where each tensor lies, from the header of a safetensors file of `size` bytes.

    The checks are those of the safetensors library (no hole, no overlap, sizes that match shapes)
    and one it lacks (no name twice), each naming the tensor.

    Raises
    ------
    QplugError
        If the header lies.
    """
    name = path.name
    try:
        # Decoded here: json itself would guess UTF-16 and UTF-32 too, which no other reader does.
        header = json.loads(raw.decode(), object_pairs_hook=_unique(name))
    except (ValueError, RecursionError) as error:
        raise QplugError(f"no JSON header ({error})", name, "a safetensors file", DAMAGED) from None
    if not isinstance(header, dict):
        raise QplugError("a header that is no object", name, "a safetensors file", DAMAGED)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise QplugError("a damaged entry", f"{name}: __metadata__", "texts by name", DAMAGED)
    start = 8 + len(raw)
    found: dict[str, Location] = {}
    spans = []
    for tensor, entry in header.items():
        where = f"{name}: {tensor}"
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end))
            whole = whole and isinstance(dtype, str) and 0 < len(tensor.encode()) <= MOST_NAME
            whole = whole and len(shape) <= MOST_AXES
        except (KeyError, TypeError, ValueError):  # UnicodeError is a ValueError
            whole = False
        if not whole:
            raise QplugError("a damaged entry", where, "dtype, shape and data_offsets", DAMAGED)
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
                DAMAGED,
            )
        spans.append((begin, end, where))
        found[tensor] = Location(path, start + begin, TensorSpec(dtype, shape))
    at = 0
    for begin, end, where in sorted(spans):
        if begin != at:
            raise QplugError(f"data from byte {begin}", where, f"from byte {at}", DAMAGED)
        at = end
    if start + at != size:
        raise QplugError(
            f"{size - start} bytes of data",
            name,
            f"{at} (the shard is truncated or padded)",
            DAMAGED,
        )
    return found


def shorter(file: Path) -> QplugError:
    """Say that a file lost its end since its header was read."""
    return QplugError(
        "a file that became shorter", file.name, "one that nobody writes to", "convert it again"
    )


def _state(file: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written to or replaced; `None` if it is not here."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class Maps:
    """Tensors of source files by where they lie, as views of memory maps.

    A file is mapped when first asked for, and stays so as long as this object or a view lives.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def __contains__(self, file: Path) -> bool:
        """Whether a file is mapped."""
        return file in self._maps

    def forget(self, file: Path) -> None:
        """Let go of a file that is about to be removed; views of it stay valid."""
        self._maps.pop(file, None)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            try:
                with file.open("rb") as opened:
                    self._maps[file] = mmap.mmap(
                        opened.fileno(), 0, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE
                    )
            except OSError as error:
                raise unreadable(file, error) from None
            except ValueError:  # nothing to map
                raise shorter(file) from None
        return self._maps[file]

    def _holds(self, location: Location) -> mmap.mmap:
        """Return the map of a file that still has all of a tensor.

        Reading what a file lost after this look ends the process (SIGBUS): nothing is left under
        the target's name then, as after any kill.
        """
        data = self._map(location.file)
        if location.offset + location.spec.nbytes > min(data.size(), len(data)):
            raise shorter(location.file)
        return data

    def array(self, location: Location) -> NDArray[np.generic]:
        """Return a tensor as a NumPy view, without torch; bfloat16 comes as uint16."""
        data = self._holds(location)
        dtype = np.dtype(_NUMPY[location.spec.dtype])
        count = prod(location.spec.shape)
        if location.offset % dtype.itemsize:  # legal in the format, not for a typed view
            raw = bytearray(data[location.offset : location.offset + location.spec.nbytes])
            return np.frombuffer(raw, dtype, count).reshape(location.spec.shape)
        return np.frombuffer(data, dtype, count, location.offset).reshape(location.spec.shape)

    def tensor(self, location: Location) -> Tensor:
        """Return a tensor as a view of the memory map."""
        import torch

        from .codec import TORCH_DTYPES

        spec = location.spec
        if 0 in spec.shape:
            return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        view = torch.from_numpy(self.array(location).view(np.uint8).reshape(-1))
        return view.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)

    def raw(self, location: Location) -> memoryview:
        """Return the bytes of a tensor."""
        data = memoryview(self._holds(location))
        return data[location.offset : location.offset + location.spec.nbytes]


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

    def __init__(self, files: Iterable[Path], source: Source | None = None) -> None:
        self.files = tuple(files)
        self.locations: dict[str, Location] = {}
        self.problems: list[QplugError] = []
        self._source = source
        self._states = {file: _state(file) for file in self.files}
        headers = (
            [read_header(file) for file in self.files]
            if source is None
            else read_headers(source, [file.name for file in self.files])
        )
        for file, header in zip(self.files, headers, strict=True):
            for name, location in header.items():
                if name in self.locations:
                    both = f"in {self.locations[name].file.name} and {file.name}"
                    self.problems.append(QplugError(both, name, "one tensor of this name", REPAIR))
                self.locations[name] = location
        self.headers = {name: location.spec for name, location in self.locations.items()}
        self._maps = Maps()
        self._ahead: dict[str, dict[str, bytes]] = {}
        self._read_last: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def present(self, locations: Mapping[str, Location]) -> None:
        """Show other tensors in place of those of the headers: parts of them."""
        shown = dict(locations)
        self.locations.clear()
        self.locations.update(shown)
        self.headers.clear()
        self.headers.update((name, location.spec) for name, location in shown.items())

    def unchanged(self) -> None:
        """Refuse files that were written to or replaced since their headers were read.

        Files that come or go are the source's affair.

        Raises
        ------
        QplugError
            If one changed: what was read of it may be half of the one and half of the other.
        """
        for file, before in self._states.items():
            if before is not None and _state(file) not in (before, None):
                raise QplugError(
                    "a file that changed while it was read",
                    file.name,
                    "one that nobody writes to",
                    "convert it again",
                )

    def _fetched(self, name: str) -> Location:
        """Return where a tensor lies; a file that is elsewhere is fetched."""
        location = self.locations[name]
        if self._source is not None and location.file not in self._maps:
            self._source.need([location.file.name])
        return location

    def forget(self, file: Path) -> None:
        """Let go of a file that is about to be removed; views of it stay valid."""
        self._maps.forget(file)

    def peek(self, name: str) -> NDArray[np.generic]:
        """Return a small tensor as a NumPy array, without torch; bfloat16 comes as uint16.

        A view where the file is here. Elsewhere it is read, and with it, up to `WINDOW` bytes,
        those that come after it and have the same last name: who asks for one `g_idx` asks for
        the next.
        """
        location = self.locations[name]
        if self._source is not None and not self._source.here(location.file.name):
            raw = bytearray(self._read_ahead(self._source, name))
            dtype = np.dtype(_NUMPY[location.spec.dtype])
            return np.frombuffer(raw, dtype, prod(location.spec.shape)).reshape(location.spec.shape)
        return self._maps.array(self._fetched(name))

    def _read_ahead(self, source: Source, name: str) -> bytes:
        """Return the bytes of a tensor that is elsewhere."""
        kind = name.rpartition(".")[2]
        if name not in self._ahead.get(kind, ()):
            alike = [n for n in self.locations if n.rpartition(".")[2] == kind]
            chosen: list[str] = []
            total = 0
            for other in alike[alike.index(name) :]:
                total += self.headers[other].nbytes
                if (chosen and total > WINDOW) or source.here(self.locations[other].file.name):
                    break
                chosen.append(other)
            self._ahead[kind] = self._read(source, chosen)
        return self._ahead[kind][name]

    def _read(self, source: Source, names: Sequence[str]) -> dict[str, bytes]:
        """Read tensors by ranges; those that lie close together by one."""
        spans: list[Span] = []
        places: dict[str, tuple[int, int]] = {}
        ordered = sorted(names, key=lambda n: (self.locations[n].file, self.locations[n].offset))
        for name in ordered:
            place = self.locations[name]
            begin, end = place.offset, place.offset + place.spec.nbytes
            last = spans[-1] if spans else None
            if last is not None and last.name == place.file.name and begin - last.end <= GAP:
                spans[-1] = Span(last.name, last.begin, max(last.end, end))
            else:
                spans.append(Span(place.file.name, begin, end))
            places[name] = (len(spans) - 1, begin - spans[-1].begin)
        data = source.read(spans)
        return {
            name: data[span][at : at + self.headers[name].nbytes]
            for name, (span, at) in places.items()
        }

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: a view of the memory map, or what was read of a file elsewhere.

        The last tensors that were read stay, up to `WHOLE` bytes: a linear is asked for in blocks.
        """
        location = self.locations[name]
        source, size = self._source, location.spec.nbytes
        if source is None or not 0 < size <= WHOLE or source.here(location.file.name):
            return self._maps.tensor(self._fetched(name))
        import torch

        from .codec import TORCH_DTYPES

        with self._lock:
            if name not in self._read_last:
                self._read_last |= self._read(source, [name])
                while sum(map(len, self._read_last.values())) > WHOLE:
                    del self._read_last[next(iter(self._read_last))]
            raw = bytearray(self._read_last[name])
        return (
            torch.frombuffer(raw, dtype=torch.uint8)
            .view(TORCH_DTYPES[location.spec.dtype])
            .reshape(location.spec.shape)
        )

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor."""
        return self._maps.raw(self._fetched(name))
