"""One linear of each kind, for each range of tokens, and nothing for kernels of a CPU."""

from __future__ import annotations

import torch

from qplug_kernels import KERNELS, Problem, linear, prepare, warm_up
from qplug_kernels.gpu import affine
from qplug_kernels.linear import Prepared


def test_each_kind_once(random_weight, device, monkeypatch):
    def prepared(n, bits=4, dtype=torch.float16):
        weight = random_weight(n, 64, 32, bits=bits).to(device)
        problem = Problem.here(weight, dtype, device)
        return Prepared(affine.KERNEL.name, 64, n, dtype, affine.prepare(weight, problem))

    ran = set()
    launch = affine.launch

    def launched(x, operands, *more):
        ran.add((x.shape[0], x.dtype, operands[2].shape))
        return launch(x, operands, *more)

    monkeypatch.setattr(affine, "launch", launched)
    linears = [prepared(72), prepared(72), prepared(72, bits=8), prepared(72, 4, torch.bfloat16)]
    assert warm_up(linears, (1, 9, 9), workers=1) == 6  # the interpreter knows no threads
    assert len(ran) == 6


def test_a_cpu_compiles_nothing(random_weight):
    names = {kernel.name for kernel in KERNELS if kernel.device == "cuda"}
    one = prepare(random_weight(32, 64, 32), torch.bfloat16)
    assert linear.kernel_named(one.kernel).name not in names
    assert warm_up([one]) == 0
