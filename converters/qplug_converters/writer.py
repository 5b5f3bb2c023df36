"""Writing a checkpoint: beside its final name, everything reserved first, renamed last.

Names, dtypes and shapes are known from the plan, so shards are laid out before a byte of data is
made: the space is reserved at once (a full disk or a file-size limit is met at the start), tensors
are written in any order, whole or as views of a memory map, and memory holds none of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .errors import QplugError
from .layout import ITEMSIZE, TensorSpec
from .shards import Location, shorter
from .source import unreadable

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD = 5_000_000_000
"""Bytes; what huggingface_hub and Transformers cut at."""
_COPY_STEP = 1 << 26
_SYNC_SECONDS = 0.05
"""Pause between two syncs beside the work."""


class ShardFile:
    """A safetensors file of which everything is known but the data.

    Header and places follow from the names, dtypes and shapes alone, so that whoever fills the
    file, in whatever process, needs no word with who reserved it. `reserve` makes the file; a
    `with` block opens it to be filled, whole tensors or views, in any order.

    Attributes
    ----------
    path : Path
        Where it is.
    specs : Mapping
        Dtype and shape of every tensor.
    places : dict
        Where each tensor lies.
    size : int
        Bytes of the whole file.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path, self.specs = path, specs
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # Wider dtypes first, so that all align.
        for name in sorted(specs, key=lambda n: -ITEMSIZE[specs[n].dtype]):
            spec = specs[name]
            end = at + spec.nbytes
            offsets = [at, end]
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
            at = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._head = len(raw).to_bytes(8, "little") + raw
        start = len(self._head)
        self.size = start + at
        self.places = {
            name: Location(path, start + header[name]["data_offsets"][0], spec)
            for name, spec in specs.items()
        }
        self._file = -1
        self._map: mmap.mmap | None = None

    def reserve(self) -> None:
        """Make the file: its header, and the space of its data.

        Raises
        ------
        QplugError
            If it exists, or the disk refuses.
        """
        with _disk_errors(self.path, self.size):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.posix_fallocate(file, 0, self.size)
                _write(file, self._head, 0)
            finally:
                os.close(file)

    def __enter__(self) -> Self:
        with _disk_errors(self.path, self.size):
            self._file = os.open(self.path, os.O_RDWR)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)
        self._file, self._map = -1, None

    def put(self, name: str, tensor: Tensor, at: int = 0) -> None:
        """Write a whole tensor, or what lies in it from byte `at` on."""
        import torch

        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        with _disk_errors(self.path, self.specs[name].nbytes):
            _write(self._file, raw.data, self.places[name].offset + at)

    def view(self, name: str) -> Tensor:
        """Return a tensor as a writable view of the file, for linears too large for memory."""
        import torch

        from .codec import TORCH_DTYPES

        place = self.places[name]
        if self._map is None:
            self._map = mmap.mmap(self._file, 0)
        raw = np.frombuffer(self._map, np.uint8, place.spec.nbytes, place.offset)
        return torch.from_numpy(raw).view(TORCH_DTYPES[place.spec.dtype]).reshape(place.spec.shape)

    def copy(self, name: str, source: Location) -> None:
        """Copy the bytes of a tensor from another file, inside the kernel where it can."""
        place = self.places[name]
        with source.file.open("rb") as file, _disk_errors(self.path, place.spec.nbytes):
            at, end = 0, place.spec.nbytes
            while at < end:
                step = min(_COPY_STEP, end - at)
                try:
                    done = os.copy_file_range(
                        file.fileno(), self._file, step, source.offset + at, place.offset + at
                    )
                except OSError:
                    done = 0
                if done == 0:
                    data = os.pread(file.fileno(), step, source.offset + at)
                    if not data:
                        raise shorter(source.file)
                    _write(self._file, data, place.offset + at)
                    done = len(data)
                at += done

    @contextlib.contextmanager
    def syncing(self) -> Iterator[None]:
        """Bring to the disk, in another thread, what is written in the body."""
        over = threading.Event()

        def sync() -> None:
            # What the disk refuses, `sync` will say.
            with contextlib.suppress(OSError):
                while not over.wait(_SYNC_SECONDS):
                    os.fdatasync(self._file)

        thread = threading.Thread(target=sync)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with _disk_errors(self.path, self.size):
            if self._map is not None:
                self._map.flush()
            os.fsync(self._file)

    def header_sha256(self) -> str:
        """Return the hash of the header, its length included."""
        return hashlib.sha256(self._head).hexdigest()

    def sha256(self) -> str:
        """Return the hash of the whole file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Writer:
    """A checkpoint folder being written; nothing appears under `target` before `commit`.

    Used as a context manager: leaving it without `commit` removes what was written, and the parent
    folders that were made for it. The partial folder `.<name>.qplug-partial` is locked while its
    writer lives; one left by a killed process is cleared away by the next. All shards are reserved
    on entering, or with `ahead=False` each when its turn comes, by `ShardFile.reserve`. A
    `resumable` writer leaves the partial folder where it is; the next takes over the shards in it
    that `keep` names, if their sha256 is that.

    Attributes
    ----------
    shards : tuple of ShardFile
        The files of tensors, in the partial folder.
    kept : set of str
        Names of those that were taken over.

    Raises
    ------
    QplugError
        If the target exists, another writer is at work on it, or space cannot be reserved.
    """

    def __init__(
        self,
        target: Path,
        shards: Sequence[Mapping[str, TensorSpec]],
        stem: str = "model",
        *,
        ahead: bool = True,
        keep: Mapping[str, str] | None = None,
        resumable: bool = False,
    ) -> None:
        self.target = target
        self.kept: set[str] = set()
        self._keep, self._resumable = keep or {}, resumable
        self._stem, self._ahead = stem, ahead
        self._partial = target.parent / f".{target.name}.qplug-partial"
        names = _names(stem, len(shards))
        self.shards = tuple(
            ShardFile(self._partial / name, specs)
            for name, specs in zip(names, shards, strict=True)
        )
        self._lock = -1
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        self._refuse_existing("a file or folder that exists")
        try:
            try:
                self._claim()
                self.kept = {shard.path.name for shard in self.shards if self._is_kept(shard)}
                for left in self._partial.iterdir():
                    if left.name not in self.kept:
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
            for shard in self.shards if self._ahead else ():
                if shard.path.name not in self.kept:
                    shard.reserve()
        except BaseException:
            self._discard()
            raise
        return self

    def _is_kept(self, shard: ShardFile) -> bool:
        """Whether a finished shard of an earlier writer is there, whole."""
        wanted = self._keep.get(shard.path.name)
        if wanted is None or shard.path.is_symlink() or not shard.path.is_file():
            return False
        return shard.path.stat().st_size == shard.size and shard.sha256() == wanted

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

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        text = json.dumps(value, indent=2) + "\n"
        with _disk_errors(self._partial / name, len(text)):
            (self._partial / name).write_text(text, encoding="utf-8")

    def file(self, path: Path) -> None:
        """Copy a file of the model that holds no weights."""
        try:
            with path.open("rb"):
                size = path.stat().st_size
        except OSError as error:
            raise unreadable(path, error) from None
        with _disk_errors(self._partial / path.name, size):
            shutil.copyfile(path, self._partial / path.name)

    def small_files(self) -> list[Path]:
        """Return the files so far that are no shards, by name."""
        shards = {shard.path for shard in self.shards}
        return sorted(path for path in self._partial.iterdir() if path not in shards)

    def index(self) -> None:
        """Write the index, if there are several shards."""
        if len(self.shards) > 1:
            places = [place for shard in self.shards for place in shard.places.items()]
            self.json(
                f"{self._stem}.safetensors.index.json",
                {
                    "metadata": {"total_size": sum(place.spec.nbytes for _, place in places)},
                    "weight_map": {name: place.file.name for name, place in places},
                },
            )

    def commit(self) -> Path:
        """Write the index, make everything durable, and give the folder its name.

        A shard that is no longer there (handed over, and moved away) stays in the index.
        """
        self.index()
        with _disk_errors(self._partial, 0):
            for path in self._partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
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
        """Remove the partial folder if it was not renamed, and give up the lock."""
        if self._lock >= 0:
            if not self._resumable:
                shutil.rmtree(self._partial, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty: somebody uses it
                folder.rmdir()
        self._made.clear()


def _names(stem: str, count: int) -> list[str]:
    """Return the names of `count` shards."""
    if count == 1 and stem == "model":
        return ["model.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def cut(units: Iterable[Mapping[str, TensorSpec]], most: int) -> list[dict[str, TensorSpec]]:
    """Cut units, the tensors that stay together, into shards of at most `most` bytes, in order.

    A unit that is larger has a shard of its own.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for unit in units:
        size = sum(spec.nbytes for spec in unit.values())
        if shards[-1] and filled + size > most:
            shards.append({})
            filled = 0
        shards[-1].update(unit)
        filled += size
    return shards


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
