"""How fast a checkpoint is converted, beside `cp` followed by `sync` of the same folder.

    python integration/benchmarks/bench_convert.py [MODEL ...] [--json]

The first folder is made here: a GPTQ checkpoint of more than 1 GB with the shapes of an 8B Llama.
A MODEL is a dense checkpoint (small linears, where Python is the cost); it is quantized first. All
rows read from the page cache and end with their output on the disk, certificate included, and take
turns, best of several, so that a machine shared with others slows all of them alike. `cpu` is the
processor time of the best turn, of all threads: with cp's own it tells what a busy machine hides.
compressed-tensors' own converter of AWQ folders is the peer, where `make peers` has made its
environment: one turn, and no count of its processor time.
The memory is the most that one conversion, in a process of its own, holds beside mapped files,
above `import torch`.

The budget is 0.5x of `cp` and `sync`. What is short of it is said and fails nothing: the number
depends on how fast the disk is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.append(str(Path(__file__).parents[1] / "peers"))
from peers import compressed_tensors_from_awq

from qplug.quantizers import QUANTIZERS, quantize
from qplug_converters import formats
from qplug_converters.check import check
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.execute import execute
from qplug_converters.plan import make_plan
from qplug_converters.survey import survey
from qplug_converters.verify import verify

BUDGET = 0.5
HIDDEN, INNER, KEYS, LAYERS, VOCABULARY, GROUP = 4096, 14336, 1024, 8, 32000, 128
"""Of an 8B Llama, with fewer layers and a smaller vocabulary."""
MOVES = (
    ("gptq", "awq"),
    ("awq", "gptq"),
    ("gptq", "gptq_v2"),
    ("gptq", "canonical"),
    ("gptq", "compressed-tensors"),
    ("compressed-tensors", "awq"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One job on one folder, at its best.

    Seconds, processor seconds, MB/s of the source, and cp + sync's seconds over its own.
    """

    model: str
    job: str
    seconds: float
    cpu: float
    megabytes_per_second: float
    cp_ratio: float


def size(folder: Path) -> int:
    """Return the bytes of a folder."""
    return sum(p.stat().st_size for p in folder.iterdir())


