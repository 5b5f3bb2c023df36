"""Multiply small linears whose inputs many programs share: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck python -m integration.gpu.split_tail

A checker makes kernels 10 to 50 times slower, so shapes are the smallest with a split.
"""

from __future__ import annotations

import torch

from qplug_kernels import apply_linear, prepare
from qplug_kernels.gpu import workspace

from .adapters import OURS
from .cases import Linear, activations, draw, named
from .gate import judge

NARROW = Linear("narrow", 4096, 128)


def main() -> None:
    """Multiply, and end with an error if a product is wrong or a counter is left."""
    for form in named(["int4", "int3", "nf4", "int8-rows"]):
        weight = draw(form, NARROW, "cuda")
        prepared = prepare(weight, form.dtype, "cuda")
        for tokens in (1, 16):
            x = activations(form, NARROW, tokens, "cuda")
            for _ in range(2):
                y = apply_linear(x, prepared)
                expected = x.double() @ weight.dequantize().double().T
                error, why = judge(y, expected, OURS[form.dtype])
                if why:
                    raise SystemExit(f"{form.name}, {tokens} tokens: {why}")
            print(f"{form.name}, {tokens} tokens: error {error:.1e}, split by {prepared.kernel}")
    torch.cuda.synchronize()
    if any(piece.count.any() for piece in workspace._OF_STREAM.values()):
        raise SystemExit("a counter is not zero")


if __name__ == "__main__":
    main()
