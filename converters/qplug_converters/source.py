"""Where the files of a checkpoint lie: in a folder, or where they must be fetched from.

A `Checkpoint` asks its source for names, sizes and byte ranges, and for whole files when tensors
are read. A folder is the source that is here; others (a model hub) live above this package, for
nothing here opens a connection. Names come from other people: none is joined to a path or to an
address before `plain` has taken it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .errors import QplugError

REPAIR = "download the file again, or correct it"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `begin` to `end` of a file."""

    name: str
    begin: int
    end: int


class Source(Protocol):
    """Where the files of a checkpoint lie."""

    @property
    def title(self) -> str:
        """What errors and certificates call it."""

    @property
    def folder(self) -> Path:
        """The folder in which its files lie, or will lie once they are fetched."""

    @property
    def origin(self) -> dict[str, str]:
        """Where anybody finds it: `repository` and `revision`; nothing of a folder."""

    def names(self) -> list[str]:
        """Return the names of the files, sorted; that of a folder ends in `/`."""

    def path(self, name: str) -> Path:
        """Return where a file lies, or will lie; refuse a name that is not there.

        Raises
        ------
        QplugError
            If there is no such file, or reading it would lead out of the source.
        """

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""

    def here(self, name: str) -> bool:
        """Whether a file lies in `folder`."""

    def need(self, names: Iterable[str]) -> None:
        """Fetch what is not here of these files."""

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """Return ranges of bytes, several at a time where that is faster, without keeping them."""


def plain(name: str) -> str:
    """Return `name` if it is that of a file in a folder, and no way to another place.

    Raises
    ------
    QplugError
        If it holds a separator, leads upwards, or holds characters that do not print.
    """
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name or not name.isprintable():
        raise QplugError(f"{name!r}", "an entry of the index", "a plain file name", REPAIR)
    return name


def unreadable(path: Path, error: OSError) -> QplugError:
    """Say that the system refuses to read a file."""
    return QplugError(
        f"cannot be read ({error.strerror})", str(path), fix="check the path and its permissions"
    )


class Folder:
    """The source that is here: a folder of the file system.

    Links must not leave it. The layout of huggingface_hub's cache is the one exception:
    models--x/snapshots/<revision>/y -> ../../blobs/<hash>, which since 2.x may itself be a link to
    the blobs that all models share, beside models--x.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def title(self) -> str:
        """The path as it was given."""
        return str(self.folder)

    @property
    def origin(self) -> dict[str, str]:
        """Nothing: where a folder lies is nobody else's business."""
        return {}

    def names(self) -> list[str]:
        """Return the names of the files, sorted; that of a folder ends in `/`."""
        try:
            return sorted(f"{p.name}/" if p.is_dir() else p.name for p in self.folder.iterdir())
        except OSError as error:
            raise unreadable(self.folder, error) from None

    def path(self, name: str) -> Path:
        """Return the path of a file; refuse one that leads out of the folder."""
        path = self.folder / plain(name)
        try:
            real, root = path.resolve(), self.folder.resolve()
            exists, regular = path.exists(), path.is_file()
        except OSError as error:
            raise unreadable(path, error) from None
        except RuntimeError:  # what pathlib raises for a loop
            raise QplugError("a link to itself", str(path), "a file", REPAIR) from None
        allowed = [root]
        if root.parent.name == "snapshots":
            model = root.parent.parent
            allowed.append(model / "blobs")
            if model.name.startswith("models--"):
                allowed.append(model.parent / "blobs")
        if not any(real.is_relative_to(place) for place in allowed):
            raise QplugError(
                f"a link to {real}", name, "a file inside the folder", "copy the file into it"
            )
        if not exists:
            pickled = [p.name for p in self.folder.glob("*") if p.suffix in PICKLES]
            if name.endswith(".safetensors") and pickled:
                raise only_pickled(pickled[0], self.title)
            linked = path.is_symlink()
            raise QplugError(
                "a link to nothing" if linked else "no such file",
                str(path),
                "a file" if linked else "config.json and safetensors files",
                "check the path, or download what is missing",
            )
        if not regular:
            raise QplugError("no regular file", str(path), "a file", REPAIR)
        return path

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        path = self.path(name)
        try:
            return path.stat().st_size
        except OSError as error:
            raise unreadable(path, error) from None

    def here(self, name: str) -> bool:
        """Return that every file is here."""
        return True

    def need(self, names: Iterable[str]) -> None:
        """Do nothing: every file is here."""

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """Return ranges of bytes."""
        return [read_span(self.path(span.name), span) for span in spans]


def read_span(path: Path, span: Span) -> bytes:
    """Read a range of bytes of a local file."""
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), span.end - span.begin, span.begin)
    except OSError as error:
        raise unreadable(path, error) from None


def only_pickled(name: str, where: str) -> QplugError:
    """Say that weights are there only in a form that is never read."""
    return QplugError(
        f"only {name}, a pickle, which can run any code",
        where,
        "safetensors files",
        "let the tool that wrote it save safetensors",
    )
