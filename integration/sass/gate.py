"""Hold the machine code of every shipped kernel to stored limits; print a table.

    PYTHONPATH=integration python -m sass.gate [--triton pinned|installed] [TARGET...]

Both Tritons unless one is named, and their targets (`TARGETS`) unless some are. Exit code 1 if
anything is amiss. `--record` writes the counts that are lower than the stored limits, or new, into
limits.json; with `--raise` the higher ones too, which needs a measured reason in docs/log.md.
`--lines NAME` says from which lines of the source the instructions of a loop come.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import environment, measure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMITS = HERE / "limits.json"
PINNED = "3.6"
PYTHONS = {"pinned": environment.PYTHON, "installed": Path(sys.executable)}

TARGETS = {
    "pinned": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"),
    "installed": ("sm_80", "sm_90"),
}
"""What `make sass` compiles for; `make test` does it for the second."""

KB = 1024
SHARED = {
    "sm_80": 163 * KB, "sm_86": 99 * KB, "sm_89": 99 * KB, "sm_90": 227 * KB,
    "sm_100": 227 * KB, "sm_120": 99 * KB, "gfx942": 64 * KB,
}  # fmt: skip
"""Targets, and the shared memory that a block may have there. A kernel that asks for more compiles,
and fails to launch."""

HIGHEST = {
    ("int4", "fp16"): {"sm_80": 2.1, "sm_90": 2.0},
    ("int4", "bf16"): {"sm_80": 2.3, "sm_90": 2.3},
    ("int3", "fp16"): {"sm_80": 2.3, "sm_90": 2.2},
    ("int3", "bf16"): {"sm_80": 2.3, "sm_90": 2.2},
    ("int2", "fp16"): {"sm_80": 2.0, "sm_90": 1.95},
    ("int2", "bf16"): {"sm_80": 2.0, "sm_90": 1.95},
    ("int8", "fp16"): {"sm_80": 2.4, "sm_90": 2.4},
    ("int8", "bf16"): {"sm_80": 4.5, "sm_90": 4.5},
    ("rows", "fp16"): {"sm_80": 2.4, "sm_90": 2.4},
    ("rows", "bf16"): {"sm_80": 4.5, "sm_90": 4.5},
    ("nf4", "fp16"): {"sm_80": 4.5, "sm_90": 4.5},
    ("nf4", "bf16"): {"sm_80": 4.5, "sm_90": 4.5},
}
"""Instructions per weight that no stored limit may pass: at most 16 tokens, groups of 128 or more
(codebooks: 64), no gather in the loop, the pinned Triton."""

PINNED_BAND, BAND, UNKNOWN_BAND = 0.005, 0.05, 0.15
"""How far above its limit a count may be, as a part of it: rounding for the pinned Triton, a patch
release for one that has limits, anything but a broken kernel for one that has none yet."""

SPILLS = 4
"""Accesses to spilled registers in the loop that another Triton than the pinned one may write."""

STORES = 2
"""Stores to shared memory in the loop: scales that change their layout, never weights."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One kernel on one target: what was counted, and what is amiss."""

    row: dict[str, Any]
    loop: measure.Loop | None
    per_weight: float
    breaches: tuple[str, ...]


