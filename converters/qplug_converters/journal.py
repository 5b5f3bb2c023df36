"""Which shards of a conversion are finished, so that one that was killed goes on.

A file of JSON lines beside the work: first the key of the conversion (its source, plan and
cutting), then a line for each finished shard, written when the shard is on the disk or handed
over. A journal of another conversion counts for nothing, and so does a line that a kill has cut
short.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import QplugError


@dataclass(frozen=True, slots=True)
class Made:
    """A finished shard: the sha256 and the bytes of its file, and what was measured in making it.

    `records` is by linear, for the certificate.
    """

    sha256: str
    size: int
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Journal:
    """The journal of one conversion.

    Attributes
    ----------
    path : Path
        Its file.
    finished : dict of Made
        The finished shards, by file name.

    Raises
    ------
    QplugError
        If the file cannot be read or written.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.finished: dict[str, Made] = {}
        self._key = key
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().splitlines() if path.exists() else []
        if [_entry(line) for line in lines[:1]] == [{"key": key}]:
            for line in lines[1:]:
                match _entry(line):
                    case {"name": str(n), "sha256": str(h), "size": int(b), "records": dict(r)}:
                        self.finished[n] = Made(h, b, r)
        self._write()

    def add(self, name: str, made: Made) -> None:
        """Note that a shard is finished; returns when that is on the disk."""
        self.finished[name] = made
        with _disk_errors(self.path), self.path.open("ab") as file:
            file.write(_line({"name": name, **asdict(made)}))
            file.flush()
            os.fsync(file.fileno())

    def drop(self, names: Iterable[str]) -> None:
        """Forget shards that turned out not to be there."""
        for name in list(names):
            self.finished.pop(name, None)
        self._write()

    def _write(self) -> None:
        """Write the journal anew, and put it in place at once."""
        entries = [{"name": name, **asdict(made)} for name, made in self.finished.items()]
        fresh = self.path.with_name(f"{self.path.name}.new")
        with _disk_errors(self.path):
            with fresh.open("wb") as file:
                file.write(b"".join(map(_line, [{"key": self._key}, *entries])))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)


def key_of(facts: Mapping[str, Any]) -> str:
    """Return the key of a conversion from all that decides the bytes of its shards."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _entry(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class _disk_errors:
    """Turn the system's refusals into an error about the journal."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise QplugError(
                error.strerror or str(error), str(self.path), fix="see to its permissions"
            ) from None
