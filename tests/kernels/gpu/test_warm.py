"""One linear of each kind, for each range of tokens, and nothing for kernels of a CPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from qplug_kernels import KERNELS, Problem, linear, prepare, warm_up
from qplug_kernels.gpu import affine, configs, workspace
from qplug_kernels.gpu.form import Form
from qplug_kernels.linear import Prepared
from qplug_kernels.warm import TOKENS


def test_each_kind_once(random_weight, device, monkeypatch):
    def prepared(n, bits=4, dtype=torch.float16):
        weight = random_weight(n, 64, 32, bits=bits).to(device)
        problem = Problem.here(weight, dtype, device)
        return Prepared(affine.KERNEL.name, 64, n, dtype, affine.prepare(weight, problem))

    ran = []
    launch = affine.launch

    def launched(x, operands, bias, *more):
        ran.append((x.shape[0], x.dtype, operands[2].shape, bias is not None))
        return launch(x, operands, bias, *more)

    monkeypatch.setattr(affine, "launch", launched)
    linears = [prepared(72), prepared(72), prepared(72, bits=8), prepared(72, 4, torch.bfloat16)]
    # The interpreter knows no threads.
    assert warm_up(linears, (1, 9, 9), workers=1) == 6
    assert len(set(ran)) == len(ran) == 6
    ran.clear()
    linears += [prepared(300), prepared(40)]
    assert warm_up(linears, (1, 9), bias=True, workers=1) == 20
    assert len(set(ran)) == len(ran) == 20


def test_tokens_reach_every_range():
    form = Form(4096, 4096, 4096, 4, 64, 128, 128, False, False)
    for arch in ("sm_80", "sm_90", "sm_120", "gfx942"):
        card = configs.Card(arch, 100)

        def compiled(tokens, card=card):
            config = configs.rule(form, tokens, card)
            blocks = -(-tokens // config.tokens)
            splits = config.splits_within(form, blocks, workspace.FLOATS, workspace.COUNTERS)
            return replace(config, splits=0), splits > 1

        met = {compiled(tokens) for tokens in TOKENS if tokens <= affine.FEW}
        assert met == {compiled(tokens) for tokens in range(1, affine.FEW + 1)}
    assert max(TOKENS) > affine.FEW


def test_a_cpu_compiles_nothing(random_weight):
    names = {kernel.name for kernel in KERNELS if kernel.device == "cuda"}
    one = prepare(random_weight(32, 64, 32), torch.bfloat16)
    assert linear.kernel_named(one.kernel).name not in names
    assert warm_up([one]) == 0