def cp(source: Path, target: Path, *, sync: bool = True) -> None:
    """Copy a folder, and with `sync` wait until it is on the disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    if sync:
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


def certified(folder: Path) -> None:
    """Check a folder against its certificate."""
    if problems := check(open_checkpoint(folder)).problems:
        raise SystemExit(f"{folder}: {problems[0]}")


def synthetic(folder: Path) -> Path:
    """Write a GPTQ v1 checkpoint of random codes and zeros, scales of 0.001 to 0.011."""
    from qplug_converters.layout import TensorSpec
    from qplug_converters.writer import ShardFile

    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KEYS),
        "self_attn.v_proj": (HIDDEN, KEYS), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER),
        "mlp.down_proj": (INNER, HIDDEN),
    }  # fmt: skip
    specs = {"model.embed_tokens.weight": TensorSpec("F16", (VOCABULARY, HIDDEN))}
    for layer in range(LAYERS):
        for name, (inp, out) in shapes.items():
            module = f"model.layers.{layer}.{name}"
            specs[f"{module}.g_idx"] = TensorSpec("I32", (inp,))
            specs[f"{module}.qweight"] = TensorSpec("I32", (inp // 8, out))
            specs[f"{module}.qzeros"] = TensorSpec("I32", (inp // GROUP, out // 8))
            specs[f"{module}.scales"] = TensorSpec("F16", (inp // GROUP, out))
    folder.mkdir()
    shard = ShardFile(folder / "model.safetensors", specs)
    shard.reserve()
    with shard:
        for name, spec in specs.items():
            if name.endswith("g_idx"):
                tensor = torch.arange(spec.shape[0], dtype=torch.int32) // GROUP
            elif spec.dtype == "F16":
                tensor = (torch.rand(spec.shape) / 100 + 0.001).half()
            else:
                tensor = torch.randint(-(2**31), 2**31 - 1, spec.shape, dtype=torch.int32)
                # Stored zeros of 0, 2, 4 and 6: 15 would be read in different ways.
                tensor = tensor & 0x66666666 if name.endswith("qzeros") else tensor
            shard.put(name, tensor)
        shard.sync()
    block = {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False,
    }  # fmt: skip
    config = {"model_type": "llama", "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantized(dense: Path, folder: Path) -> Path:
    """Quantize a dense checkpoint."""
    quantize(
        open_checkpoint(dense), folder, formats.find("gptq"), QUANTIZERS["rtn"],
        bits=4, group_size=64, sym=False,
    )  # fmt: skip
    return folder


def measure(name: str, gptq: Path, work: Path, rounds: int) -> list[Row]:
    """Time every job on one model."""
    sources = {"gptq": gptq}
    for to in ("awq", "compressed-tensors"):
        sources[to] = work / f"{name}-{to}"
        convert(gptq, sources[to], to)
        prove(gptq, sources[to])
    target = work / "target"
    jobs: dict[str, Callable[[], None]] = {
        "cp": lambda: cp(gptq, target, sync=False),
        "cp + sync": lambda: cp(gptq, target),
    }
    for source, to in MOVES:
        jobs[f"{source} to {to}"] = lambda s=source, t=to: convert(sources[s], target, t)
    jobs["unpacked to awq"] = lambda: without_row_words(gptq, target)
    jobs["verify gptq awq"] = lambda: prove(gptq, sources["awq"])
    jobs["verify the awq's certificate"] = lambda: certified(sources["awq"])
    best = dict.fromkeys(jobs, (float("inf"), 0.0))
    for _ in range(rounds):
        for job, run in jobs.items():
            os.sync()
            before, start = os.times(), time.perf_counter()
            run()
            seconds, after = time.perf_counter() - start, os.times()
            best[job] = min(best[job], (seconds, sum(after[:4]) - sum(before[:4])))
            shutil.rmtree(target, ignore_errors=True)
    if (seconds := compressed_tensors_from_awq(sources["awq"], target)) is not None:
        best["peer: compressed-tensors, of awq"] = seconds, float("nan")
        shutil.rmtree(target)
    base = best["cp + sync"][0]
    return [Row(name, j, s, c, size(gptq) / s / 1e6, base / s) for j, (s, c) in best.items()]


def memory(gptq: Path, target: Path) -> int:
    """Return the most anonymous memory of a conversion to AWQ, above `import torch`, in bytes."""
    qplug = Path(sys.executable).with_name("qplug")
    base = peak_anonymous([sys.executable, "-c", "import torch"])
    peak = peak_anonymous([str(qplug), "convert", str(gptq), str(target), "--to", "awq"])
    shutil.rmtree(target)
    return peak - base


def peak_anonymous(command: list[str]) -> int:
    """Run a command and return the highest RssAnon seen, in bytes, sampled every 5 ms."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        found = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        peak = max(peak, int(found[0].split()[1]) << 10 if found else 0)
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return peak


def without_row_words(source: Path, target: Path) -> None:
    """Convert to AWQ by unpacking and packing every code: what row words save."""
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
        if " to " in row.job and not row.job.startswith("unpacked") and row.cp_ratio < BUDGET
    ]


def main() -> None:
    """Print the table, or with `--json` the same as JSON."""
    parser = argparse.ArgumentParser(description="Benchmark conversions against cp and sync.")
    parser.add_argument("models", type=Path, nargs="*", help="dense checkpoints")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=None, help="where to write (one disk)")
    options = parser.parse_args()
    sizes: dict[str, int] = {}
    rows: list[Row] = []
    with TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        todo = {"8B, 8 layers": synthetic(work / "synthetic")}
        for model in options.models:
            todo[model.name] = quantized(model, work / model.name)
        for name, gptq in todo.items():
            sizes[name] = size(gptq)
            rows += measure(name.partition(",")[0], gptq, work, options.rounds)
        held = memory(todo["8B, 8 layers"], work / "target")
    if options.json:
        found = {
            "budget": BUDGET, "short": short(rows), "bytes": sizes, "anonymous_bytes": held,
            "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        print(json.dumps(found, indent=2))
        return
    for name, nbytes in sizes.items():
        print(f"{name}: {nbytes / 1e9:.2f} GB as gptq")
    print(f"{'':20}{'':32}{'s':>8}{'cpu s':>8}{'MB/s':>8}{'x cp':>8}")
    for row in rows:
        print(
            f"{row.model:20}{row.job:32}{row.seconds:8.2f}{row.cpu:8.2f}"
            f"{row.megabytes_per_second:8.0f}{row.cp_ratio:8.2f}"
        )
    print(f"anonymous memory of gptq to awq above import torch: {held / 2**20:.0f} MiB")
    for line in short(rows):
        print(f"short of {BUDGET}x: {line}")
    if not short(rows):
        print(f"met: every conversion >= {BUDGET}x cp + sync")


if __name__ == "__main__":
    main()
