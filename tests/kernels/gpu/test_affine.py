"""The kernel against float64: formats, groups, zeros, act order, odd M, N and K, splits, forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qplug_converters.errors import QplugError
from qplug_converters.moves import to_offsets
from qplug_converters.weight import AffineGrid
from qplug_kernels import Problem, apply_linear
from qplug_kernels.gpu import affine, compat, configs, planes, tables, workspace
from qplug_kernels.gpu.configs import Config
from qplug_kernels.gpu.form import Form
from qplug_kernels.grids import with_zeros
from qplug_kernels.linear import Prepared

BOUND = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def prepared(random_weight, device):
    """Return a function that draws a weight and gives it with its operands."""

    def draw(n, k, group_size, dtype, symmetric=False, **more):
        weight = random_weight(n, k, group_size, **more)
        if symmetric:
            weight.affine.zeros.fill_(1 << (weight.bits - 1))
        grid = weight.affine
        moved = AffineGrid(
            grid.scales.to(device), grid.zeros.to(device), grid.group_size,
            None if grid.g_idx is None else grid.g_idx.to(device),
        )  # fmt: skip
        weight = type(weight)(weight.codes.to(device), weight.bits, moved)
        tensors = affine.prepare(weight, Problem.here(weight, dtype, device))
        return weight, Prepared(affine.KERNEL.name, k, n, dtype, tensors)

    return draw


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def check(weight, prepared, tokens, config, bias=True):
    """Run twice with the same counters; both runs alike, and right."""
    operands = list(prepared.tensors.values())
    device = operands[0].device
    x = torch.randn(tokens, weight.in_features).to(device, prepared.dtype)
    added = torch.randn(weight.out_features).to(device, prepared.dtype) if bias else None
    form = affine.check(x, operands, added)
    found = affine.launch(x, operands, added, config)
    expected = x.double() @ weight.dequantize().double().T
    if added is not None:
        expected += added.double()
    assert found.shape == (tokens, weight.out_features)
    assert relative(found, expected) < BOUND[prepared.dtype]
    assert torch.equal(affine.launch(x, operands, added, config), found)
    assert relative(affine.reference(x, operands, added), expected) < BOUND[prepared.dtype]
    return form


FORMATS = [
    (bits, k, group_size, dtype, (bits + group_size // 16) % 2 == 0)
    for bits in (2, 3, 4, 8)
    for k, group_size, dtype in (
        (104, 16, torch.float16), (200, 32, torch.bfloat16), (320, 64, torch.float16),
        (640, 128, torch.bfloat16), (640, 512, torch.float16), (600, 640, torch.bfloat16),
    )
]  # fmt: skip


@pytest.mark.parametrize(("bits", "k", "group_size", "dtype", "joined"), FORMATS)
def test_formats(bits, k, group_size, dtype, joined, prepared):
    weight, one = prepared(72, k, group_size, dtype, bits=bits)
    check(weight, one, 3, Config(8, 2, joined=joined, ptx=one.tensors["words"].is_cuda))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_joined_planes_are_those_one_by_one(bits, prepared, device):
    """In every number of planes of a group."""
    for group_size in (16, 32, 64, 128, 256):
        _, one = prepared(24, 256, group_size, torch.float16, bits=bits)
        operands = list(one.tensors.values())
        x = torch.randn(2, 256).to(device, torch.float16)
        found = [
            affine.launch(x, operands, None, Config(8, joined=joined, ptx=x.is_cuda))
            for joined in (False, True)
        ]
        assert relative(found[1], found[0].double()) < BOUND[torch.float16]


@pytest.mark.parametrize("group_size", [512, 640])
def test_groups_of_several_tiles_in_several_tiles_of_outputs(group_size, prepared):
    """The last group is short; the second tile of outputs begins behind it."""
    weight, one = prepared(130, 640, group_size, torch.float16)
    check(weight, one, 3, Config(8, 2, ptx=one.tensors["words"].is_cuda))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric(bits, dtype, prepared):
    for group_size in (64, 1024):
        weight, one = prepared(72, 320, group_size, dtype, symmetric=True, bits=bits)
        assert (one.tensors["scales"].dtype == torch.int16) == (group_size == 64)
        check(weight, one, 3, Config(8, 2, ptx=one.tensors["words"].is_cuda))


@pytest.mark.parametrize("bits", [2, 4])
def test_offsets_made_of_zeros(bits, random_weight, device):
    """As awq_gemv_fast and llm_awq hold them: their zeros come back."""
    weight = random_weight(72, 256, 64, bits=bits)
    weight.affine.scales[0, 0] = 0
    weight.affine.zeros[0, 0] = 0  # what a scale of 0 leaves of it
    stored = to_offsets(weight, "F16").to(device)
    problem = replace(Problem.here(stored, torch.float16), device="cuda", arch="sm_90")
    assert affine.cannot(problem) is None
    tensors = affine.prepare(stored, problem)
    check(stored, Prepared(affine.KERNEL.name, 256, 72, torch.float16, tensors), 3, Config(8, 2))
    assert torch.equal(with_zeros(stored).affine.zeros.cpu(), weight.affine.zeros)
    stored.grid.offsets[3, 1] *= 1.01
    problem = replace(Problem.here(stored, torch.float16), device="cuda", arch="sm_90")
    assert "no integers times scales" in affine.cannot(problem)


@pytest.mark.parametrize(
    ("tokens", "n", "k", "splits", "width"),
    [
        (1, 130, 1000, 3, 8),
        (9, 128, 256, 1, 16),
        (17, 5, 520, 2, 8),  # several blocks of tokens
        (33, 300, 300, 2, 64),
        (16, 129, 7 * 256, 5, 16),  # two splits without tiles
        (2, 64, 16, 1, 8),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_odd_sizes(tokens, n, k, splits, width, bias, prepared):
    weight, one = prepared(n, k, 128, torch.float16)
    check(weight, one, tokens, Config(width, splits, ptx=one.tensors["words"].is_cuda), bias)


@pytest.mark.parametrize(
    ("bits", "k", "group_size", "dtype"),
    [
        (4, 512, 128, torch.float16), (3, 512, 64, torch.bfloat16), (2, 320, 64, torch.float16),
        (8, 1000, 96, torch.bfloat16), (4, 300, 100, torch.float16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("joined", [False, True])
def test_act_order(bits, k, group_size, dtype, joined, prepared):
    weight, one = prepared(72, k, group_size, dtype, bits=bits, act_order=True)
    assert "order" in one.tensors
    ptx = one.tensors["words"].is_cuda
    for gathers in (False, True):
        check(weight, one, 3, Config(8, 2, joined=joined, ptx=ptx, gathers=gathers))


@pytest.mark.parametrize("dtype", BOUND)
def test_scales_of_another_dtype_than_activations(dtype, prepared):
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight, one = prepared(72, 256, 64, dtype, scale_dtype=scale_dtype)
        check(weight, one, 3, Config(8, 1, ptx=one.tensors["words"].is_cuda))


def test_codes_of_other_widths(prepared):
    for bits in (1, 5, 6, 7):
        weight, one = prepared(72, 256, 64, torch.float16, bits=bits)
        check(weight, one, 3, Config(8, 1, ptx=one.tensors["words"].is_cuda))


@pytest.mark.parametrize("tokens", [0, 1, 8, 30, affine.FEW + 1])
def test_run_chooses_by_the_number_of_tokens(tokens, prepared, device):
    weight, one = prepared(200, 512, 128, torch.bfloat16, act_order=True)
    x = torch.randn(tokens, 512).to(device, torch.bfloat16)
    bias = torch.randn(200).to(device, torch.bfloat16)
    found = apply_linear(x, one, bias)
    expected = x.double() @ weight.dequantize().double().T + bias.double()
    assert found.shape == (tokens, 200)
    assert tokens == 0 or relative(found, expected) < BOUND[torch.bfloat16]


def test_shapes_strides_and_alignment_of_x(prepared, device):
    _, one = prepared(40, 256, 64, torch.float16)
    wide = torch.randn(6, 600).to(device, torch.float16)
    for x in (wide[:, ::2][:, :256], wide[:, 1:257], wide[:, 88:344], wide.T[:256, :3].T):
        assert torch.equal(apply_linear(x, one), apply_linear(x.clone(), one))
    x = wide[:, :256]
    assert torch.equal(apply_linear(x.reshape(2, 3, 256), one).view(6, 40), apply_linear(x, one))


def test_without_interpreter_a_cpu_computes_the_definition(prepared, monkeypatch):
    weight, one = prepared(40, 256, 64, torch.float16, act_order=True)
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    operands = [tensor.cpu() for tensor in one.tensors.values()]
    for tokens in (1, affine.FEW + 1):
        x = torch.randn(tokens, 256).half()
        expected = x.double() @ weight.dequantize().cpu().double().T
        assert torch.equal(affine.run(x, operands, None), expected.half())


@pytest.mark.parametrize("tokens", [1, 30])
def test_opcheck(tokens, prepared, device):
    _, one = prepared(72, 256, 64, torch.bfloat16, act_order=True)
    operands = list(one.tensors.values())
    for x, bias in (
        (torch.randn(tokens, 256), None),
        (torch.randn(2, tokens, 256).requires_grad_(), torch.randn(72)),
        (torch.randn(tokens, 512)[:, ::2], torch.randn(72)),
        (torch.randn(0, 256), None),
    ):
        x = x.detach().to(device, torch.bfloat16).requires_grad_(x.requires_grad)
        bias = None if bias is None else bias.to(device, torch.bfloat16)
        arguments = (x, operands, bias, one.kernel, 72)
        torch.library.opcheck(torch.ops.qplug.apply_linear.default, arguments)


def test_compiled_once_for_all_numbers_of_tokens(prepared, device):
    _, one = prepared(72, 256, 64, torch.float16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def multiply(x):
        return apply_linear(x * 2, one) + 1

    compiled = torch.compile(multiply, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (100, 2, 50):
        x = torch.randn(tokens, 256).to(device, torch.float16)
        assert torch.equal(compiled(x), multiply(x))
    assert len(graphs) == 1


def test_compiled_with_gradients(prepared, device):
    _, one = prepared(72, 256, 64, torch.bfloat16)
    compiled = torch.compile(
        lambda x: apply_linear(x * 2, one) + 1, backend="aot_eager", fullgraph=True
    )
    x, y = (torch.ones(3, 256).to(device, torch.bfloat16).requires_grad_() for _ in range(2))
    apply_linear(x * 2, one).sum().backward()
    compiled(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_one_token_at_any_stride_is_launched_alike(prepared, device):
    wide = torch.zeros(3, 4097, dtype=torch.float16, device=device)
    for x in (wide[:1, :4096], wide[:1, :4096].as_strided((1, 4096), (7, 1))):
        assert planes.aligned(x).stride() == (4096, 1)
        assert planes.aligned(x).data_ptr() == x.data_ptr()


def test_operands_are_checked_once(prepared, device, monkeypatch):
    _, one = prepared(40, 256, 64, torch.float16)
    operands = list(one.tensors.values())
    x = torch.zeros(2, 256, dtype=torch.float16, device=device)
    form = affine.check(x, operands, None)
    with monkeypatch.context() as patch:
        patch.setattr(planes, "check_operands", lambda *_: pytest.fail("again"))
        assert affine.check(x, list(one.tensors.values()), None) == form
    with pytest.raises(ValueError, match="scales is"):
        affine.check(x, [operands[0], operands[1][:, :0], operands[2]], None)
    assert affine.check(x, operands, None) == form


def test_a_table_that_cannot_be_read_is_refused_at_load(prepared, tmp_path, monkeypatch):
    (tmp_path / "configs.json").write_text("{")
    monkeypatch.setenv("QPLUG_CONFIGS", str(tmp_path / "configs.json"))
    tables.rows_for.cache_clear()
    configs.choose.cache_clear()
    with pytest.raises(QplugError, match=r"configs\.json"):
        prepared(40, 256, 64, torch.float16)


def test_gradients(prepared, device):
    weight, one = prepared(72, 256, 64, torch.bfloat16, act_order=True)
    x = torch.randn(2, 3, 256).to(device, torch.bfloat16).requires_grad_()
    grad = torch.randn(2, 3, 72).to(device, torch.bfloat16)
    apply_linear(x, one).backward(grad)
    expected = grad.double() @ weight.dequantize().double()
    assert relative(x.grad, expected) < BOUND[torch.bfloat16]


def test_wrong_arguments_are_named_before_a_launch(prepared, device, monkeypatch):
    _, one = prepared(40, 256, 64, torch.float16)
    operands = list(one.tensors.values())
    monkeypatch.setattr(affine, "launch", lambda *_: pytest.fail("launched"))
    x = torch.zeros(2, 256, dtype=torch.float16, device=device)
    for wrong in (x[:, :255], x.float(), x[0], x.to("meta")):
        with pytest.raises(ValueError, match=r"x is .*, expected torch.float16 \[M, 256\]"):
            affine.run(wrong, operands, None)
    with pytest.raises(ValueError, match=r"bias is .*, expected torch.float16 \[40\]"):
        affine.run(x, operands, x[0])
    with pytest.raises(ValueError, match=r"words is torch.int32"):
        affine.run(x, [operands[0].int(), *operands[1:]], None)


def test_splits_keep_within_the_workspace(prepared):
    _, one = prepared(300, 2048, 128, torch.float16)
    form = Form.of(list(one.tensors.values()))
    config = Config(8, 100)
    assert config.splits_within(form, 1, workspace.FLOATS, workspace.COUNTERS) == 8
    assert config.splits_within(form, 1, 3 * 3 * 128 * 8, workspace.COUNTERS) == 3
    assert config.splits_within(form, 1, 0, workspace.COUNTERS) == 1
    assert config.splits_within(form, 2, workspace.FLOATS, 5) == 1


def test_the_rule_fits_every_card(prepared):
    forms = []
    for bits, group_size in ((2, 32), (3, 128), (4, 128), (8, 128), (8, 16)):
        _, one = prepared(256, 512, group_size, torch.float16, bits=bits)
        forms.append(Form.of(list(one.tensors.values())))
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        card = configs.Card(arch, 100)
        for form in forms:
            for tokens in range(1, 65):
                config = configs.rule(form, tokens, card)
                assert config.tokens >= min(tokens, 8)
                assert config.ptx == arch.startswith("sm")
                assert configs.shared_bytes(form, config.tokens, config.stages) <= card.shared
