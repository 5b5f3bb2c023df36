"""Every kernel against float64, and what an engine does with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qplug_converters.errors import QplugError
from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_kernels import KERNELS, Problem, apply_linear, linear, prepare
from qplug_kernels.cpu_int4 import FEW

BOUND = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative Frobenius error of a product of sane inputs against float64."""

SHAPES = {
    "groups of 64": {"out_features": 96, "in_features": 128, "group_size": 64},
    "ragged": {"out_features": 64, "in_features": 576, "group_size": 128},
    "channelwise": {"out_features": 64, "in_features": 576, "group_size": 576},
    "groups of 96": {"out_features": 32, "in_features": 192, "group_size": 96},
    "act order": {"out_features": 64, "in_features": 256, "group_size": 32, "act_order": True},
    "2 bits": {"out_features": 64, "in_features": 128, "group_size": 32, "bits": 2},
    "3 bits": {"out_features": 64, "in_features": 128, "group_size": 128, "bits": 3},
    "zeros to 15": {"out_features": 64, "in_features": 64, "group_size": 32, "highest_zero": 15},
    "bf16 scales": {
        "out_features": 32, "in_features": 64, "group_size": 32, "scale_dtype": torch.bfloat16,
    },
    "8 bits": {"out_features": 32, "in_features": 64, "group_size": 32, "bits": 8},
    "odd": {"out_features": 5, "in_features": 7, "group_size": 4, "act_order": True},
    "pieces": {"out_features": 112, "in_features": 2048, "group_size": 64},
}  # fmt: skip


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


PAIRS = [
    (kernel.name, dtype)
    for kernel in KERNELS
    for dtype in BOUND
    if kernel.device != "cuda"  # in `gpu/`
    if kernel.name != "cpu_int4_wna16"  # in `test_inside_vllm`
    if dtype == torch.bfloat16 or kernel.name != "cpu_int4"
]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def kernel_dtype(request, monkeypatch):
    monkeypatch.setenv("QPLUG_KERNEL", request.param[0])
    return request.param


def prepare_or_skip(weight, name, dtype):
    kernel = linear.kernel_named(name)
    reason = kernel.cannot(Problem.here(weight, dtype))
    if reason is not None:
        pytest.skip(reason)
    return prepare(weight, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, kernel_dtype, random_weight):
    name, dtype = kernel_dtype
    weight = random_weight(**SHAPES[shape])
    prepared = prepare_or_skip(weight, name, dtype)
    exact = weight.dequantize().double()
    bias = torch.randn(weight.out_features).to(dtype)
    for tokens in (1, 3, FEW, FEW + 1, 70):
        x = torch.randn(tokens, weight.in_features).to(dtype)
        expected = x.double() @ exact.T
        found = apply_linear(x, prepared)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert relative(found, expected) < BOUND[dtype]
        assert relative(apply_linear(x, prepared, bias), expected + bias.double()) < BOUND[dtype]


def test_gradients_against_float64(kernel_dtype, random_weight):
    name, dtype = kernel_dtype
    weight = random_weight(64, 256, 32, act_order=True, highest_zero=15)
    prepared = prepare_or_skip(weight, name, dtype)
    x = torch.randn(2, 3, 256).to(dtype).requires_grad_()
    bias = torch.randn(64).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 64).to(dtype)
    apply_linear(x, prepared, bias).backward(grad)
    assert relative(x.grad, grad.double() @ weight.dequantize().double()) < BOUND[dtype]
    assert relative(bias.grad, grad.double().sum((0, 1))) < BOUND[dtype]


