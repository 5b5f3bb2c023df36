"""Whether a folder is what its certificate says, and whether the certificate says the truth.

From the folder alone: every hash is computed again from the bytes, and bits that mean nothing must
be what qplug writes. With the source: the weights are compared (`verify`), and the moves that the
certificate names are made again from the source's bytes and must give the hashes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from blake3 import blake3

from .blocks import rows_of
from .certificate import UNCERTIFIED, seal_of, sha256_of, source_hashes
from .checkpoint import CERTIFICATE, Checkpoint
from .codec import constant, form, pack_part, unpack_part
from .conversion import Conversion, Linear, Nowhere, Scratch
from .digest import LinearHash, bytes_of
from .errors import QplugError
from .layout import Holds, Layout, Part
from .moves import MOVES
from .plan import Step
from .scheme import Scheme
from .shards import Maps
from .source import REPAIR, plain
from .threads import workers
from .verdict import Move, Verdict
from .verify import Certificate as Proof
from .verify import Progress, Side, verify


@dataclass(slots=True)
class Checked:
    """The answer of `check`: what does not hold, one sentence each, and what was looked at.

    `proof` is the comparison with the source, where there was one.
    """

    linears: int = 0
    tensors: int = 0
    files: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""
    proof: Proof | None = None

    @property
    def holds(self) -> bool:
        """Whether everything holds."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        proof = {} if self.proof is None else {"proof": self.proof.as_json()}
        return {
            "holds": self.holds,
            "verdict": self.verdict,
            "linears": self.linears,
            "tensors": self.tensors,
            "files": self.files,
            "problems": self.problems,
            "notes": self.notes,
            **proof,
        }


