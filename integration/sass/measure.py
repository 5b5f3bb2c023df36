"""What a listing of machine code says about the main loop of a matmul.

The main loop is the innermost loop with the most matrix instructions. A loop is a branch back to an
instruction that every way to the branch passes: compilers place blocks that are rarely run behind
the end of the program, and their jumps back are none. What they placed there is not counted.
Weights are what a line of the source loads from `w` or `words`. Standard library only, no engine,
no GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SASS = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)(?P<rest>[^;]*)"
)
_SASS_LABEL = re.compile(r"^(\.L_\w+):")
_SASS_TARGET = re.compile(r"^(.*)`\((\.L_\w+)\)")
# Lines of inline assembly begin at column 0, all others with a tab.
_AMD = re.compile(
    r"^\s*(?P<guard>)(?P<op>(?:v|s|ds|global|buffer|flat|scratch)_\w+)(?P<rest>[^;]*)"
)
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_TARGET = re.compile(r"^()(\.LBB\w+)")
_BRANCH = re.compile(r"(?:BRA|CALL|JMP|s_branch|s_cbranch)")
_END = re.compile(r"(?:EXIT|RET|s_endpgm)\b")
_SOURCE = re.compile(r"^//## [\w.]+:\d+: (.*)")
_WEIGHTS = re.compile(r"\btl\.load\(w(?:ords)?\b")
_MMA = re.compile(r"[A-Z]*MMA\b|v_(?:s?mfma|wmma)_")
_SHAPE_HMMA = re.compile(r"HMMA\.(?:SP\.)?16(8)(8|16)\b")
_SHAPE_HGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)\b")
_SHAPE_AMD = re.compile(r"_(\d+)x(\d+)x(\d+)")
_INT_TO_FLOAT = re.compile(r"I2F|F2F\b|v_cvt_(?:pk_)?f(?:16|32|64)_(?:[iu]\d|ubyte)")
_SPILL = re.compile(r"LDL|STL|scratch_")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_COPY = re.compile(r"LDGSTS\b")
_LOAD = re.compile(r"LDG\b")
_AMD_LOAD = re.compile(r"(?:global|buffer|flat)_load_")
_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


class NoLoop(Exception):
    """A listing without a loop that holds matrix instructions."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    op
        Its name with all suffixes.
    source
        Its line of the source.
    target
        The label that it branches to.
    goes_on
        Whether the next instruction may follow it.
    """

    op: str
    source: str
    target: str | None
    goes_on: bool


@dataclass(frozen=True, slots=True)
class Code:
    """Instructions of a kernel in order, and at which of them each label stands."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def count(self, found: Callable[[str], object]) -> int:
        """Return how many names of instructions `found` says something of."""
        return sum(1 for one in self.instructions if found(one.op))


@dataclass(frozen=True, slots=True)
class Loop:
    """What is counted in the main loop of a kernel, or in all of one that has none.

    Attributes
    ----------
    instructions
        Without NOP.
    vector
        Of these, on AMD, those of the vector and matrix units; else all.
    matrix
        Matrix instructions.
    kind
        Name of the matrix instruction, e.g. `HMMA.16816.F32`.
    macs
        Multiplications of matrix instructions, of one warp; 0 where the name does not tell
        (tcgen05).
    copies
        Bytes of weights that a thread copies to shared memory asynchronously, by bytes at a time.
    loads
        Bytes of weights that a thread loads into registers, by bytes at a time; of a whole kernel,
        bytes of anything: Triton 3.9 gives loads outside a loop to other lines.
    conversions
        From integers to floats, or between floats through the slow unit.
    permutes
        PRMT, v_perm.
    shared_stores
        STS, ds_write.
    """

    instructions: int
    vector: int
    matrix: int
    kind: str
    macs: int
    copies: dict[int, int]
    loads: dict[int, int]
    conversions: int
    permutes: int
    shared_stores: int


def parse(listing: str) -> Code:
    """Read what `nvdisasm -c` or the AMD compiler prints."""
    amd = ".amdgcn_target" in listing
    line_of, label_of, target_of = (
        (_AMD, _AMD_LABEL, _AMD_TARGET) if amd else (_SASS, _SASS_LABEL, _SASS_TARGET)
    )
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ""
    for line in listing.splitlines():
        if place := _SOURCE.match(line):
            source = place[1]
        elif label := label_of.match(line):
            labels[label[1]] = len(instructions)
        elif found := line_of.match(line):
            op, rest = found["op"], found["rest"].strip()
            branch = target_of.match(rest) if _BRANCH.match(op) else None
            always = (branch and not branch[1].strip()) or _END.match(op)
            conditional = found["guard"] or op.startswith("s_cbranch")
            instructions.append(
                Instruction(
                    op, source, branch[2] if branch else None, bool(conditional or not always)
                )
            )
    return Code(tuple(instructions), labels)


def _next(code: Code, at: int) -> Iterator[int]:
    """Yield where a program may be after the instruction `at`."""
    one = code.instructions[at]
    if one.goes_on and at + 1 < len(code.instructions):
        yield at + 1
    if one.target in code.labels:
        yield code.labels[one.target]


