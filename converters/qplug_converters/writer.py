"""Writing a checkpoint: beside its final name, everything reserved first, renamed last.

Names, dtypes and shapes are known from the plan, so shards are laid out before a byte of data is
made: the space is reserved at once (a full disk or a file-size limit is met at the start), tensors
are written in any order, whole or as views of a memory map, and memory holds none of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .errors import QplugError
from .layout import ITEMSIZE, TensorSpec
from .shards import Location

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD = 5_000_000_000
"""Bytes; what huggingface_hub and Transformers cut at."""
_COPY_STEP = 1 << 26


class Writer:
    """A checkpoint folder being written; nothing appears under `target` before `commit`.

    Used as a context manager: leaving it without `commit` removes what was written, and the parent
    folders that were made for it. The partial folder `.<name>.qplug-partial` is locked while its
    writer lives; one left by a killed process is cleared away by the next.

    Raises
    ------
    QplugError
        If the target exists, another writer is at work on it, or space cannot be reserved.
    """

    def __init__(
        self,
        target: Path,
        specs: Mapping[str, TensorSpec],
        stem: str = "model",
        max_shard: int = MAX_SHARD,
    ) -> None:
        self.target = target
        self._stem = stem
        self._partial = target.parent / f".{target.name}.qplug-partial"
        self._shards = _cut(specs, max_shard)
        self._specs = specs
        self._places: dict[str, Location] = {}
        self._files: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = -1
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        self._refuse_existing("a file or folder that exists")
        try:
            try:
                self._claim()
                for left in self._partial.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            except OSError as error:
                raise QplugError(
                    error.strerror or str(error),
                    str(error.filename or self.target),
                    "a place that can be written to",
                    "choose another place, or see to its permissions",
                ) from None
            # Another writer may have finished between the first look and the lock.
            self._refuse_existing("a file or folder that exists")
            for number, names in enumerate(self._shards, 1):
                self._reserve(self._partial / self._shard_name(number), names)
        except BaseException:
            self._discard()
            raise
        return self

    def _refuse_existing(self, found: str) -> None:
        if self.target.exists() or self.target.is_symlink():
            raise QplugError(
                found, str(self.target), "a new name", "remove it first, or choose another name"
            )

    def _claim(self) -> None:
        """Make the partial folder and lock it."""
        parent = self.target.parent
        self._made = [p for p in (parent, *parent.parents) if not p.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        while self._lock < 0:
            self._partial.mkdir(exist_ok=True)
            try:
                # What is in it will be removed, so it must be no link to somewhere else.
                lock = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The folder may have been renamed or removed, by who held the lock, since it was
                # opened: then the lock is on nothing.
                if os.path.samestat(os.fstat(lock), self._partial.stat()):
                    self._lock = lock
            except FileNotFoundError:
                continue
            except BlockingIOError:
                raise QplugError(
                    "another conversion at work", str(self.target), "one at a time", "wait for it"
                ) from None
            finally:
                if self._lock < 0:
                    os.close(lock)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()

    def _shard_name(self, number: int) -> str:
        if len(self._shards) == 1 and self._stem == "model":
            return "model.safetensors"
        return f"{self._stem}-{number:05d}-of-{len(self._shards):05d}.safetensors"

    def _reserve(self, path: Path, names: list[str]) -> None:
        """Write the header of a shard and reserve the space of its data."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            spec = self._specs[name]
            end = at + spec.nbytes
            header[name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [at, end],
            }
            at = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        start = 8 + len(raw)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files[path] = file
        with _disk_errors(path, start + at):
            os.posix_fallocate(file, 0, start + at)
            _write(file, len(raw).to_bytes(8, "little") + raw, 0)
        for name in names:
            offset = start + header[name]["data_offsets"][0]
            self._places[name] = Location(path, offset, self._specs[name])

    # Data -------------------------------------------------------------------------------------

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor."""
        import torch

        place = self._places[name]
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        with _disk_errors(place.file, place.spec.nbytes):
            _write(self._files[place.file], raw.data, place.offset)

    def view(self, name: str) -> Tensor:
        """Return a tensor as a writable view of the file, for linears too large for memory."""
        import torch

        from .codec import TORCH_DTYPES

        place = self._places[name]
        if place.file not in self._maps:
            self._maps[place.file] = mmap.mmap(self._files[place.file], 0)
        raw = np.frombuffer(self._maps[place.file], np.uint8, place.spec.nbytes, place.offset)
        return torch.from_numpy(raw).view(TORCH_DTYPES[place.spec.dtype]).reshape(place.spec.shape)

    def copy(self, name: str, source: Location) -> None:
        """Copy the bytes of a tensor from another file, inside the kernel where it can."""
        place = self._places[name]
        with source.file.open("rb") as file, _disk_errors(place.file, place.spec.nbytes):
            at, end = 0, place.spec.nbytes
            while at < end:
                step = min(_COPY_STEP, end - at)
                try:
                    done = os.copy_file_range(
                        file.fileno(),
                        self._files[place.file],
                        step,
                        source.offset + at,
                        place.offset + at,
                    )
                except OSError:
                    done = 0
                if done == 0:
                    data = os.pread(file.fileno(), step, source.offset + at)
                    if not data:
                        raise QplugError(
                            "a file that became shorter", source.file.name, fix="leave it alone"
                        )
                    _write(self._files[place.file], data, place.offset + at)
                    done = len(data)
                at += done

    # Files ------------------------------------------------------------------------------------

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        text = json.dumps(value, indent=2) + "\n"
        with _disk_errors(self._partial / name, len(text)):
            (self._partial / name).write_text(text, encoding="utf-8")

    def file(self, path: Path) -> None:
        """Copy a file of the model that holds no weights."""
        with _disk_errors(self._partial / path.name, path.stat().st_size):
            shutil.copyfile(path, self._partial / path.name)

    def commit(self) -> Path:
        """Write the index, make everything durable, and give the folder its name."""
        if len(self._shards) > 1:
            total = sum(spec.nbytes for spec in self._specs.values())
            self.json(
                f"{self._stem}.safetensors.index.json",
                {
                    "metadata": {"total_size": total},
                    "weight_map": {n: self._places[n].file.name for n in self._specs},
                },
            )
        with _disk_errors(self._partial, 0):
            for mapped in self._maps.values():
                mapped.flush()
            for file in self._files.values():
                os.fsync(file)
            for path in self._partial.iterdir():
                if path not in self._files:
                    with path.open("rb") as small:
                        os.fsync(small.fileno())
            os.fsync(self._lock)
            self._refuse_existing("a file or folder that appeared meanwhile")
            self._partial.rename(self.target)
            self._made.clear()
            parent = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        return self.target

    def _discard(self) -> None:
        """Close everything; remove the partial folder if it was not renamed."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        self._maps.clear()
        if self._lock >= 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty: somebody uses it
                folder.rmdir()
        self._made.clear()


def _cut(specs: Mapping[str, TensorSpec], most: int) -> list[list[str]]:
    """Cut the tensors into shards in order; inside one, wider dtypes first so that all align."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return [sorted(names, key=lambda n: -ITEMSIZE[specs[n].dtype]) for names in shards]


def _write(file: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data`; the system may take it in pieces."""
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


class _disk_errors:
    """Turn the system's refusals into an error that says how much was to be written."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise QplugError(
                f"{error.strerror or error} (writing {self.size:,} bytes)",
                self.path.name,
                fix="make room, or lift the limit; nothing was left behind",
            ) from None
