"""Configurations that were measured: a row for a layout, a linear and a number of tokens.

A table is a JSON file for one kind of card and one Triton:

    {"schema": 1, "arch": "sm_90", "multiprocessors": 132, "triton": "3.6", "rows": [
        {"layout": "planes", "bits": 4, "dtype": "float16", "group": 128, "rows": 64,
         "columns": 128, "out_features": 4096, "in_features": 4096, "upto": 16,
         "tokens": 16, "splits": 8, "warps": 4, "stages": 3, "joined": true,
         "microseconds": 4.1, "rule": 4.6}]}

Fields up to `upto` say what it is for; from `tokens` to `joined` they are those of `Config`; the
last two are times, of this row and of what the rules would choose. Tables of the package lie in
`qplug_kernels/configs`, the user's own is the file `QPLUG_CONFIGS` (`off`: none), or
`qplug/configs.json` in the user's folder of configurations; `python -m qplug_kernels.tune` writes
it, and its rows come first.

A table for another card or another Triton is passed over: how planes are best joined, and how many
registers are spilled, changes with both.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from math import log
from pathlib import Path
from typing import Any

from qplug_converters.errors import QplugError

from . import compat, nibbles
from .form import Form, Tiled

LOG = logging.getLogger("qplug")

SCHEMA = 1
PACKAGE = Path(__file__).resolve().parents[1] / "configs"

LAYOUTS: Mapping[type, str] = {Form: "planes", nibbles.Form: "nibbles"}
"""What a layout is called in a table, by the class of its numbers."""

BUCKETS = (8, 16, 32, 64)
"""Rows are for numbers of tokens up to one of these, and above the one before."""

NEAR = 0.25
"""How far the logarithms of features may be from a row's, added up: 28 % of one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found best; fields are those of the file."""

    layout: str
    bits: int
    dtype: str
    group: int
    rows: int
    columns: int
    out_features: int
    in_features: int
    upto: int
    tokens: int
    splits: int
    warps: int
    stages: int
    joined: bool
    microseconds: float
    rule: float

    def values(self) -> dict[str, Any]:
        """Return the fields that it sets in a `Config`."""
        return {name: getattr(self, name) for name in SETS}


SETS = ("tokens", "splits", "warps", "stages", "joined")
ALLOWED: Mapping[str, tuple[int, ...]] = {
    "upto": BUCKETS,
    "tokens": BUCKETS,
    "splits": tuple(range(1, 257)),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4, 5, 6),
}
TYPES = {field.name: field.type for field in fields(Row)}


@dataclass(frozen=True, slots=True)
class Table:
    """A file: what it was measured on, and its rows."""

    arch: str
    multiprocessors: int
    triton: str
    rows: tuple[Row, ...]


def version() -> str:
    """Return Triton's major and minor number."""
    return ".".join(map(str, compat.VERSION))


def user_file() -> Path:
    """Return where the user's table is, or would be."""
    if named := os.environ.get("QPLUG_CONFIGS"):
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "qplug" / "configs.json"


def _wrong(path: Path, found: str, expected: str) -> QplugError:
    return QplugError(found, str(path), expected, "write it with python -m qplug_kernels.tune")


def _row(path: Path, data: Any) -> Row:
    """Return a checked row."""
    if not isinstance(data, dict) or set(data) != set(TYPES):
        keys = sorted(set(data) ^ set(TYPES)) if isinstance(data, dict) else data
        raise _wrong(path, f"a row that differs in {keys}", f"the fields {', '.join(TYPES)}")
    for name, wanted in TYPES.items():
        value = data[name]
        kinds: Any = {"str": str, "bool": bool, "int": int, "float": (int, float)}[str(wanted)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and wanted != "bool"):
            raise _wrong(path, f"{name} = {value!r} in a row", f"of type {wanted}")
        if name in ALLOWED and value not in ALLOWED[name]:
            span = ALLOWED[name]
            raise _wrong(path, f"{name} = {value} in a row", f"one of {span[0]} to {span[-1]}")
    return Row(**data)


def read(path: Path) -> Table:
    """Read a table.

    Raises
    ------
    QplugError
        If it is not of this schema, or a row holds what no kernel could be launched with.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _wrong(path, f"no table: {error}", "a JSON file") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise _wrong(path, "a file of another kind", f"a table of schema {SCHEMA}")
    try:
        rows = tuple(_row(path, row) for row in data["rows"])
        return Table(str(data["arch"]), int(data["multiprocessors"]), str(data["triton"]), rows)
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong(path, f"no table: {error!r}", "arch, multiprocessors, triton, rows") from error


def write(path: Path, table: Table) -> None:
    """Write a table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({"schema": SCHEMA, **asdict(table)}, indent=1) + "\n")
    beside.replace(path)


def fits(table: Table, arch: str, multiprocessors: int) -> bool:
    """Whether a table was measured on this kind of card, with this Triton."""
    here = (arch, multiprocessors, version())
    return (table.arch, table.multiprocessors, table.triton) == here


@cache
def rows_for(arch: str, multiprocessors: int) -> tuple[Row, ...]:
    """Return the rows of all tables for a card, the user's first; read once in a process."""
    own = [] if os.environ.get("QPLUG_CONFIGS") == "off" else [user_file()]
    found: list[Row] = []
    for path in [path for path in own if path.exists()] + sorted(PACKAGE.glob("*.json")):
        table = read(path)
        if fits(table, arch, multiprocessors):
            found += table.rows
            LOG.info("kernels take %d measured configurations from %s", len(table.rows), path)
    return tuple(found)


def purpose(form: Tiled, tokens: int) -> dict[str, Any]:
    """Return the fields of a row that a layout and a number of tokens ask for.

    Features are those of the linear; `find` takes the nearest.
    """
    return {
        "layout": LAYOUTS[type(form)],
        "bits": 16 * form.words * form.rows // form.tile,
        "dtype": str(form.dtype).removeprefix("torch."),
        "group": form.group,
        "rows": form.rows,
        "columns": form.columns,
        "out_features": form.out_features,
        "in_features": form.in_features,
        "upto": next(most for most in BUCKETS if tokens <= most),
    }


def nearest(rows: Iterable[Row], wanted: Mapping[str, Any]) -> Row | None:
    """Return the row for a purpose whose linear is nearest, the first of equals, if one is near."""
    features = ("out_features", "in_features")

    def distance(row: Row) -> float:
        return sum(abs(log(getattr(row, name) / wanted[name])) for name in features)

    same = [
        row
        for row in rows
        if all(getattr(row, name) == wanted[name] for name in wanted if name not in features)
    ]
    best = min(same, key=distance, default=None)
    return best if best is not None and distance(best) <= NEAR else None


def find(form: Tiled, tokens: int, arch: str, multiprocessors: int) -> Row | None:
    """Return the measured row for a layout and a number of tokens, if there is one."""
    rows = rows_for(arch, multiprocessors)
    return nearest(rows, purpose(form, tokens)) if rows else None
