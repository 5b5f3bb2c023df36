"""How fast each kernel multiplies on one CPU core, beside torch's dense matmul in the same run.

    python integration/benchmarks/bench_kernels.py [--json] [--tokens 1 4] [--shapes 576x1536]

Process CPU time of one thread, the best of several windows of 20 ms; the ways take turns, so that
a machine shared with others slows all of them alike. Compare the ratios to `dense bf16`: above 1
is faster. Shapes are inputs x outputs: those of a 135M model (fused q, k, v and gate, up included)
stay in the second-level cache, 4096x4096 does not. Weights are asymmetric, 4 bits, groups of 64.

`int4` is what qplug runs without vLLM: by the number of tokens, `int4 pack` (torch's operation
alone) or `int4 rows` (decoded piece by piece). `int4 wna16` is what qplug runs inside vLLM, and
`wna16` the operation alone, which is what stock vLLM runs for AWQ with VLLM_CPU_INT4_W4A8=0; both
need vLLM's CPU build. The last lines show bytes per weight and the largest relative Frobenius
error of a product against float64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_kernels import Kernel, Problem, cpu_int4, cpu_int4_wna16, dense

SHAPES = ("576x576", "576x960", "576x1536", "1536x576", "576x3072", "4096x4096")
TOKENS = (1, 4, 8, 16, 64, 256)
GROUP_SIZE = 64
WINDOW = 0.02


@dataclass(frozen=True, slots=True)
class Row:
    """One way to multiply: best microseconds, dense's time over its own, size and error."""

    shape: str
    tokens: int
    name: str
    microseconds: float
    ratio: float
    bytes_per_weight: float
    error: float


def draw(out_features: int, in_features: int) -> QuantizedWeight:
    """Return a weight drawn at random, with zeros around the midpoint."""
    groups = in_features // GROUP_SIZE
    grid = AffineGrid(
        (torch.rand(out_features, groups) * 0.02 + 0.002).half(),
        torch.randint(5, 11, (out_features, groups), dtype=torch.int16),
        GROUP_SIZE,
    )
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    return QuantizedWeight(codes, 4, grid)


def window(call: Callable[[], Tensor]) -> float:
    """Return seconds of CPU for one call, over at least `WINDOW`."""
    calls, start, spent = 0, time.process_time(), 0.0
    while spent < WINDOW:
        call()
        calls += 1
        spent = time.process_time() - start
    return spent / calls


def ways(weight: QuantizedWeight) -> dict[str, tuple[float, Callable[[Tensor], Tensor]]]:
    """Return, by name, (bytes per weight, what multiplies)."""
    problem = Problem.here(weight, torch.bfloat16)
    numel = weight.codes.numel()
    found: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {}

    def size(tensors: Sequence[Tensor]) -> float:
        return sum(tensor.nbytes for tensor in tensors) / numel

    def add(name: str, kernel: Kernel) -> list[Tensor]:
        reason = kernel.cannot(problem)
        if reason is not None:
            return []
        operands = list(kernel.prepare(weight, problem).values())
        found[name] = size(operands), lambda x: kernel.run(x, operands, None)
        return operands

    [plain] = dense.prepare(weight, problem).values()
    found["dense bf16"] = size([plain]), lambda x: F.linear(x, plain)
    if operands := add("int4", cpu_int4.KERNEL):
        packed, scale_zero, rows = operands
        few = [packed, scale_zero]
        found["int4 pack"] = size(few), lambda x: cpu_int4.multiply_pack(x, packed, scale_zero)
        found["int4 rows"] = size([rows]), lambda x: cpu_int4.multiply_rows(x, rows)
    if operands := add("int4 wna16", cpu_int4_wna16.KERNEL):
        tiles, scales, zeros = operands[2:5]
        found["wna16"] = (
            size([tiles, scales, zeros]),
            lambda x: cpu_int4_wna16.multiply_tiles(x, tiles, scales, zeros, None),
        )
    return found


def measure(shape: str, tokens: Sequence[int], windows: int) -> list[Row]:
    """Measure every way at one shape."""
    in_features, out_features = map(int, shape.split("x"))
    weight = draw(out_features, in_features)
    exact = weight.dequantize().double()
    kinds = ways(weight)
    rows = []
    for count in tokens:
        x = torch.randn(count, in_features).bfloat16()
        expected = x.double() @ exact.T
        errors = {}
        for name, (_, run) in kinds.items():
            errors[name] = float((run(x).double() - expected).norm() / expected.norm())
        best = dict.fromkeys(kinds, float("inf"))
        for _ in range(windows):
            for name, (_, run) in kinds.items():
                best[name] = min(best[name], window(partial(run, x)))
        for name, (size, _) in kinds.items():
            ratio = best["dense bf16"] / best[name]
            rows.append(Row(shape, count, name, best[name] * 1e6, ratio, size, errors[name]))
    return rows


def main() -> None:
    """Print one line for each shape, number of tokens and way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--windows", type=int, default=5, help="windows of 20 ms for each way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with suppress(ImportError):
        import vllm._C  # noqa: F401 - registers cpu_gemm_wna16
    rows = [
        row for shape in options.shapes for row in measure(shape, options.tokens, options.windows)
    ]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)


def show(rows: Sequence[Row]) -> None:
    """Print a line for each shape and number of tokens, a column for each way."""
    names = list(dict.fromkeys(row.name for row in rows))
    cells = {(row.shape, row.tokens, row.name): row for row in rows}
    print("microseconds, and how many times as fast as dense bf16")
    print(f"{'in x out':>10} {'tokens':>6}" + "".join(f"{name:>16}" for name in names))
    for shape, tokens in dict.fromkeys((row.shape, row.tokens) for row in rows):
        line = f"{shape:>10} {tokens:6}"
        for name in names:
            cell = cells.get((shape, tokens, name))
            line += f"{cell.microseconds:9.0f} {cell.ratio:5.2f}x" if cell else f"{'-':>16}"
        print(line)
    for title, attribute in (("bytes per weight", "bytes_per_weight"), ("error", "error")):
        largest = [max(getattr(r, attribute) for r in rows if r.name == name) for name in names]
        print(f"{title:>17}" + "".join(f"{value:16.3g}" for value in largest))


if __name__ == "__main__":
    main()
