"""Times as rows, and what they mean beside each other: tables, ratios, targets. No device here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .adapters import Side
from .gate import UNFINISHED, Checked
from .machine import Limits

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter at one case.

    Attributes
    ----------
    adapter, side, detail
        What multiplied.
    form, linear, tokens
        The case.
    seconds, spread
        Of one call.
    nbytes
        Of its weights as it holds them, of activations and of the product.
    """

    adapter: str
    side: str
    detail: str
    form: str
    linear: str
    tokens: int
    seconds: float
    spread: float
    nbytes: int

    @property
    def case(self) -> tuple[str, str, int]:
        """What its time is compared within."""
        return self.form, self.linear, self.tokens


@dataclass(frozen=True, slots=True)
class Line:
    """qplug at one case, beside the others; a ratio above 1 means that qplug is faster.

    Attributes
    ----------
    row
        Its time.
    floor
        Seconds that its bytes take at the bandwidth of a copy.
    share
        `floor` of its time.
    triton, cuda, dense
        Time of the best other, of its own, and who that is; `None` where none was timed.
    """

    row: Row
    floor: float
    share: float
    triton: tuple[float, str] | None
    cuda: tuple[float, str] | None
    dense: tuple[float, str] | None


@dataclass(frozen=True, slots=True)
class Target:
    """A promise and what became of it; `found` is `None` where it was not measured."""

    what: str
    wanted: float
    found: float | None

    @property
    def met(self) -> bool | None:
        """Whether it is kept."""
        return None if self.found is None else self.found >= self.wanted


@dataclass(slots=True)
class Result:
    """All of a run, as far as it went.

    Attributes
    ----------
    machine
        Device, versions, clocks, revision.
    limits
        What the device can do at most.
    rows
        Times.
    checked
        What was compared with float64, and why something was not timed.
    dropped
        Cases that there was no time for.
    seconds
        How long it took.
    """

    machine: dict[str, Any]
    limits: Limits | None = None
    rows: list[Row] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Checked]:
        """What qplug multiplied wrongly, or failed to; what there was no time for is neither."""
        ours = [one for one in self.checked if one.adapter == Side.QPLUG]
        return [one for one in ours if one.reason not in ("", UNFINISHED)]


def best(rows: Iterable[Row], row: Row, side: Side) -> tuple[float, str] | None:
    """Return the smallest time of a side at a case as a multiple of a row's, and whose it is."""
    others = [other for other in rows if other.case == row.case and other.side == side]
    if not others:
        return None
    first = min(others, key=lambda other: other.seconds)
    return first.seconds / row.seconds, first.adapter


def lines(rows: Sequence[Row], limits: Limits) -> list[Line]:
    """Return qplug's rows beside the others'."""
    found = []
    for row in rows:
        if row.side == Side.QPLUG:
            floor = row.nbytes / limits.copy
            beside = (best(rows, row, side) for side in (Side.TRITON, Side.CUDA, Side.DENSE))
            found.append(Line(row, floor, floor / row.seconds, *beside))
    return found


SHARES = {"gate_up": 0.72, "down": 0.65, "qkv": 0.48, "o": 0.40}
"""Share of the bandwidth of a copy, 4 bits, up to 16 tokens, by linear."""


def _least(values: Iterable[float | None]) -> float | None:
    """Return the smallest number, or `None` without any."""
    known = [value for value in values if value is not None]
    return min(known, default=None)


def targets(found: Sequence[Line]) -> list[Target]:
    """Return what is promised of an H200 and what was found: the worst of all cases that count."""
    few = [line for line in found if line.row.tokens <= 16]
    int4 = [line for line in few if line.row.form in ("int4", "int4-asym")]
    results = [
        Target(
            f"int4, up to 16 tokens, {linear}: share of copy bandwidth",
            wanted,
            _least(line.share for line in int4 if line.row.linear == linear),
        )
        for linear, wanted in SHARES.items()
    ]

    def ratio(what: str, wanted: float, side: str, some: Iterable[Line]) -> None:
        values = (getattr(line, side) for line in some)
        results.append(Target(what, wanted, _least(value and value[0] for value in values)))

    many = [line for line in found if line.row.form in ("int4", "int4-asym")]
    ratio("int4, up to 16 tokens: the best CUDA peer's time", 1.0, "cuda", int4)
    ratio("int4, up to 16 tokens: the best Triton peer's time", 1.5, "triton", int4)
    ratio("int4, 4096 tokens: cuBLAS's time", 0.95, "dense", _at(many, 4096))
    ratio("int4, 1024 tokens: cuBLAS's time", 0.85, "dense", _at(many, 1024))
    nf4 = [line for line in found if line.row.form == "nf4"]
    ratio("nf4: bitsandbytes' time", 1.0, "cuda", nf4)
    times = {line.row.case: line.row.seconds for line in found}
    orders = [
        times[form.removesuffix("-act-order"), linear, tokens] / seconds
        for (form, linear, tokens), seconds in times.items()
        if form == "int4-act-order" and tokens <= 16 and ("int4", linear, tokens) in times
    ]
    results.append(
        Target("act order, up to 16 tokens: the time without it", 1 / 1.1, _least(orders))
    )
    return results


