"""qplug in vLLM on a CPU beside stock AWQ and the dense model: same weights, one run.

    python integration/benchmarks/bench_vllm.py [--json] [--rounds 5] [--dtype bfloat16]

Each engine is a process with one thread; they take turns, so that a machine shared with others
slows all of them alike. Numbers are the best of the rounds, in CPU time of the process (with one
thread that is the time of an idle machine). Start-up is the construction of `LLM(...)`, once.

Bytes per weight are those that stay resident for the linears, scales and zeros included. A dense
layer is counted with the width of its dtype: oneDNN keeps it in a form of its own.

Bars, at bfloat16 and for both qplug-awq and qplug-gptq: decode of one sequence at least as fast as
stock AWQ's without int8 activations, at most 1.25 bytes a weight. The exit code is 1 if one is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "build" / "models" / "smollm2-dense"
STEPS = 24
"""Tokens decoded in a measurement."""
PROMPT = 448
"""Tokens of the prompt that is prefilled."""
DECODE_BAR = 1.0
BYTES_BAR = 1.25
METRICS = {
    "decode1": "decode 1 (tok/s)",
    "decode8": "decode 8 (tok/s)",
    "prefill": f"prefill {PROMPT} (tok/s)",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One engine: which checkpoint, which method, int8 activations or not."""

    name: str
    folder: str
    dtype: str
    quantization: str | None = None
    int8: bool = False


@dataclass(slots=True)
class Row:
    """What was measured of one engine; rates in tokens per second of CPU time."""

    name: str
    dtype: str
    startup: float
    bytes_per_weight: float
    rates: dict[str, float] = field(default_factory=dict)


def cases(dtype: str, awq: Path, gptq: Path, dense: Path) -> list[Case]:
    """Return the engines to compare at one dtype."""
    found = [
        Case("qplug-awq", str(awq), dtype, "qplug-awq"),
        Case("stock AWQ", str(awq), dtype),
        Case("dense", str(dense), dtype),
    ]
    if dtype == "bfloat16":  # elsewhere int8 activations are not offered
        found.insert(1, Case("qplug-gptq", str(gptq), dtype, "qplug-gptq"))
        found.insert(3, Case("stock AWQ, int8 activations", str(awq), dtype, None, int8=True))
    return found


# One engine -----------------------------------------------------------------------------------


def resident(model: Any) -> tuple[int, int]:
    """Return bytes and weights of the linears of a model."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase

    size = weights = 0
    for layer in model.modules():
        if not isinstance(layer, LinearBase):
            continue
        count = layer.input_size * layer.output_size
        weights += count
        unquantized = type(layer.quant_method).__name__ == "UnquantizedLinearMethod"
        prepared = getattr(layer, "qplug", None)
        if unquantized or (prepared is None and hasattr(layer, "qplug")):
            size += count * layer.params_dtype.itemsize
        elif prepared is not None:
            size += prepared.nbytes
        else:
            held = [*layer.parameters(), *layer.buffers(), *vars(layer).values()]
            tensors = {t.data_ptr(): t for t in held if isinstance(t, torch.Tensor)}
            size += sum(t.nbytes for t in tensors.values())
    return size, weights


def serve(case: Case) -> None:
    """Run one engine: a metric's name on stdin, its value on stdout, one a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1", VLLM_CPU_INT4_W4A8=str(int(case.int8)),
    )  # fmt: skip
    import vllm
    from vllm import SamplingParams

    from qplug.vllm import register

    register()
    start = time.process_time()
    llm = vllm.LLM(
        case.folder, dtype=case.dtype, quantization=case.quantization, enforce_eager=True,
        max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512, skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )  # fmt: skip
    startup = time.process_time() - start
    size, weights = llm.apply_model(resident)[0]

    def seconds(sequences: int, length: int, tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": [(7 * i + 100) % 40000 for i in range(length)]}
        start = time.process_time()
        llm.generate([prompt] * sequences, params, use_tqdm=False)
        return time.process_time() - start

    def measure(metric: str) -> float:
        if metric == "prefill":
            return PROMPT / seconds(1, PROMPT, 1)
        sequences = int(metric.removeprefix("decode"))
        first = min(seconds(sequences, 8, 1) for _ in range(2))
        return sequences * STEPS / (seconds(sequences, 8, STEPS + 1) - first)

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    for metric in METRICS:
        measure(metric)  # warm up
    answer({"startup": startup, "bytes_per_weight": size / weights})
    for line in sys.stdin:
        answer(measure(line.strip()))


# All of them ----------------------------------------------------------------------------------


class Engine:
    """A process that runs `serve`."""

    def __init__(self, case: Case, log: Path) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps(asdict(case))]
        self.log = log
        with log.open("wb") as written:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, text=True
            )
        self.row = Row(case.name, case.dtype, **self.read())

    def read(self) -> Any:
        """Return the next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine died:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def measure(self, metric: str) -> None:
        """Measure once; the best counts."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{metric}\n")
        self.process.stdin.flush()
        self.row.rates[metric] = max(self.row.rates.get(metric, 0.0), self.read())

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


