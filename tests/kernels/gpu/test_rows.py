"""8-bit rows on a GPU against float64, and against what LLM.int8 itself computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qplug_converters.scheme import Kind
from qplug_converters.weight import QuantizedWeight, RowGrid
from qplug_kernels import Problem, apply_linear, choose
from qplug_kernels.gpu import asm, dequantize, rows
from qplug_kernels.gpu.configs import Config
from qplug_kernels.gpu.form import Form
from qplug_kernels.linear import Prepared

F16, BF16 = torch.float16, torch.bfloat16
BOUND = {F16: 1e-3, BF16: 1e-2}

CUDA = Problem(
    in_features=4096, out_features=4096, bits=8, kind=Kind.ROWS, group_size=4096,
    device="cuda", arch="sm_90", triton_version=(3, 6), dtype=F16,
)  # fmt: skip


def draw(n, k, device):
    """Return a random weight: codes 1 to 255, as LLM.int8 writes."""
    codes = torch.randint(1, 256, (n, k), dtype=torch.uint8, device=device)
    return QuantizedWeight(codes, 8, RowGrid(torch.rand(n, device=device) + 0.1))


def operands_of(weight, dtype, device):
    return list(rows.prepare(weight, Problem.here(weight, dtype, device)).values())


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("tokens", "n", "k", "splits", "width", "dtype", "joined"),
    [
        (1, 130, 1000, 3, 8, F16, False),
        (3, 72, 512, 2, 8, BF16, True),
        (9, 128, 256, 1, 16, F16, True),
        (17, 5, 520, 2, 8, BF16, False),  # several blocks of tokens
        (33, 300, 77, 1, 64, F16, False),  # rows that no load of 16 bytes fits
        (16, 129, 7 * 128, 5, 16, BF16, True),  # a split without tiles
    ],
)
def test_against_float64(tokens, n, k, splits, width, dtype, joined, device):
    weight = draw(n, k, device)
    operands = operands_of(weight, dtype, device)
    x = torch.randn(tokens, k).to(device, dtype)
    bias = torch.randn(n).to(device, dtype) if n % 2 else None
    config = Config(width, splits, joined=joined, ptx=device.type == "cuda")
    rows.check(x, operands, bias)
    found = rows.launch(x, operands, bias, config)
    expected = x.double() @ weight.dequantize().double().T
    expected = expected if bias is None else expected + bias.double()
    assert relative(found, expected) < BOUND[dtype]
    assert torch.equal(rows.launch(x, operands, bias, config), found)


def llm_int8(x, weight, threshold):
    """Return what bitsandbytes 0.50.2 computes in `MatMul8bitLt.forward`, in float64.

    Inputs with a value of `threshold` or more in any token are multiplied in 16 bits by weights
    decoded from int8 rows; the others after rounding each token to int8 by its largest value.
    """
    outliers = (x.abs() >= threshold).any(0)
    codes = weight.codes.double() - 128
    rest = x.masked_fill(x.abs() >= threshold, 0).double()
    scales = rest.abs().amax(1, keepdim=True) / 127
    rounded = (rest / scales).round()
    rounded[:, outliers] = 0
    exact = (rounded @ codes.T) * scales * weight.grid.absmax.double() / 127
    kept = weight.dequantize().to(x.dtype)[:, outliers].double()
    return exact + x[:, outliers].double() @ kept.T


@pytest.mark.parametrize("threshold", [6.0, 3.0, 1e9])
def test_it_is_nearer_to_the_product_than_llm_int8(threshold, device):
    """With outliers as models have them, whatever the threshold."""
    weight = draw(96, 512, device)
    x = torch.randn(4, 512)
    x[:, [3, 200, 411]] *= 20
    x = x.to(device, F16)
    expected = x.double() @ weight.dequantize().double().T
    found = rows.run(x, operands_of(weight, F16, device), None)
    theirs = relative(llm_int8(x, weight, threshold), expected)
    assert relative(found, expected) < theirs / 5
    assert theirs > 2e-3


def test_a_threshold_of_zero_is_the_same_product(device):
    """All columns are outlier columns then, so both multiply by the same 16-bit inputs."""
    weight, x = draw(96, 512, device), torch.randn(4, 512).to(device, F16)
    found = rows.run(x, operands_of(weight, F16, device), None)
    assert relative(found, llm_int8(x, weight, 0.0)) < 1e-3


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(("n", "k"), [(300, 320), (5, 77)])
def test_decoded_weights(n, k, dtype, device):
    weight = draw(n, k, device)
    found = rows.decode_all(operands_of(weight, dtype, device))
    exact = (weight.codes.float() - 128) * (weight.grid.absmax / 127)[:, None]
    assert found.dtype == dtype
    ulp = 2.0**-10 if dtype == F16 else 2.0**-7
    assert ((found.float() - exact).abs() <= ulp * exact.abs()).all()
    assert relative(found, weight.dequantize().double()) < ulp / 3


def test_many_tokens(device, monkeypatch):
    monkeypatch.setattr(dequantize, "rows_of", lambda *_: 128)
    monkeypatch.setattr(rows, "FEW", 4)
    weight, x = draw(300, 320, device), torch.randn(5, 320).to(device, BF16)
    found = rows.run(x, operands_of(weight, BF16, device), None)
    assert relative(found, x.double() @ weight.dequantize().double().T) < 1e-2


def test_opcheck(device):
    weight = draw(72, 256, device)
    operands = operands_of(weight, BF16, device)
    for x, bias in (
        (torch.randn(3, 256), None),
        (torch.randn(2, 5, 256).requires_grad_(), torch.randn(72)),
        (torch.randn(3, 512)[:, ::2], torch.randn(72)),
        (torch.randn(0, 256), None),
    ):
        x = x.detach().to(device, BF16).requires_grad_(x.requires_grad)
        bias = None if bias is None else bias.to(device, BF16)
        arguments = (x, operands, bias, rows.KERNEL.name, 72)
        torch.library.opcheck(torch.ops.qplug.apply_linear.default, arguments)


def test_without_the_interpreter_a_cpu_has_the_definition(device, monkeypatch):
    weight = draw(72, 256, torch.device("cpu"))
    operands = operands_of(weight, F16, torch.device("cpu"))
    monkeypatch.setattr("qplug_kernels.gpu.compat.interpreted", lambda: False)
    x = torch.randn(3, 256).half()
    found = rows.run(x, operands, None)
    assert relative(found, x.double() @ weight.dequantize().double().T) < 1e-3
    assert relative(rows.decode_all(operands), weight.dequantize().double()) < 1e-3


def test_gradients_go_through_the_weight(device):
    weight = draw(40, 96, device)
    tensors = rows.prepare(weight, Problem.here(weight, F16, device))
    prepared = Prepared(rows.KERNEL.name, 96, 40, F16, tensors)
    x = torch.randn(2, 96).to(device, F16).requires_grad_()
    apply_linear(x, prepared).backward(torch.ones(2, 40).to(device, F16))
    assert relative(x.grad, weight.dequantize().double().sum(0).expand(2, 96)) < 1e-3


def test_operands(device):
    weight = draw(130, 300, device)
    words, scales, told = operands_of(weight, F16, device)
    form = Form.of((words, scales, told))
    assert (form.out_features, form.in_features, form.bits) == (130, 300, 8)
    assert words.shape == (2, 3, 1, 128, 64)
    assert scales.shape == (256,)
    assert not scales[130:].any()


def test_the_text_has_the_midpoint_written_in():
    """So its fourth operand may be anything, and is the words."""
    for bf16 in (False, True):
        assert "$5" not in asm.text(8, bf16, True, 0, 2)


def test_it_is_chosen_for_rows():
    for arch in ("sm_80", "sm_120", "gfx942"):
        assert choose(replace(CUDA, arch=arch)).kernel is rows.KERNEL


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": Kind.AFFINE}, "weights lie on a grid of kind affine, not one of 8-bit rows"),
        ({"device": "cpu"}, "it runs on a GPU"),
        ({"arch": "sm_75"}, "Triton has no tensor cores on sm_75"),
    ],
)
def test_what_it_cannot_it_says(change, reason):
    assert reason in (rows.cannot(replace(CUDA, **change)) or "")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, o: (x.float(), o), "x is torch.float32"),
        (lambda x, o: (x, [o[0], o[1][:-1], o[2]]), r"scales is torch.float32 \[127\]"),
        (lambda x, o: (x, [o[0].int(), o[1], o[2]]), "words is torch.int32"),
    ],
)
def test_wrong_operands_are_named_before_a_launch(wrong, message, device, monkeypatch):
    monkeypatch.setattr(rows, "launch", None)
    weight, x = draw(40, 96, device), torch.randn(2, 96).to(device, F16)
    x, operands = wrong(x, operands_of(weight, F16, device))
    with pytest.raises(ValueError, match=message):
        rows.run(x, operands, None)
