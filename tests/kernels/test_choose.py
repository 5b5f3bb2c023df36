"""The choice is pure: any machine, written by hand; every refusal is a sentence."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from qplug_converters.errors import QplugError
from qplug_converters.scheme import Kind
from qplug_kernels import KERNELS, Problem, choose, prepare

XEON = Problem(
    in_features=576,
    out_features=1536,
    features=frozenset({"avx2", "avx512", "avx512_bf16", "amx"}),
    ops=frozenset({"int4pack", "unpack_rows", "wna16"}),
    run=64,
    torch_version="2.13.0",
)
H200 = replace(XEON, device="cuda", arch="sm_90", features=frozenset(), triton_version=(3, 6))
PLAIN = replace(XEON, ops=XEON.ops - {"wna16"})


def kernel(name):
    return next(kernel for kernel in KERNELS if kernel.name == name)


def test_names_are_unique():
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (XEON, "cpu_int4_wna16"),
        (PLAIN, "cpu_int4"),
        (replace(XEON, features=frozenset({"avx2"})), "cpu_int4"),
        (replace(XEON, highest_zero=16), "cpu_int4"),
        (replace(XEON, out_features=1552), "cpu_int4"),
        (replace(XEON, bits=3), "cpu_int4_wna16"),
        (replace(XEON, act_order=True), "cpu_int4_wna16"),
        (replace(XEON, dtype=torch.float16), "dense"),
        (replace(XEON, dtype=torch.float32), "dense"),
        (replace(XEON, bits=8), "dense"),
        (H200, "triton_affine"),
        (replace(H200, arch="sm_75"), "dense"),
        (replace(H200, arch="gfx942"), "triton_affine"),
        (replace(H200, dtype=torch.float16, bits=3, act_order=True), "triton_affine"),
    ],
)
def test_choice(problem, name):
    choice = choose(problem)
    assert choice.kernel.name == name
    before = KERNELS[: KERNELS.index(choice.kernel)]
    there = [k for k in before if k.device in ("", problem.device)]
    assert [k for k, _ in choice.rejected] == there
    assert all("runs on a" not in reason for _, reason in choice.rejected)


@pytest.mark.parametrize(
    ("name", "problem", "because"),
    [
        ("cpu_int4", replace(PLAIN, device="cuda"), "runs on a CPU"),
        ("cpu_int4", replace(PLAIN, dtype=torch.float16), "activations are float16"),
        ("cpu_int4", replace(PLAIN, bits=8), "codes have 8 bits"),
        ("cpu_int4", replace(PLAIN, highest_zero=17), "a zero is 17"),
        ("cpu_int4", replace(PLAIN, arch="aarch64"), "this is aarch64 with"),
        ("cpu_int4", replace(PLAIN, features=frozenset()), "this is x86_64 with none of them"),
        ("cpu_int4", replace(PLAIN, ops=frozenset()), "torch 2.13.0 has no int4 pack"),
        ("cpu_int4", replace(PLAIN, ops=frozenset({"int4pack"})), "no 4-bit embedding rows"),
        ("cpu_int4", replace(PLAIN, out_features=1003), "1003 outputs are no multiple of 16"),
        ("cpu_int4", replace(PLAIN, in_features=80, run=0), "groups of 128 over 80 inputs do not"),
        ("cpu_int4", replace(PLAIN, run=1, act_order=True), "in act order do not split"),
        ("cpu_int4", replace(PLAIN, scales_fit_f16=False), "outside the range of float16"),
        ("cpu_int4", replace(PLAIN, offsets_fit_f16=False), "zero times its scale) overflows"),
        ("cpu_int4", replace(PLAIN, weights_fit_bf16=False), "16 of one may overflow bfloat16"),
        ("cpu_int4_wna16", replace(XEON, weights_fit_bf16=False), "may overflow bfloat16"),
        ("cpu_int4_wna16", replace(XEON, dtype=torch.float32), "activations are float32"),
        ("cpu_int4_wna16", replace(XEON, kind=Kind.OFFSET), "subtracts integers"),
        ("cpu_int4_wna16", PLAIN, "not loaded in this process"),
        ("cpu_int4_wna16", replace(XEON, features=frozenset({"avx2"})), "fast with AMX only"),
        ("cpu_int4_wna16", replace(XEON, out_features=48), "not both multiples of 32"),
        ("cpu_int4_wna16", replace(XEON, highest_zero=16), "holds 0 to 15"),
        ("triton_affine", XEON, "runs on a GPU"),
        ("triton_affine", replace(H200, triton_version=(0, 0)), "Triton is not installed"),
        ("triton_affine", replace(H200, triton_version=(3, 4)), "Triton is 3.4, and"),
        ("triton_affine", replace(H200, dtype=torch.float32), "activations are float32"),
        ("triton_affine", replace(H200, arch="sm_75"), "no tensor cores on sm_75"),
        ("triton_affine", replace(H200, kind=Kind.ROWS), "on a grid of rows"),
        ("triton_affine", replace(H200, group_size=8), "groups of 8 inputs are no multiple of 16"),
        (
            "triton_affine",
            replace(H200, scale_dtype=torch.float32, scales_fit_f16=False),
            "scales are float32 and outside",
        ),
        ("dense", replace(XEON, dtype=torch.int8), "activations are int8"),
        ("reference", replace(XEON, dtype=torch.int8), "activations are int8"),
    ],
)
def test_refusals(name, problem, because):
    reason = kernel(name).cannot(problem)
    assert reason is not None
    assert because in reason


def test_block_of_a_ragged_or_channelwise_linear():
    assert replace(XEON, run=0).block == 64  # gcd(128, 576)
    assert replace(XEON, run=0, group_size=576).block == 576


def test_none_can():
    with pytest.raises(QplugError, match=r"dense: activations are int8.*reference: "):
        choose(replace(XEON, dtype=torch.int8))


def test_forced():
    assert choose(XEON, force="reference").kernel.name == "reference"
    with pytest.raises(QplugError, match="activations are float16"):
        choose(replace(XEON, dtype=torch.float16), force="cpu_int4")
    with pytest.raises(QplugError, match="expected one of cpu_int4_wna16, cpu_int4, triton"):
        choose(XEON, force="marlin")


def test_forced_by_the_environment_never_falls_back(monkeypatch, random_weight):
    monkeypatch.setenv("QPLUG_KERNEL", "cpu_int4")
    with pytest.raises(QplugError, match=r"QPLUG_KERNEL.*cannot multiply.*8 bits"):
        prepare(random_weight(32, 64, 32, bits=8), torch.bfloat16)


def test_here(random_weight):
    here = Problem.here(random_weight(32, 320, 128, highest_zero=15), torch.float16)
    assert (here.block, here.act_order, here.device, here.scales_fit_f16) == (
        64,
        False,
        "cpu",
        True,
    )
    assert here.highest_zero <= 15
    weight = random_weight(32, 384, 96, act_order=True, scale_dtype=torch.float32)
    weight.grid.scales[0, 0] = 1e-9
    here = Problem.here(weight, torch.bfloat16)
    assert (here.block, here.act_order, here.scales_fit_f16) == (96, True, False)


@pytest.mark.parametrize(
    ("scale", "zero", "offsets_fit", "weights_fit"),
    [
        (4366, 15, True, True),  # 65490
        (4368, 15, False, True),  # 65520 rounds to infinity
        (-4368, 15, False, True),
        (2e37, 0, True, True),
        (3e37, 0, True, False),
    ],
)
def test_here_knows_what_overflows(scale, zero, offsets_fit, weights_fit, random_weight):
    weight = random_weight(32, 64, 32, scale_dtype=torch.float32, highest_zero=0)
    weight.grid.scales[3, 1], weight.grid.zeros[3, 1] = scale, zero
    here = Problem.here(weight, torch.bfloat16)
    assert (here.offsets_fit_f16, here.weights_fit_bf16) == (offsets_fit, weights_fit)


def test_g_idx_in_order_is_no_act_order(random_weight):
    weight = random_weight(32, 64, 32, act_order=True)
    weight.grid.g_idx.copy_(torch.arange(64) // 32)
    assert not Problem.here(weight, torch.bfloat16).act_order


def test_a_dense_decode_warns_once_with_its_reason(caplog, random_weight):
    with caplog.at_level(logging.INFO, "qplug"):
        for _ in range(3):
            prepare(random_weight(32, 64, 32), torch.float16)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "decoded to dense float16, 2 bytes per weight instead of about 0.5" in record.message
    assert "cpu_int4: activations are float16" in record.message
    with caplog.at_level(logging.INFO, "qplug"):
        prepare(random_weight(32, 64, 32, bits=8), torch.float16)
    assert len(caplog.records) == 2
