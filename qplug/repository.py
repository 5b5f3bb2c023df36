"""Names of model repositories; importing this imports no client."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


@dataclass(frozen=True, slots=True)
class Repository:
    """`owner/name[@revision]`: a model repository."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @classmethod
    def parse(cls, text: str) -> Repository | None:
        """Return the repository that a text names, or `None` if it can be no such name."""
        name, at, revision = text.partition("@")
        parts = name.split("/")
        if len(parts) != 2 or not all(map(_NAME.fullmatch, parts)):
            return None
        if any(twice in part for twice in ("--", "..") for part in parts):
            return None
        if at and not (revision.isprintable() and revision.split() == [revision]):
            return None
        return cls(name, revision if at else None)