def narrow_targets(rows: Sequence[Row]) -> list[Target]:
    """Return whether 3 and 2 bits at one token beat all others' 4 bits."""
    results = []
    for form in ("int3", "int2"):
        ratios = []
        for row in rows:
            if row.side == Side.QPLUG and row.form == form and row.tokens == 1:
                others = [
                    other.seconds / row.seconds
                    for other in rows
                    if other.side in (Side.TRITON, Side.CUDA)
                    and other.form.startswith("int4")
                    and (other.linear, other.tokens) == (row.linear, 1)
                ]
                ratios.append(_least(others))
        results.append(Target(f"{form}, 1 token: the best peer's int4's time", 1.0, _least(ratios)))
    return results


def _at(found: Iterable[Line], tokens: int) -> list[Line]:
    return [line for line in found if line.row.tokens == tokens]


def _beside(ratio: tuple[float, str] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f} {ratio[1]}"


def table(found: Sequence[Line]) -> str:
    """Return qplug's times as text."""
    text = [
        f"{'form':<15}{'linear':<9}{'tokens':>6}{'floor us':>10}{'us':>9}{'share':>7}"
        f"  {'best Triton':<15}{'best CUDA':<15}{'cuBLAS':<13}kernel"
    ]
    for line in sorted(found, key=lambda line: (line.row.form, line.row.linear, line.row.tokens)):
        row = line.row
        noise = "" if row.spread <= 0.05 else f"  (spread {row.spread:.0%})"
        text.append(
            f"{row.form:<15}{row.linear:<9}{row.tokens:>6}{line.floor * 1e6:>10.2f}"
            f"{row.seconds * 1e6:>9.2f}{line.share:>7.0%}  {_beside(line.triton):<15}"
            f"{_beside(line.cuda):<15}{_beside(line.dense):<13}{row.detail}{noise}"
        )
    return "\n".join(text)


def reasons(checked: Iterable[Checked]) -> str:
    """Return why adapters were not timed, one line for each reason."""
    said: dict[tuple[str, str], list[str]] = {}
    for one in checked:
        if one.reason:
            said.setdefault((one.adapter, one.reason), []).append(one.form)
    return "\n".join(
        f"{adapter}: {reason} ({', '.join(dict.fromkeys(forms))})"
        for (adapter, reason), forms in said.items()
    )


def show(result: Result) -> str:
    """Return a run as text."""
    text = [f"{key}: {value}" for key, value in result.machine.items()]
    if result.limits is not None:
        limits = result.limits
        text += [
            f"copy {limits.copy / 1e12:.2f} TB/s, read {limits.read / 1e12:.2f} TB/s, "
            f"an empty kernel in a graph {limits.node * 1e6:.2f} us",
            "",
            "times of others are multiples of qplug's: above 1, qplug is faster",
            table(found := lines(result.rows, limits)),
            "",
        ]
        for target in targets(found) + narrow_targets(result.rows):
            met = {True: "met", False: "MISSED", None: "not measured"}[target.met]
            value = "" if target.found is None else f"{target.found:.2f} "
            text.append(f"{met:>12}  {target.what}: {value}(wanted {target.wanted:.2f})")
    if why := reasons(result.checked):
        text += ["", "not timed:", why]
    if result.dropped:
        text += ["", f"no time was left for {len(result.dropped)} cases:", *result.dropped]
    text += ["", f"{len(result.rows)} times in {result.seconds:.0f} s"]
    return "\n".join(text)


def save(result: Result, path: Path) -> None:
    """Write a run as JSON, whole or not at all."""
    data = {"schema": SCHEMA, **asdict(result)}
    if result.limits is not None:
        found = lines(result.rows, result.limits)
        data["targets"] = [
            asdict(target) for target in targets(found) + narrow_targets(result.rows)
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(path)


def load(path: Path) -> Result:
    """Read what `save` wrote.

    Raises
    ------
    ValueError
        If it is of another schema.
    """
    data = json.loads(path.read_text())
    if data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is no result of schema {SCHEMA}")
    data.pop("targets", None)
    limits = data["limits"] and Limits(**data["limits"])
    rows = [Row(**row) for row in data["rows"]]
    checked = [Checked(**one) for one in data["checked"]]
    return Result(data["machine"], limits, rows, checked, data["dropped"], data["seconds"])
