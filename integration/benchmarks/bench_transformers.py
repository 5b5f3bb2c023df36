"""How fast Transformers decodes one sequence at bfloat16: quantized through qplug, beside dense.

    python integration/benchmarks/bench_transformers.py QUANTIZED... [--dense DIR] [--json]

One thread. Each model reads the same prompt, then decodes token by token with a growing cache; the
models take turns at every step, so that a machine shared with others slows all of them alike. A
step's time is the processor time of this process; the best step counts. The ratio is dense's time
over the model's: above 1 is faster. `bytes/weight` is what the run-time packs of the quantized
linears hold in memory; the file's own tensors stay memory-mapped beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qplug.transformers.linear import QuantLinear

DENSE = Path("build/models/smollm2-dense")
BAR = 1.3
PROMPT = 32


@dataclass(frozen=True, slots=True)
class Row:
    """One model: best and median milliseconds a token, and dense's best over its own."""

    name: str
    best_ms: float
    median_ms: float
    ratio: float
    load_s: float
    kernels: tuple[str, ...]
    bytes_per_weight: float


def load(folder: Path) -> tuple[Any, float]:
    """Load a model at bfloat16; return it and the seconds that took."""
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model, time.perf_counter() - start


def decoding(model: Any, steps: int) -> Iterator[float]:
    """Read the prompt, then yield the milliseconds of each decoded token."""
    prompt = torch.arange(1, PROMPT + 1)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        found = model(prompt, use_cache=True)
        for _ in range(steps):
            token = found.logits[:, -1:].argmax(-1)
            start = time.process_time()
            found = model(token, past_key_values=found.past_key_values, use_cache=True)
            yield (time.process_time() - start) * 1e3


def packs(model: Any, dtype: torch.dtype) -> tuple[tuple[str, ...], float]:
    """Return the kernels of a model's linears and the bytes they hold per weight."""
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    if not linears:
        return (), float(dtype.itemsize)
    found = [m.prepare_for(dtype, torch.device("cpu")) for m in linears]
    weights = sum(m.in_features * m.out_features for m in linears)
    names = tuple(sorted({pack.kernel for pack in found}))
    return names, sum(pack.nbytes for pack in found) / weights


def measure(folders: dict[str, Path], steps: int) -> list[Row]:
    """Decode with all models in turns; the first one is the dense one."""
    loaded = {name: load(folder) for name, folder in folders.items()}
    runs = {name: decoding(model, steps) for name, (model, _) in loaded.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            times[name].append(next(run))
    dense = min(times[next(iter(times))])
    rows = []
    for name, (model, seconds) in loaded.items():
        kernels, held = packs(model, torch.bfloat16)
        best, median = min(times[name]), sorted(times[name])[steps // 2]
        rows.append(Row(name, best, median, dense / best, seconds, kernels, held))
    return rows


def main() -> int:
    """Print the table; 1 if a quantized model misses the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("quantized", nargs="+", type=Path, help="folders of quantized models")
    parser.add_argument("--dense", type=Path, default=DENSE, help=f"dense model ({DENSE})")
    parser.add_argument("--steps", type=int, default=48, help="tokens to decode (48)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = {"dense": args.dense} | {folder.name: folder for folder in args.quantized}
    rows = measure(folders, args.steps)
    missed = [row.name for row in rows[1:] if row.ratio < BAR]
    if args.json:
        print(json.dumps({"bar": BAR, "missed": missed, "rows": [asdict(row) for row in rows]}))
        return 1 if missed else 0
    title = "decode of one sequence, bf16"
    print(f"{title:32} {'ms':>8} {'median':>8} {'ratio':>7} {'bytes/weight':>13}")
    for row in rows:
        print(
            f"{row.name:32} {row.best_ms:8.1f} {row.median_ms:8.1f} {row.ratio:6.2f}x "
            f"{row.bytes_per_weight:13.2f}  {', '.join(row.kernels)}"
        )
    for row in rows[1:]:
        verdict = "met" if row.ratio >= BAR else "MISSED"
        print(f"{verdict}: {row.name} >= {BAR}x dense: {row.ratio:.2f}x")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
