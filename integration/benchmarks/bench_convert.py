"""How fast a checkpoint is converted, beside `cp` followed by `sync` of the same folder.

    python integration/benchmarks/bench_convert.py MODEL [--json]

MODEL is a dense checkpoint; GPTQ and AWQ checkpoints are made of it first. All rows read from the
page cache and end with their output on the disk, and take turns, best of several. A wide linear
(14336 x 4096, eight of them) shows what bounds large models, where Python is no longer the cost.

The budget is 0.5x of `cp` and `sync`. What is short of it is said and fails nothing: the number
depends on how fast the disk is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qplug.quantizers import QUANTIZERS, quantize
from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.execute import execute
from qplug_converters.plan import make_plan
from qplug_converters.survey import survey
from qplug_converters.verify import verify

BUDGET = 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """One job on one folder: best seconds, MB/s of the source, and cp + sync's over its own."""

    model: str
    job: str
    seconds: float
    megabytes_per_second: float
    cp_ratio: float


def size(folder: Path) -> int:
    """Return the bytes of a folder."""
    return sum(p.stat().st_size for p in folder.iterdir())


def cp(source: Path, target: Path) -> None:
    """Copy a folder and wait until it is on the disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *sorted(target.iterdir())], check=True)


def convert(source: Path, target: Path, to: str) -> None:
    """Open, survey, plan and execute, as `qplug convert` does."""
    checkpoint = open_checkpoint(source)
    found, model = checkpoint.scheme()
    plan = make_plan(found, survey(checkpoint, found, model), formats.find(to))
    execute(plan, checkpoint, target)


def prove(one: Path, two: Path) -> None:
    """Compare every weight."""
    if not verify(open_checkpoint(one), open_checkpoint(two)).same:
        raise SystemExit(f"{one} and {two} differ")


def wide(folder: Path) -> None:
    """Write a dense checkpoint of eight linears of 14336 x 4096 in float16."""
    from safetensors.torch import save_file

    folder.mkdir()
    weight = torch.randn(14336, 4096, dtype=torch.float32).half()
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(8)]
    save_file({n: weight.clone() for n in names}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def measure(name: str, dense: Path, work: Path, rounds: int) -> list[Row]:
    """Time every job on one model."""
    gptq, awq = work / f"{name}-gptq", work / f"{name}-awq"
    quantize(
        open_checkpoint(dense), gptq, formats.find("gptq"), QUANTIZERS["rtn"],
        bits=4, group_size=64, sym=False,
    )  # fmt: skip
    convert(gptq, awq, "awq")
    prove(gptq, awq)
    target = work / "target"
    jobs: dict[str, Callable[[], None]] = {
        "cp + sync": lambda: cp(gptq, target),
        "gptq to awq": lambda: convert(gptq, target, "awq"),
        "awq to gptq": lambda: convert(awq, target, "gptq"),
        "gptq to gptq_v2": lambda: convert(gptq, target, "gptq_v2"),
        "gptq to canonical": lambda: convert(gptq, target, "canonical"),
        "canonical way to awq": lambda: without_direct_route(gptq, target),
        "verify gptq awq": lambda: prove(gptq, awq),
    }
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for job, run in jobs.items():
            os.sync()
            start = time.perf_counter()
            run()
            best[job] = min(best[job], time.perf_counter() - start)
            shutil.rmtree(target, ignore_errors=True)
    base = best["cp + sync"]
    return [Row(name, j, s, size(gptq) / s / 1e6, base / s) for j, s in best.items()]


def without_direct_route(source: Path, target: Path) -> None:
    """Convert to AWQ by unpacking and packing every code: what the direct route saves."""
    from qplug_converters import conversion

    form = conversion.form
    conversion.form = lambda part, in_features: None
    try:
        convert(source, target, "awq")
    finally:
        conversion.form = form


def short(rows: list[Row]) -> list[str]:
    """Return the conversions that are short of the budget; the slow way round has none."""
    return [
        f"{row.model}, {row.job}: {row.cp_ratio:.2f}x"
        for row in rows
        if " to " in row.job and not row.job.startswith("canonical way") and row.cp_ratio < BUDGET
    ]


def main() -> None:
    """Print the table, or with `--json` the same as JSON."""
    parser = argparse.ArgumentParser(description="Benchmark conversions against cp and sync.")
    parser.add_argument("model", type=Path, help="a dense checkpoint")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=None, help="where to write (one disk)")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        wide(work / "wide")
        rows = measure(options.model.name, options.model, work, options.rounds)
        rows += measure("wide", work / "wide", work, options.rounds)
    if options.json:
        found = {"budget": BUDGET, "short": short(rows), "rows": [asdict(row) for row in rows]}
        print(json.dumps(found, indent=2))
        return
    print(f"{'':20}{'':24}{'s':>8}{'MB/s':>8}{'x cp':>8}")
    for row in rows:
        print(
            f"{row.model:20}{row.job:24}{row.seconds:8.2f}{row.megabytes_per_second:8.0f}"
            f"{row.cp_ratio:8.2f}"
        )
    for line in short(rows):
        print(f"short of {BUDGET}x: {line}")
    if not short(rows):
        print(f"met: every conversion >= {BUDGET}x cp + sync")


if __name__ == "__main__":
    main()