def run(group: Sequence[Case], rounds: int, work: Path) -> list[Row]:
    """Measure engines in turns."""
    engines: list[Engine] = []
    try:
        for case in group:
            print(f"starting {case.name} at {case.dtype}", file=sys.stderr)
            engines.append(Engine(case, work / f"{len(engines)}-{case.dtype}.log"))
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for metric in METRICS:
                for engine in engines:
                    engine.measure(metric)
    finally:
        for engine in engines:
            engine.stop()
    return [engine.row for engine in engines]


def bars(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Compare with what was promised at bfloat16."""
    at = {row.name: row for row in rows if row.dtype == "bfloat16"}
    found: list[dict[str, object]] = []

    def bar(text: str, value: float, met: bool) -> None:
        found.append({"bar": text, "found": round(value, 3), "met": met})

    for ours in [row for name, row in at.items() if name.startswith("qplug-")]:
        ratio = ours.rates["decode1"] / at["stock AWQ"].rates["decode1"]
        size = ours.bytes_per_weight
        bar(f"{ours.name}: decode 1 / stock AWQ >= {DECODE_BAR}", ratio, ratio >= DECODE_BAR)
        bar(f"{ours.name}: bytes per weight <= {BYTES_BAR}", size, size <= BYTES_BAR)
    return found


def table(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    lines = [["", "dtype", *METRICS.values(), "start-up (CPU s)", "bytes/weight"]]
    for row in rows:
        rates = [f"{row.rates[m]:.{int(row.rates[m] < 100)}f}" for m in METRICS]
        lines.append(
            [row.name, row.dtype, *rates, f"{row.startup:.1f}", f"{row.bytes_per_weight:.2f}"]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        texts = [cell.ljust(width) for cell, width in zip(line[:2], widths, strict=False)]
        texts += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(texts).rstrip())


def main() -> int:
    """Build the checkpoints, measure, print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="the unquantized model")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Case(**json.loads(options.serve)))
        return 0
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        awq, gptq, dense = (Path(work) / name for name in ("awq", "gptq", "dense"))
        qplug = Path(sys.executable).with_name("qplug")
        quantize = ["quantize", options.model, gptq, "--to", "gptq", "--group-size", "64", "--asym"]
        convert = ["convert", gptq, awq, "--to", "awq"]
        unpack = ["convert", awq, dense, "--to", "dense", "--dtype", "float16"]
        unpack += ["--allow", "rounded"]
        for command in (quantize, convert, unpack):
            subprocess.run([qplug, *command], check=True, stdout=subprocess.DEVNULL)
        for dtype in options.dtype or ["bfloat16", "float16"]:
            rows += run(cases(dtype, awq, gptq, dense), options.rounds, Path(work))
    found = bars(rows)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "bars": found}, indent=1))
    else:
        table(rows)
        for bar in found:
            print(f"{'met' if bar['met'] else 'MISSED'}: {bar['bar']}: {bar['found']}")
    return int(not all(bar["met"] for bar in found))


if __name__ == "__main__":
    sys.exit(main())