def compiled(
    which: str, archs: Iterable[str], module: str = "sass.shipped"
) -> list[dict[str, Any]]:
    """Return what `aot.py` says of the kernels of a module, with the Triton of an environment."""
    paths = [str(ROOT / folder) for folder in ("integration", "converters", "kernels")]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    variables |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    done = subprocess.run(
        [PYTHONS[which], "-m", "sass.aot", module, *archs],
        stdout=subprocess.PIPE, text=True, check=True, env=variables,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return sorted(rows, key=lambda row: (row["arch"], row["name"]))


def minor_of(row: dict[str, Any]) -> str:
    """Return e.g. `3.6` of the Triton that compiled a row."""
    return ".".join(row["triton"].split(".")[:2])


def limit_of(stored: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Return the highest count a kernel may have, the band of its Triton included."""
    minor = minor_of(row)
    band = PINNED_BAND if minor == PINNED else BAND
    if minor not in stored:
        minor = max(stored, key=lambda name: tuple(map(int, name.split("."))))
        band = UNKNOWN_BAND
    known = stored[minor].get(row["arch"], {}).get(row["name"])
    return None if known is None else float(known["instructions_per_weight"]) * (1 + band)


def _weights(row: dict[str, Any], loop: measure.Loop) -> int:
    """Return the weights that a pass of the loop multiplies, or that a block decodes."""
    if loop.macs == 0:
        return int(row["features"] * row["inputs"])
    return loop.macs * int(row["warps"]) // int(row["tokens"])


def _memory(row: dict[str, Any], loop: measure.Loop) -> Iterable[str]:
    """Say whether weights come otherwise than 16 bytes at a time, in loops past the registers."""
    expected = _weights(row, loop) * row["bits"] // 8 // threads(row)
    if not row["loop"]:
        if loop.loads.get(16, 0) < expected:
            yield f"loads of {_by_width(loop.loads)} of a thread, weights are {expected} bytes"
        return
    amd = row["arch"].startswith("gfx")
    found, other = (loop.loads, loop.copies) if amd else (loop.copies, loop.loads)
    what = ("loads", "asynchronous copies") if amd else ("asynchronous copies", "loads")
    if found != {16: expected}:
        yield f"{what[0]} of weights {_by_width(found)} of a thread, expected {expected} by 16"
    if other:
        yield f"{what[1]} of weights: {_by_width(other)} of a thread"


def _by_width(moved: dict[int, int]) -> str:
    parts = (f"{moved[width] // width} x {width} bytes" for width in sorted(moved))
    return " and ".join(parts) or "of 0 bytes"


def threads(row: dict[str, Any]) -> int:
    """Return the threads of a block."""
    return int(row["warps"]) * (64 if row["arch"].startswith("gfx") else 32)


def _judge_loop(row: dict[str, Any], loop: measure.Loop, limit: float | None) -> Iterable[str]:
    weights, tile = _weights(row, loop), row["features"] * row["inputs"]
    if weights == 0 or weights % tile:
        yield f"a pass of the loop multiplies {weights} weights, a tile has {tile}"
        return
    yield from _memory(row, loop)
    if loop.conversions and not row["codebook"]:
        yield f"{loop.conversions} conversions to floats"
    # Activations gathered in the loop (act order) change their layout.
    if row["arch"].startswith("sm_") and not row["gathers"]:
        permutes, most = loop.permutes * threads(row) / weights, permutes_allowed(row)
        if permutes > most:
            yield f"{permutes:.2f} PRMT per weight, at most {most}"
        if row["loop"] and loop.shared_stores > STORES:
            yield f"{loop.shared_stores} stores to shared memory, at most {STORES}"
    count = per_weight(row, loop)
    if limit is None:
        yield "no limit is stored: run `python -m sass.gate --record`"
    elif count > limit:
        yield f"{count:.3f} instructions per weight, at most {limit:.3f}"
    if minor_of(row) == PINNED:
        highest = ceiling(row)
        if highest is not None and round(count, 2) > highest:
            yield f"{count:.3f} instructions per weight, and no limit may pass {highest}"


def permutes_allowed(row: dict[str, Any]) -> float:
    """Return the PRMT per weight: lookups, or one for the zero of a column and group."""
    return 1.6 if row["codebook"] else 0.05 * max(1, 128 / row["group_size"])


def ceiling(row: dict[str, Any]) -> float | None:
    """Return what no limit of this kernel may pass."""
    smallest = 64 if row["codebook"] else 128
    if row["tokens"] > 16 or not row["loop"] or row["gathers"] or row["group_size"] < smallest:
        return None
    return HIGHEST.get((row["format"], row["dtype"]), {}).get(row["arch"])


def per_weight(row: dict[str, Any], loop: measure.Loop) -> float:
    """Return the instructions of a thread per weight in the main loop."""
    return loop.instructions * threads(row) / _weights(row, loop)


def _spills(row: dict[str, Any], listing: str) -> Iterable[str]:
    code = measure.parse(listing)
    spills = measure.spills(code)
    if spills and minor_of(row) == PINNED:
        yield f"{spills} accesses to spilled registers"
    elif spills:
        with contextlib.suppress(measure.NoLoop):
            spills = measure.spills(measure.main_loop(code))
        if spills > SPILLS:
            yield f"{spills} accesses to spilled registers, at most {SPILLS} in a loop"


def judge(row: dict[str, Any], limit: float | None) -> Finding:
    """Read the listing of a kernel and say what is amiss.

    Of a kernel without a main loop, the whole is counted; of one that reads no weights (0 bits),
    nothing.
    """
    if "error" in row:
        return Finding(row, None, 0.0, (f"does not compile: {row['error']}",))
    listing = Path(row["listing"]).read_text()
    breaches = list(_spills(row, listing))
    if row["shared"] > SHARED[row["arch"]]:
        breaches.append(f"{row['shared']} bytes of shared memory of {SHARED[row['arch']]}")
    loop, count = None, 0.0
    if row["bits"]:
        try:
            loop = measure.measure(listing, whole=not row["loop"])
        except measure.NoLoop as error:
            breaches.append(str(error))
        else:
            breaches += _judge_loop(row, loop, limit)
            count = per_weight(row, loop)
    return Finding(row, loop, count, tuple(breaches))


def findings(which: str, archs: Iterable[str]) -> list[Finding]:
    """Compile all shipped kernels for some targets and judge them; limits of nothing are amiss."""
    stored = json.loads(LIMITS.read_text())
    found = [judge(row, limit_of(stored, row)) for row in compiled(which, archs)]
    for arch in archs:
        shipped = {one.row["name"] for one in found if one.row["arch"] == arch}
        for name in sorted(set(stored.get(PINNED, {}).get(arch, {})) - shipped):
            row = {"name": name, "arch": arch, "triton": PINNED}
            found.append(Finding(row, None, 0.0, ("limits.json has it, and it is not shipped",)))
    return found


def table(found: Iterable[Finding]) -> str:
    """Return a line a kernel."""
    lines = [
        f"{'target':7} {'Triton':7} {'kernel':34} {'per weight':>10} {'registers':>9} "
        f"{'shared KB':>9} {'PRMT':>4} {'STS':>3}  matrix instruction"
    ]
    for one in found:
        row, loop = one.row, one.loop
        numbers = " " * 38
        if loop is not None:
            numbers = (
                f"{one.per_weight:10.3f} {row['registers']:9} {row['shared'] / KB:9.0f} "
                f"{loop.permutes:4} {loop.shared_stores:3}"
            )
        kind = "" if loop is None else f"{loop.matrix} {loop.kind}"
        lines.append(f"{row['arch']:7} {row['triton']:7} {row['name']:34} {numbers}  {kind}")
        lines += [f"        ! {breach}" for breach in one.breaches]
    return "\n".join(lines)


def lines(found: Iterable[Finding]) -> str:
    """Return from which lines of the source the instructions of each main loop come."""
    text = []
    for one in found:
        if one.loop is not None:
            text.append(f"{one.row['arch']} {one.row['triton']} {one.row['name']}")
            for source, counted in measure.lines(Path(one.row["listing"]).read_text()):
                kinds = " ".join(f"{n} {op}" for op, n in counted.most_common())
                text.append(f"{counted.total():5}  {source:90.90}  {kinds}")
    return "\n".join(text)


def record(found: Iterable[Finding], upwards: bool) -> None:
    """Store the counts as limits: lower ones, new ones, and higher ones if told to.

    Limits of what is no longer shipped are dropped.
    """
    stored = json.loads(LIMITS.read_text())
    shipped: dict[tuple[str, str], set[str]] = {}
    for one in found:
        if one.loop is None:
            continue
        minor, arch, name = minor_of(one.row), one.row["arch"], one.row["name"]
        shipped.setdefault((minor, arch), set()).add(name)
        of_target = stored.setdefault(minor, {}).setdefault(arch, {})
        known = of_target.get(name)
        count = round(one.per_weight, 3)
        if known is None or upwards or count <= known["instructions_per_weight"]:
            registers = one.row["registers"]
            of_target[name] = {"instructions_per_weight": count, "registers": registers}
        else:
            print(f"{arch} {name}: {count} above its limit; not stored")
    for (minor, arch), names in shipped.items():
        for name in set(stored[minor][arch]) - names:
            del stored[minor][arch][name]
    LIMITS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def main() -> int:
    """Judge, print, and record if asked."""
    parser = argparse.ArgumentParser(description="Hold machine code to stored limits.")
    parser.add_argument("archs", nargs="*", metavar="TARGET", help=f"of {', '.join(SHARED)}")
    parser.add_argument("--triton", choices=sorted(PYTHONS), help="both unless given")
    parser.add_argument("--lines", metavar="NAME", help="show where a kernel's loop comes from")
    parser.add_argument("--record", action="store_true", help="write limits.json")
    parser.add_argument("--raise", dest="upwards", action="store_true", help="higher limits too")
    options = parser.parse_args()
    unknown = set(options.archs) - set(SHARED)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}: {', '.join(SHARED)}")
    amiss = 0
    for which in [options.triton] if options.triton else PYTHONS:
        found = findings(which, options.archs or TARGETS[which])
        if options.lines:
            found = [one for one in found if one.row["name"] == options.lines]
        print(table(found), flush=True)
        if options.lines:
            print(lines(found))
        if options.record:
            record(found, options.upwards)
        amiss += sum(1 for one in found if one.breaches)
    print(f"{amiss} kernels with something amiss" if amiss else "all within their limits")
    return 1 if amiss else 0


if __name__ == "__main__":
    sys.exit(main())