def _reached(code: Code, start: int, without: int) -> set[int]:
    """Return the instructions that are reached from one without passing another."""
    seen, todo = {without}, [start]
    while todo:
        at = todo.pop()
        if at not in seen:
            seen.add(at)
            todo += _next(code, at)
    return seen - {without}


def _loops(code: Code) -> Iterator[list[int]]:
    """Yield the instructions of each loop, from its head to its branch back."""
    before: dict[int, list[int]] = {}
    for at in range(len(code.instructions)):
        for after in _next(code, at):
            before.setdefault(after, []).append(at)
    for at, one in enumerate(code.instructions):
        head = code.labels.get(one.target or "", at + 1)
        if head > at or (head > 0 and at in _reached(code, 0, head)):
            continue
        inside, todo = {head}, [at]
        while todo:
            here = todo.pop()
            if here not in inside:
                inside.add(here)
                todo += before.get(here, [])
        yield sorted(n for n in inside if head <= n <= at)


def main_loop(code: Code) -> Code:
    """Return the innermost loop with the most matrix instructions.

    Raises
    ------
    NoLoop
        If no loop has any.
    """
    loops = []
    for places in _loops(code):
        inside = Code(tuple(code.instructions[n] for n in places), {})
        if matrix := inside.count(_MMA.match):
            loops.append((matrix, set(places), inside))
    innermost = [
        (matrix, -len(places), inside)
        for matrix, places, inside in loops
        if not any(other < places for _, other, _ in loops)
    ]
    if not innermost:
        raise NoLoop("no loop has a matrix instruction")
    return max(innermost, key=lambda found: found[:2])[2]


def _macs(op: str) -> int:
    """Return the multiplications one warp does by a matrix instruction."""
    if shape := _SHAPE_HMMA.search(op):
        return 16 * 8 * int(shape[2])
    if shape := _SHAPE_HGMMA.search(op):
        return 64 * int(shape[1]) * int(shape[2]) // 4
    if op.startswith("v_") and (shape := _SHAPE_AMD.search(op)):
        return int(shape[1]) * int(shape[2]) * int(shape[3])
    return 0


def _width(op: str) -> int:
    """Return the bytes of e.g. `LDG.E.128`, `LDGSTS.E`."""
    return next((_WIDTHS[part] for part in op.split(".") if part in _WIDTHS), 4)


def _amd_width(op: str) -> int:
    """Return the bytes of e.g. `global_load_dwordx4`, `buffer_load_ushort`."""
    kind = op.split("_load_")[1]
    return _AMD_WIDTHS.get(kind, 2 if "short" in kind else 1)


def _moved(
    loop: Code, name: re.Pattern[str], width_of: Callable[[str], int], whole: bool
) -> dict[int, int]:
    """Return the bytes of weights that instructions of a name move, by bytes at a time."""
    moved: dict[int, int] = {}
    for one in loop.instructions:
        if name.match(one.op) and (whole or _WEIGHTS.search(one.source)):
            width = width_of(one.op)
            moved[width] = moved.get(width, 0) + width
    return moved


def spills(code: Code) -> int:
    """Return how many instructions of a kernel, in its loop or not, go to the stack."""
    return code.count(_SPILL.match)


def lines(listing: str) -> list[tuple[str, Counter[str]]]:
    """Return the lines of the source that the main loop comes from, each with its instructions.

    The line of most instructions comes first. What the compiler moves keeps its line, what it makes
    of several has one of them.
    """
    found: dict[str, Counter[str]] = {}
    for one in main_loop(parse(listing)).instructions:
        found.setdefault(one.source, Counter())[one.op.split(".")[0]] += 1
    return sorted(found.items(), key=lambda line: -line[1].total())


def measure(listing: str, whole: bool = False) -> Loop:
    """Count what the gate asks of the main loop of a listing, or of the whole of it.

    Raises
    ------
    NoLoop
        If the main loop is asked for, and no loop has a matrix instruction.
    """
    code = parse(listing)
    loop = code if whole else main_loop(code)
    amd = ".amdgcn_target" in listing
    matrix = [one.op for one in loop.instructions if _MMA.match(one.op)]
    instructions = loop.count(lambda op: op not in ("NOP", "s_nop"))
    return Loop(
        instructions=instructions,
        vector=loop.count(lambda op: op.startswith("v_")) if amd else instructions,
        matrix=len(matrix),
        kind=max(matrix, key=matrix.count, default=""),
        macs=sum(map(_macs, matrix)),
        copies=_moved(loop, _COPY, _width, whole),
        loads=(
            _moved(loop, _AMD_LOAD, _amd_width, whole)
            if amd
            else _moved(loop, _LOAD, _width, whole)
        ),
        conversions=loop.count(_INT_TO_FLOAT.match),
        permutes=loop.count(lambda op: op.startswith(("PRMT", "v_perm_"))),
        shared_stores=loop.count(lambda op: op.startswith(("STS", "ds_write", "ds_store"))),
    )