def check(
    checkpoint: Checkpoint,
    source: Checkpoint | None = None,
    *,
    progress: Progress | None = None,
) -> Checked:
    """Check a folder against its certificate, and both against the source if it is given.

    Raises
    ------
    QplugError
        If there is no certificate, it is none, or a checkpoint is damaged.
    """
    said = _read(checkpoint)
    found = Checked(verdict=str(said["verdict"]))
    if seal_of(said) != said.get("sha256"):
        found.problems.append(f"{CERTIFICATE}: changed since it was written")
    there = set(checkpoint.source.names())
    checkpoint.source.need([plain(name) for name in said["files"] if name in there])
    _check_files(checkpoint, said["files"], found)
    _check_tensors(checkpoint, said["tensors"], found)
    side = Side.of(checkpoint)
    if side.format is not None and side.format.name != said["target"]:
        found.problems.append(
            f"format {side.format.name}, and the certificate says {said['target']}"
        )
    claims: Mapping[str, dict[str, Any]] = said["linears"]
    found.problems += [f"{m}: not in the certificate" for m in side.layouts if m not in claims]
    found.linears = len(claims)
    _each(claims, lambda module: _check_linear(side, module, claims[module]), found, progress)
    if source is not None:
        _check_source(side, source, said, found, progress)
    return found


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read a certificate, and refuse what has not its shape."""
    if CERTIFICATE not in checkpoint.source.names():
        raise QplugError(
            "no certificate",
            checkpoint.title,
            f"a {CERTIFICATE}",
            "`qplug verify A B` compares any two checkpoints",
        )
    said = checkpoint.read_json(CERTIFICATE)
    tables = {"files": dict, "linears": dict, "tensors": str}
    whole = all(
        isinstance(said.get(key), dict) and all(isinstance(v, kind) for v in said[key].values())
        for key, kind in tables.items()
    )
    whole = whole and all(
        isinstance(claim.get("verdict"), str)
        and claim["verdict"] in Verdict.__members__
        and isinstance(claim.get("moves"), list)
        for claim in said.get("linears", {}).values()
    )
    if not (
        whole and isinstance(said.get("verdict"), str) and isinstance(said.get("source"), dict)
    ):
        raise QplugError("a certificate without its parts", CERTIFICATE, "a whole one", REPAIR)
    return said


def _each(claims: Mapping[str, Any], one: Any, found: Checked, progress: Progress | None) -> None:
    """Check every linear on workers."""
    with workers() as pool:
        for n, (module, problems) in enumerate(zip(claims, pool.map(one, claims), strict=True), 1):
            found.problems += [f"{module}: {problem}" for problem in problems]
            if progress is not None:
                progress(n, len(claims), module)


def _check_files(
    checkpoint: Checkpoint, said: Mapping[str, dict[str, Any]], found: Checked
) -> None:
    """Compare sizes and hashes of files; of shards those of their headers."""
    there = set(checkpoint.source.names())
    for name, facts in said.items():
        if plain(name) not in there:
            found.problems.append(f"{name}: not there")
            continue
        path = checkpoint.source.path(name)
        found.files += 1
        if checkpoint.source.size(name) != facts.get("size"):
            found.problems.append(
                f"{name}: {checkpoint.source.size(name)} bytes, not {facts.get('size')}"
            )
        elif "header_sha256" in facts:
            with path.open("rb") as file:
                first = file.read(8)
                head = first + file.read(int.from_bytes(first, "little"))
            if hashlib.sha256(head).hexdigest() != facts["header_sha256"]:
                found.problems.append(f"{name}: the header is another one")
        elif sha256_of(path) != facts.get("sha256"):
            found.problems.append(f"{name}: the bytes differ")
    more = sorted(there - said.keys() - {CERTIFICATE, *UNCERTIFIED})
    found.notes += [f"{name}: not in the certificate" for name in more]
    shards = {shard.name for shard in checkpoint.shards}
    found.problems += [f"{name}: not in the certificate" for name in sorted(shards - said.keys())]


def _check_tensors(checkpoint: Checkpoint, said: Mapping[str, str], found: Checked) -> None:
    """Compare the hashes of tensors that were carried along."""
    for name, expected in said.items():
        if name not in checkpoint.headers:
            found.problems.append(f"{name}: not there")
            continue
        found.tensors += 1
        if blake3(checkpoint.raw(name)).hexdigest() != expected:
            found.problems.append(f"{name}: the bytes differ")


def _check_linear(side: Side, module: str, claim: Mapping[str, Any]) -> list[str]:
    """Return what of a linear is not as the certificate says."""
    scheme = side.scheme(module)
    if scheme is None:
        return _check_dense(side.checkpoint, f"{module}.weight", claim)
    layout = side.layouts[module]
    made = _hashed(side, Step(module, Verdict.COPIED, scheme, scheme))
    problems = [] if made["blake3"] == claim.get("blake3") else ["other numbers"]
    if claim["verdict"] == Verdict.COPIED.name:
        same = made["stored_blake3"] == claim.get("stored_blake3")
        return problems if same or problems else ["other bytes"]
    return problems or list(_idle_bits(side.checkpoint, layout, scheme, module))


def _check_dense(checkpoint: Checkpoint, name: str, claim: Mapping[str, Any]) -> list[str]:
    if name not in checkpoint.headers:
        return ["not there"]
    found = LinearHash(0)
    found.dense(checkpoint.tensor(name), checkpoint.headers[name].dtype)
    return [] if found.hexdigest() == claim.get("blake3") else ["other weights"]


def _hashed(side: Side, step: Step, after: Side | None = None, by: str = "") -> dict[str, Any]:
    """Return what a certificate says of a linear that goes by `step`; nothing is written.

    It then lies as in `after`, its rows in the order of the linear `by`.
    """
    layout = side.layouts[step.module]
    places = side.checkpoint.locations
    reads = {part.name: places[f"{step.module}.{part.name}"] for part in layout}
    target = layout if after is None else after.layouts[step.module]
    order = None
    if by and (part := side.layouts[by].part(Holds.G_IDX)) is not None:
        order = places[f"{by}.{part.name}"]
    linear = Linear(step, layout, target, reads, order=order)
    return Conversion(linear, Maps(), Nowhere(), Scratch(), None).run()


def _idle_bits(
    checkpoint: Checkpoint, layout: Layout, scheme: Scheme, module: str
) -> Iterator[str]:
    """Yield the parts that hold bits which mean nothing, and are not what qplug writes."""
    sizes = scheme.sizes
    for part in layout:
        if part.holds is Holds.CODES and form(part, scheme.in_features) is not None:
            continue  # every bit is one of a code
        stored = checkpoint.tensor(f"{module}.{part.name}")
        if part.holds is Holds.CONSTANT:
            same = bytes_of(stored) == bytes_of(constant(part))
        else:
            same = all(
                bytes_of(some) == bytes_of(pack_part(part, unpack_part(part, some, few)))
                for some, few in _blocks(part, stored, sizes, layout)
            )
        if not same:
            yield f"bits of {part.name} that mean nothing are set"


def _blocks(
    part: Part, stored: torch.Tensor, sizes: Mapping[str, int], layout: Layout
) -> Iterator[tuple[torch.Tensor, dict[str, int]]]:
    """Yield blocks of output rows of a stored tensor, with their sizes."""
    if part.span(sizes, 0, sizes["out"]) is None or "block" in sizes:
        yield stored, dict(sizes)
        return
    step = layout.row_step(sizes)
    rows = max(step, (1 << 22) // sizes["inp"] // step * step)
    for start in range(0, sizes["out"], rows):
        stop = min(start + rows, sizes["out"])
        yield rows_of(part, stored, sizes, start, stop), {**sizes, "out": stop - start}


# With the source ---------------------------------------------------------------------------------


def _check_source(
    side: Side,
    source: Checkpoint,
    said: Mapping[str, Any],
    found: Checked,
    progress: Progress | None,
) -> None:
    """Compare with the source, and hold the certificate's claims against it."""
    source.source.need([shard.name for shard in source.shards])
    before = Side.of(source)
    facts = said["source"]
    sizes = {shard.name: source.source.size(shard.name) for shard in source.shards}
    known = facts.get("sha256")
    hashes = source_hashes(source)
    other = isinstance(known, dict) and any(known.get(n, h) != h for n, h in hashes.items())
    if facts.get("files") != sizes or other:
        found.problems.append("the source: other files than the certificate names")
        return
    name = before.format.name if before.format is not None else "dense"
    if facts.get("format") != name:
        found.problems.append(f"the source: format {name}, not {facts.get('format')}")
    found.proof = proof = verify(source, side.checkpoint, progress=progress)
    found.problems += [f"against the source: {problem}" for problem in proof.problems]
    claims: Mapping[str, dict[str, Any]] = said["linears"]
    for report in proof.linears:
        claim = claims.get(report.module, {"verdict": Verdict.EXACT.name})
        if report.verdict > max(Verdict[claim["verdict"]], Verdict.EXACT):
            found.problems.append(
                f"{report.module}: the certificate says {claim['verdict']}, and it is "
                f"{report.verdict.name}"
            )
    worst = max((Verdict[c["verdict"]] for c in claims.values()), default=Verdict.COPIED)
    if said["verdict"] != worst.name:
        found.problems.append(f"{said['verdict']} in the certificate, {worst.name} in its linears")
    quantized = {module: claim for module, claim in claims.items() if module in before.layouts}
    if before.layouts:
        found.problems += [
            f"{m}: not quantized in the source" for m in claims if m not in quantized
        ]
    _each(quantized, lambda m: _check_claim(before, side, m, quantized[m]), found, progress)


