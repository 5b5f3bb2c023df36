"""The kernel without tensor cores against float64, its splits, and the cards it is chosen for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qplug_converters.weight import AffineGrid
from qplug_kernels import Problem, choose
from qplug_kernels.gpu import affine, cuda_cores, workspace
from qplug_kernels.gpu.form import Form

MULTIPROCESSORS = 40
T4 = Problem(
    in_features=4096, out_features=4096, dtype=torch.float16, device="cuda", arch="sm_75",
    triton_version=(3, 6),
)  # fmt: skip


@pytest.fixture
def operands(random_weight, device):
    """Return a function that draws a weight and gives it with its operands."""

    def draw(n, k, group_size, **more):
        weight = random_weight(n, k, group_size, **more)
        grid = weight.affine
        moved = AffineGrid(
            grid.scales.to(device), grid.zeros.to(device), grid.group_size,
            None if grid.g_idx is None else grid.g_idx.to(device),
        )  # fmt: skip
        weight = type(weight)(weight.codes.to(device), weight.bits, moved)
        problem = Problem.here(weight, torch.float16, device)
        return weight, list(cuda_cores.KERNEL.prepare(weight, problem).values())

    return draw


def check(weight, operands, tokens, multiprocessors=MULTIPROCESSORS, bias=True):
    """Run twice with the same counters; both runs alike, and right."""
    device = operands[0].device
    x = torch.randn(tokens, weight.in_features).to(device, torch.float16)
    added = torch.randn(weight.out_features).to(device, torch.float16) if bias else None
    form = affine.check(x, operands, added)
    found = cuda_cores.launch(x, operands, added, form, multiprocessors)
    expected = x.double() @ weight.dequantize().double().T
    if added is not None:
        expected += added.double()
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm() / expected.norm()) < 5e-4
    again = cuda_cores.launch(x, operands, added, form, multiprocessors)
    assert torch.equal(again, found)
    return form


@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(2, 32), (2, 128), (3, 16), (3, 64), (4, 16), (4, 64), (4, 128), (4, 512), (8, 32), (8, 640)],
)
def test_formats(bits, group_size, operands):
    check(*operands(40, 640, group_size, bits=bits), 1 if bits < 4 else 2)


@pytest.mark.parametrize(
    ("tokens", "n", "k", "multiprocessors", "bias"),
    [
        (1, 130, 1000, 40, True),
        (2, 5, 520, 1, False),
        (3, 64, 16, 40, True),
        (6, 33, 1281, 40, True),  # two blocks of tokens, three splits
    ],
)
def test_odd_sizes(tokens, n, k, multiprocessors, bias, operands):
    check(*operands(n, k, 128), tokens, multiprocessors, bias)


def test_groups_of_several_tiles(operands):
    check(*operands(130, 1024, 512), 1)


@pytest.mark.parametrize("bits", [3, 8])
def test_symmetric_grids(bits, operands):
    weight, found = operands(40, 640, 64, bits=bits)
    weight.affine.zeros.fill_(1 << (bits - 1))
    problem = Problem.here(weight, torch.float16, found[0].device)
    found = list(cuda_cores.KERNEL.prepare(weight, problem).values())
    assert Form.of(found).symmetric
    check(weight, found, 1)


@pytest.mark.parametrize(("bits", "k", "group_size"), [(4, 512, 128), (3, 300, 64), (8, 300, 100)])
def test_act_order(bits, k, group_size, operands):
    weight, found = operands(40, k, group_size, bits=bits, act_order=True)
    assert len(found) == 4
    check(weight, found, 1)


def test_more_sums_than_a_float16_holds(operands):
    """Codes reach 255 and scales follow after: sums of 10^8 become results of 10^2."""
    weight, found = operands(32, 4096, 4096, bits=8, highest_zero=0)
    weight.affine.scales.fill_(2.0**-14)
    problem = Problem.here(weight, torch.float16, found[0].device)
    found = list(cuda_cores.KERNEL.prepare(weight, problem).values())
    x = torch.full((1, 4096), 500.0).to(found[0])
    x = x.to(torch.float16)
    result = cuda_cores.run(x, found, None)
    expected = x.double() @ weight.dequantize().double().T
    assert result.isfinite().all()
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("tokens", [0, 1, cuda_cores.FEW, cuda_cores.FEW + 1])
def test_run_chooses_by_the_number_of_tokens(tokens, operands, monkeypatch):
    weight, found = operands(20, 256, 64, act_order=True)
    launched = []
    launch = cuda_cores.launch
    monkeypatch.setattr(cuda_cores, "launch", lambda *a: launched.append(a) or launch(*a))
    x = torch.randn(tokens, 256).to(found[0].device, torch.float16)
    if tokens:
        result = cuda_cores.run(x, found, None)
        expected = x.double() @ weight.dequantize().double().T
        assert float((result.double() - expected).norm() / expected.norm()) < 1e-3
    assert len(launched) == (0 < tokens <= cuda_cores.FEW)


def test_wrong_arguments_are_named_before_a_launch(operands, monkeypatch):
    _, found = operands(40, 256, 64)
    monkeypatch.setattr(cuda_cores, "launch", lambda *_: pytest.fail("launched"))
    x = torch.zeros(2, 256, dtype=torch.float16, device=found[0].device)
    for wrong in (x[:, :255], x.float(), x[0]):
        with pytest.raises(ValueError, match=r"x is .*, expected torch.float16 \[M, 256\]"):
            cuda_cores.run(wrong, found, None)
    with pytest.raises(ValueError, match=r"words is torch.int32"):
        cuda_cores.run(x, [found[0].int(), *found[1:]], None)


def test_chosen_where_triton_has_no_tensor_cores():
    assert choose(T4).kernel is cuda_cores.KERNEL
    assert "no tensor cores on sm_75" in choose(T4).reasons
    for arch in ("sm_80", "sm_90", "sm_120", "gfx942"):
        assert "without tensor cores" in str(cuda_cores.cannot(replace(T4, arch=arch)))
    refused = {
        "bfloat16": replace(T4, dtype=torch.bfloat16),
        "runs on a GPU": replace(T4, device="cpu"),
        "not installed": replace(T4, triton_version=(0, 0)),
        "Triton is 3.4": replace(T4, triton_version=(3, 4)),
        "groups of 24": replace(T4, group_size=24),
    }
    for words, problem in refused.items():
        assert words in str(cuda_cores.cannot(problem))


def test_splits_fill_the_card_within_the_workspace(monkeypatch):
    form = Form(4096, 4096, 4096, 4, 64, 128, 128, False, False)
    assert cuda_cores.splits_of(form, 1, 1, 40) == 2
    assert cuda_cores.splits_of(form, 1, 1, 4000) == 8
    assert cuda_cores.splits_of(form, 4, 4, 40) == 1
    monkeypatch.setattr(workspace, "FLOATS", 128 * 32 * 4 * 3)
    assert cuda_cores.splits_of(form, 1, 4, 4000) == 3
    monkeypatch.setattr(workspace, "COUNTERS", 100)
    assert cuda_cores.splits_of(form, 1, 4, 4000) == 1
