"""How fast packed words become codes and back, beside `clone()` of the codes in the same run.

    python integration/benchmarks/bench_packing.py [--json]

The matrix is a down_proj of 14336 x 4096 (58.7 M codes, outside any second-level cache). Every row
is the best of many calls; the rows take turns, so that a machine shared with others slows all of
them alike, and the ratio to `clone()` is the number to compare. Results are fresh tensors, as the
clone is: most of the clone's time is the kernel's, which clears new pages. `into` rows write into
a tensor that exists, as a conversion does with its output file. Nothing is unpacked for the direct
route, which runs on one thread; its GB/s are of packed words.

Bars: 4 bits at 0.25x of the clone, packing and unpacking, each into a fresh tensor. The exit code
is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qplug_converters.tiles import Form, Kind, translate
from qplug_converters.words import pack, unpack

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BAR = 0.25
BARRED = ("gptq 4-bit unpack", "gptq 4-bit pack", "awq 4-bit unpack", "awq 4-bit pack")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured call: best seconds, rates, and the clone's seconds over its own."""

    name: str
    seconds: float
    codes_per_second: float
    gigabytes_per_second: float
    clone_ratio: float


def cases(out_features: int, in_features: int) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Return, by name, (bytes that the rate counts, what to call)."""
    shape = out_features, in_features
    nibbles = torch.randint(0, 16, shape, dtype=torch.uint8)
    spare = torch.zeros_like(nibbles)
    found: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "clone": (nibbles.nbytes, nibbles.clone),
    }

    def add(name: str, codes: Tensor, bits: int, flags: dict[str, object], n: int) -> Tensor:
        words = pack(codes, bits, **flags)
        if not torch.equal(unpack(words, bits, n, **flags), codes):
            raise SystemExit(f"{name}: unpack(pack(codes)) differs from codes")
        into = torch.zeros_like(words)
        size = codes.nbytes
        found[f"{name} unpack"] = size, lambda: unpack(words, bits, n, **flags)
        found[f"{name} pack"] = size, lambda: pack(codes, bits, **flags)
        found[f"{name} unpack into"] = size, lambda: unpack(words, bits, n, **flags, out=spare)
        found[f"{name} pack into"] = size, lambda: pack(codes, bits, **flags, out=into)
        return words

    for bits in (2, 3, 4, 8):
        codes = nibbles if bits == 4 else torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        down = add(f"gptq {bits}-bit", codes, bits, {"transposed": True}, in_features)
        if bits == 4:
            gptq = down
    flags = {"transposed": False, "codes_transposed": True, "order": AWQ_ORDER}
    awq = add("awq 4-bit", nibbles, 4, flags, out_features)

    columns, tiled = Form(Kind.COLUMNS), Form(Kind.TILES, AWQ_ORDER)
    for name, one, two, source, target in (
        ("gptq to awq", columns, tiled, gptq, awq),
        ("awq to gptq", tiled, columns, awq, gptq),
    ):
        out = torch.zeros_like(target)

        def direct(
            one: Form = one, two: Form = two, source: Tensor = source, out: Tensor = out
        ) -> Tensor:
            translate(one, two, source, out, out_features)
            return out

        if not torch.equal(direct(), target):
            raise SystemExit(f"{name}: the direct route differs from unpack and pack")
        found[f"direct {name} into"] = source.nbytes, direct
    return found


def measure(out_features: int, in_features: int, rounds: int) -> list[Row]:
    """Call everything in turn, `rounds` times, and keep each one's best."""
    todo = cases(out_features, in_features)
    best = dict.fromkeys(todo, float("inf"))
    for _ in range(rounds):
        for name, (_, call) in todo.items():
            start = time.perf_counter()
            result = call()
            best[name] = min(best[name], time.perf_counter() - start)
            del result
    codes = out_features * in_features
    return [
        Row(
            name,
            best[name],
            codes / best[name],
            size / best[name] / 1e9,
            best["clone"] / best[name],
        )
        for name, (size, _) in todo.items()
    ]


def bars(rows: list[Row]) -> list[dict[str, object]]:
    """Compare with what was promised."""
    at = {row.name: row.clone_ratio for row in rows}
    return [
        {"bar": f"{n} >= {BAR}x clone", "found": round(at[n], 3), "met": at[n] >= BAR}
        for n in BARRED
    ]


def main() -> int:
    """Print the table, or with `--json` the same rows as JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Benchmark packing of codes.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out-features", type=int, default=14336)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15, help="calls of each, of which the best")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = measure(options.out_features, options.in_features, options.rounds)
    found = bars(rows)
    missed = int(not all(bar["met"] for bar in found))
    if options.json:
        head = {"torch": torch.__version__, "threads": options.threads}
        shape = [options.out_features, options.in_features]
        table = {"rows": [asdict(row) for row in rows], "bars": found}
        print(json.dumps({**head, "shape": shape, **table}, indent=2))
        return missed
    print(f"{'':28}{'ms':>8}{'G codes/s':>12}{'GB/s':>8}{'x clone':>9}")
    for row in rows:
        rates = f"{row.codes_per_second / 1e9:12.2f}{row.gigabytes_per_second:8.2f}"
        print(f"{row.name:28}{row.seconds * 1e3:8.1f}{rates}{row.clone_ratio:9.2f}")
    for bar in found:
        print(f"{'met' if bar['met'] else 'MISSED'}: {bar['bar']}: {bar['found']}x")
    return missed


if __name__ == "__main__":
    sys.exit(main())