def _check_claim(before: Side, after: Side, module: str, claim: Mapping[str, Any]) -> list[str]:
    """Make again from the source what the certificate says was done."""
    scheme = before.scheme(module)
    assert scheme is not None
    problems = []
    if claim.get("from") != scheme.describe() or claim.get("zero_rule") != scheme.zero_rule:
        problems.append(f"the source is {scheme.describe()}, rule {scheme.zero_rule}")
    verdict = Verdict[claim["verdict"]]
    untouched = _hashed(before, Step(module, Verdict.COPIED, scheme, scheme))
    if claim.get("source_blake3", claim.get("blake3")) != untouched["blake3"] and not claim.get(
        "rows_from"
    ):
        problems.append("the source has other numbers")
    if verdict is Verdict.COPIED and claim.get("stored_blake3") != untouched["stored_blake3"]:
        problems.append("the source has other bytes")
    goal = after.scheme(module)
    if problems or goal is None or verdict is Verdict.REQUANTIZED:
        return problems
    moves = []
    for text in claim["moves"]:
        name, known, argument = _move(text)
        if not known:
            return [f"no move is called {name}"]
        moves.append(Move(name, argument))
    by = claim.get("rows_from", "")
    if not moves and not by and goal.out_features == scheme.out_features:
        return problems if "source_blake3" not in claim else ["a change without a move"]
    if by and by not in before.layouts:
        return ["rows in the order of no linear"]
    try:
        made = _hashed(before, Step(module, verdict, scheme, goal, tuple(moves)), after, by)
    except QplugError as error:
        return [f"the moves do not fit ({error})"]
    return problems if made["blake3"] == claim["blake3"] else ["the moves give other numbers"]


def _move(text: object) -> tuple[str, bool, int | str]:
    """Read `widen(4)`: the name, whether it is one, and the argument."""
    match = re.fullmatch(r"(\w+)\((.*)\)", text) if isinstance(text, str) else None
    if match is None:
        return repr(text), False, 0
    argument = int(match[2]) if match[2].isascii() and match[2].isdecimal() else match[2]
    return match[1], match[1] in MOVES, argument
