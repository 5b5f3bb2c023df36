"""Errors as data: what was found, where, what was expected, and what to do.

A bad checkpoint, a bad option or a bad machine raises a `QplugError`; the command line renders it
as one line and a hint. A bug raises anything else and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_SHOWN = 10
MOST_CHARACTERS = 1000
"""Characters of one line; a value in a hostile file may have millions."""


def one_line(text: str) -> str:
    """Escape what is not printable, and leave out the middle of what is too long.

    Names in a hostile file may hold lines and terminal codes.
    """
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _clipped(text))
    return _clipped(text)


def _clipped(text: str) -> str:
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


class QplugError(Exception):
    """Bad input or environment (exit code 1).

    Parameters
    ----------
    found
        What was met, with its numbers.
    where
        The file, tensor or key it was met in.
    expected
        What would have been right.
    fix
        What the user can do about it, as one sentence.
    """

    exit_code = 1

    def __init__(self, found: str, where: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.where = where
        self.expected = expected
        self.fix = fix
        self.others: tuple[QplugError, ...] = ()
        """Further problems of the same checkpoint, the most telling one being this error."""

    def __str__(self) -> str:
        """Return the error as one line, without the hint."""
        line = f"{self.where}: " if self.where else ""
        line += f"found {self.found}, expected {self.expected}" if self.expected else self.found
        line = one_line(line)
        return line if not self.others else f"{line} (and {len(self.others)} more)"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the four fields, so that the error survives a process boundary."""
        return type(self), (self.found, self.where, self.expected, self.fix)

    def as_json(self) -> dict[str, object]:
        """Return the four fields, and those of the further problems, for `--json`."""
        fields: dict[str, object] = {
            "found": self.found,
            "where": self.where,
            "expected": self.expected,
            "fix": self.fix,
        }
        if self.others:
            fields["others"] = [other.as_json() for other in self.others[: MOST_SHOWN - 1]]
            fields["count"] = len(self.others) + 1
        return fields


class Unsupported(QplugError):
    """The input is well formed, but this version of qplug has no way to do what was asked."""


class Refused(QplugError):
    """The answer is no: the plan is worse than what was allowed (exit code 3)."""

    exit_code = 3


def raise_all(problems: Sequence[QplugError]) -> None:
    """Raise the first problem with the others attached; return if there are none."""
    if problems:
        first = problems[0]
        first.others = tuple(problems[1:])
        raise first