def test_gradcheck(random_weight):
    prepared = prepare(random_weight(6, 8, 4, act_order=True), torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: apply_linear(x, prepared, bias), (x, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype, random_weight):
    prepared = prepare(random_weight(32, 64, 32), dtype)
    operands = list(prepared.tensors.values())
    for x, bias in (
        (torch.randn(3, 64).to(dtype), None),
        (torch.randn(2, 30, 64).to(dtype).requires_grad_(), torch.randn(32).to(dtype)),
    ):
        torch.library.opcheck(
            torch.ops.qplug.apply_linear.default, (x, operands, bias, prepared.kernel, 32)
        )


class Module(torch.nn.Module):
    """What an engine's layer does: the operands are its buffers."""

    def __init__(self, prepared):
        super().__init__()
        for name, tensor in prepared.tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.prepared = prepared

    def forward(self, x):
        return apply_linear(x * 2, self.prepared) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_once_for_all_numbers_of_tokens(dtype, random_weight):
    weight = random_weight(32, 64, 32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = Module(prepare(weight, dtype))
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (100, 2, 50):  # traced with many tokens; few must still take their own path
        x = torch.randn(tokens, 64).to(dtype)
        assert torch.equal(compiled(x), module(x))
    assert len(graphs) == 1
    [node] = [node for node in graphs[0].graph.nodes if "apply_linear" in str(node.target)]
    assert node.op == "call_function"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_with_gradients(backend, random_weight):
    module = Module(prepare(random_weight(32, 64, 32), torch.bfloat16))
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    x, y = (torch.randn(3, 64).bfloat16().requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    module(x).sum().backward()
    compiled(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_of_x(dtype, random_weight):
    prepared = prepare(random_weight(32, 64, 32), dtype)
    x = torch.randn(2, 3, 64).to(dtype)
    flat = apply_linear(x.view(6, 64), prepared)
    assert torch.equal(apply_linear(x, prepared), flat.view(2, 3, 32))
    assert torch.equal(apply_linear(x[0, 0], prepared), apply_linear(x[:1, 0], prepared)[0])
    wide = torch.randn(6, 128).to(dtype)[:, ::2]
    assert torch.equal(apply_linear(wide, prepared), apply_linear(wide.contiguous(), prepared))
    many = torch.randn(64, 40).to(dtype).T
    assert torch.equal(apply_linear(many, prepared), apply_linear(many.contiguous(), prepared))
    for empty in ((0, 64), (2, 0, 64)):
        x = torch.empty(empty, dtype=dtype, requires_grad=True)
        y = apply_linear(x, prepared)
        assert y.shape == (*empty[:-1], 32)
        y.sum().backward()
        assert x.grad.shape == empty


def test_wrong_operands_are_named_before_anything_runs(monkeypatch, random_weight):
    prepared = prepare(random_weight(32, 64, 32), torch.bfloat16)
    monkeypatch.setattr(linear, "_multiply", lambda *_: pytest.fail("launched"))
    x = torch.randn(3, 64).bfloat16()
    for wrong in (x[:, :63], x.float()):
        with pytest.raises(
            ValueError, match=r"x is torch.* expected torch.bfloat16 \[\.\.\., 64\]"
        ):
            apply_linear(wrong, prepared)
    for wrong in (torch.zeros(31).bfloat16(), torch.zeros(32)):
        with pytest.raises(ValueError, match=r"bias is .* expected torch.bfloat16 \[32\]"):
            apply_linear(x, prepared, wrong)


def test_a_weight_that_contradicts_itself(random_weight):
    weight = random_weight(32, 64, 32)
    grid, codes = weight.grid, weight.codes
    for wrong in (
        AffineGrid(grid.scales[:, :1], grid.zeros, 32),
        AffineGrid(grid.scales[:16], grid.zeros[:16], 32),
        AffineGrid(grid.scales, grid.zeros, 16),
        AffineGrid(grid.scales, grid.zeros, 32, torch.zeros(63, dtype=torch.int32)),
        AffineGrid(grid.scales, grid.zeros, 32, torch.full((64,), 2, dtype=torch.int32)),
    ):
        with pytest.raises(QplugError, match="expected"):
            prepare(QuantizedWeight(codes, 4, wrong), torch.bfloat16)


def test_overflow_is_an_error_and_never_an_infinity(random_weight):
    weight = random_weight(32, 64, 32, scale_dtype=torch.float32)
    weight.grid.scales.mul_(1e8)
    with pytest.raises(QplugError, match="values that torch"):
        prepare(weight, torch.float16)


@pytest.mark.parametrize(("scale", "zero"), [(5000, 15), (5e37, 0)])
def test_large_scales_are_right_for_few_tokens_and_many(scale, zero, random_weight):
    """A zero * scale above 65504, a (8 - zero) * scale above 3.4e38; the weights are finite."""
    weight = random_weight(32, 64, 32, scale_dtype=torch.float32)
    weight.grid.scales.fill_(scale)
    weight.grid.zeros.fill_(zero)
    weight.codes.fill_(3)
    prepared = prepare(weight, torch.bfloat16)
    for tokens in (1, FEW + 8):
        found = apply_linear(torch.full((tokens, 64), 1 / 64).bfloat16(), prepared)
        expected = weight.dequantize().double().sum(1).expand(tokens, 32) / 64
        assert relative(found, expected) < BOUND[torch.bfloat16]


def test_nbytes(random_weight):
    problem = Problem.here(random_weight(32, 64, 32), torch.bfloat16)
    if linear.choose(problem).kernel.dense:
        pytest.skip("no packed kernel on this machine")
    for group_size, most in ((32, 1.25), (64, 1.125), (128, 1.0625)):
        prepared = prepare(random_weight(64, 256, group_size), torch.bfloat16)
        assert prepared.nbytes == sum(t.nbytes for t in prepared.tensors.values())
        assert prepared.nbytes <= most * 64 * 256


def test_a_plain_dense_weight_is_offered_to_the_engine(monkeypatch, random_weight):
    weight = random_weight(32, 64, 32, act_order=True)
    dense = prepare(weight, torch.float32).dense_weight
    assert torch.equal(dense, weight.dequantize())
    monkeypatch.setenv("QPLUG_KERNEL", "reference")
    assert prepare(weight, torch.float32).dense_weight is None
    monkeypatch.delenv("QPLUG_KERNEL")
    chosen = prepare(weight, torch.bfloat16)
    assert (chosen.dense_weight is None) == (chosen.kernel != "dense")


VLLM = """
import torch, vllm._C
from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_kernels import apply_linear, linear, prepare
torch.manual_seed(0)
for rows, columns, group, act in ((64, 576, 64, 0), (96, 192, 96, 1), (64, 256, 128, 1)):
    g_idx = (torch.arange(columns) // group).int()[torch.randperm(columns)] if act else None
    grid = AffineGrid(
        (torch.rand(rows, columns // group) * 0.02 + 1e-3).half(),
        torch.randint(0, 16, (rows, columns // group), dtype=torch.int16), group, g_idx,
    )
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    weight = QuantizedWeight(codes, 4, grid)
    prepared = prepare(weight, torch.bfloat16)
    assert prepared.kernel == "cpu_int4_wna16", prepared.kernel
    assert prepared.nbytes <= 1.25 * rows * columns
    exact = weight.dequantize().double()
    for tokens in (1, 8, 9, 70):
        x = torch.randn(tokens, columns).bfloat16().requires_grad_()
        bias = torch.randn(rows).bfloat16()
        for found, expected in (
            (apply_linear(x, prepared), x.double() @ exact.T),
            (apply_linear(x, prepared, bias), x.double() @ exact.T + bias.double()),
        ):
            assert (found.double() - expected).norm() < 1e-2 * expected.norm()
        apply_linear(x, prepared).sum().backward()
        expected = exact.sum(0).expand_as(x)
        assert (x.grad.double() - expected).norm() < 1e-2 * expected.norm()
grid = AffineGrid(torch.full((64, 2), 5e37), torch.zeros(64, 2, dtype=torch.int16), 32)
weight = QuantizedWeight(torch.full((64, 64), 3, dtype=torch.uint8), 4, grid)
prepared = prepare(weight, torch.bfloat16)  # 8 * 5e37 is no float32
for tokens in (1, 70):
    assert apply_linear(torch.full((tokens, 64), 2.0**-10).bfloat16(), prepared).isfinite().all()
"""


@pytest.mark.engine
def test_inside_vllm():
    """In a process of its own: vLLM's operations change what every other test would choose."""
    if "amx" not in linear.Problem.here(_tiny(), torch.bfloat16).features:
        pytest.skip("this CPU has no AMX")
    if not any(Path(path, "vllm", "_C.abi3.so").exists() for path in sys.path if path):
        pytest.skip("vLLM's CPU build is not installed")
    done = subprocess.run(
        [sys.executable, "-c", VLLM], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.returncode == 0, done.stderr


def _tiny():
    one = torch.zeros(1, 1)
    return QuantizedWeight(one.byte(), 4, AffineGrid(one.half(), one.short(), 1))
