"""Codebooks on a GPU against float64: tables, blocks within rows and across them, odd M, N, K."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch

from qplug_converters import codec
from qplug_converters.formats.bnb_4bit import TABLES
from qplug_converters.layout import Holds
from qplug_converters.scheme import Kind
from qplug_converters.weight import CodebookGrid, QuantizedWeight
from qplug_kernels import Problem, apply_linear, choose
from qplug_kernels.gpu import codebook, dequantize, nibbles
from qplug_kernels.gpu.configs import Config
from qplug_kernels.linear import Prepared

F16, BF16 = torch.float16, torch.bfloat16
BOUND = {F16: 1e-3, BF16: 1e-2}
NF4, FP4 = (struct.unpack("<16f", TABLES[name]) for name in ("nf4", "fp4"))
TURNED = tuple(float(i) - 6.5 for i in range(16))

CUDA = Problem(
    in_features=4096, out_features=4096, kind=Kind.CODEBOOK, group_size=64, table=NF4,
    device="cuda", arch="sm_90", triton_version=(3, 6), dtype=F16,
)  # fmt: skip


def draw(n, k, blocksize, device, table=NF4, skip=0):
    """Return a random weight; `skip` weights of its first block lie before it."""
    blocks = -(-(skip + n * k) // blocksize)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    absmax = torch.rand(blocks, device=device) + 0.1
    grid = CodebookGrid(torch.tensor(table, device=device), absmax, blocksize, skip=skip)
    return QuantizedWeight(codes, 4, grid)


def operands_of(weight, dtype, device):
    return list(codebook.prepare(weight, Problem.here(weight, dtype, device)).values())


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def check(weight, dtype, tokens, config, device, bias=True):
    """Run twice with the same counters; both runs alike, and right."""
    operands = operands_of(weight, dtype, device)
    x = torch.randn(tokens, weight.in_features).to(device, dtype)
    added = torch.randn(weight.out_features).to(device, dtype) if bias else None
    codebook.check(x, operands, added)
    config = replace(config, ptx=device.type == "cuda")
    found = codebook.launch(x, operands, added, config)
    expected = x.double() @ weight.dequantize().double().T
    if added is not None:
        expected += added.double()
    assert found.shape == (tokens, weight.out_features)
    assert relative(found, expected) < BOUND[dtype]
    assert torch.equal(codebook.launch(x, operands, added, config), found)


@pytest.mark.parametrize(
    ("blocksize", "dtype", "table", "joined"),
    [
        (32, F16, NF4, False),
        (32, BF16, TURNED, True),
        (64, BF16, NF4, True),
        (64, F16, FP4, False),
        (128, F16, TURNED, False),
        (128, BF16, FP4, True),
        (256, F16, NF4, True),
        (1024, BF16, NF4, False),
        (4096, F16, FP4, True),
    ],
)
def test_tables_and_blocks(blocksize, dtype, table, joined, device):
    weight = draw(72, 1024, blocksize, device, table)
    check(weight, dtype, 3, Config(8, 2, joined=joined), device)


@pytest.mark.parametrize(
    ("tokens", "n", "k", "splits", "width", "blocksize"),
    [
        (1, 130, 992, 3, 8, 32),  # K is no multiple of a tile
        (9, 128, 320, 1, 16, 64),
        (17, 5, 576, 2, 8, 4096),  # several blocks of tokens; one block over several rows
        (33, 300, 320, 2, 64, 128),  # a block's border within rows: groups of 64
        (16, 129, 7 * 256, 5, 16, 256),  # two splits without tiles
        (32, 64, 96, 1, 32, 64),  # groups of 32 of blocks of 64
    ],
)
def test_odd_sizes(tokens, n, k, splits, width, blocksize, device):
    dtype = BF16 if n % 3 else F16
    weight = draw(n, k, blocksize, device)
    check(weight, dtype, tokens, Config(width, splits), device, bias=n % 2 == 0)


@pytest.mark.parametrize("skip", [32, 64, 96])
def test_rows_that_begin_inside_a_block(skip, device):
    check(draw(40, 160, 128, device, skip=skip), F16, 2, Config(8), device)


def test_rows_of_a_file_are_rows_of_the_whole(device):
    """A rank's rows of a weight, whose first block began before them."""
    whole = draw(60, 160, 256, device)
    part = whole.rows(21, 50)
    assert part.grid.skip
    found = codebook.decode_all(operands_of(part, F16, device))
    assert torch.equal(found, codebook.decode_all(operands_of(whole, F16, device))[21:50])


# The layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "blocksize"), [(256, 512, 64), (130, 320, 32), (5, 96, 64)])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_packing_is_the_layout_executed(n, k, blocksize, dtype, device, monkeypatch):
    monkeypatch.setattr(nibbles, "SLAB", 1)
    weight = draw(n, k, blocksize, device)
    words, _, told = operands = operands_of(weight, dtype, device)
    form = nibbles.Form.of(operands)
    assert torch.equal(form.tensor(device), told)
    assert (form.out_features, form.in_features) == (n, k)
    padded = nibbles.pad(weight.codes, words.shape[0] * 128, words.shape[1] * form.tile)
    new = torch.tensor(form.lookup.codes, dtype=torch.uint8, device=device)[padded.int()]
    part = form.layout().part(Holds.CODES)
    assert torch.equal(codec._literal_pack(part, new.cpu()).to(device), words)
    assert torch.equal(nibbles.unpack(words, form), weight.codes)


@pytest.mark.parametrize(("rows", "columns"), [((128, 384), (0, 1024)), ((0, 384), (256, 768))])
def test_a_shard_of_tiles_packs_to_the_tiles_of_the_whole(rows, columns, device):
    weight = draw(384, 1024, 64, device)
    (r0, r1), (c0, c1) = rows, columns
    absmax = weight.grid.absmax.view(384, -1)[r0:r1, c0 // 64 : c1 // 64].flatten()
    grid = replace(weight.grid, absmax=absmax)
    shard = QuantizedWeight(weight.codes[r0:r1, c0:c1].contiguous(), 4, grid)
    whole, part = operands_of(weight, F16, device), operands_of(shard, F16, device)
    for large, small in zip(whole[:2], part[:2], strict=True):
        assert torch.equal(large[r0 // 128 : r1 // 128, c0 // 256 : c1 // 256], small)


@pytest.mark.parametrize(("table", "dtype", "bound"), [(NF4, F16, 2.1e-4), (FP4, F16, 2e-7)])
def test_operands_mean_the_weight(table, dtype, bound, device):
    weight = draw(70, 320, 64, device, table)
    meant = nibbles.reference(operands_of(weight, dtype, device))
    exact = weight.dequantize().double()
    assert ((meant - exact).abs() <= bound * exact.abs()).all()


# Many tokens, gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(("n", "k", "blocksize"), [(300, 320, 64), (130, 96, 32), (128, 512, 512)])
def test_decoded_weights(n, k, blocksize, dtype, device):
    weight = draw(n, k, blocksize, device)
    operands = operands_of(weight, dtype, device)
    found = codebook.decode_all(operands)
    assert found.dtype == dtype
    assert torch.equal(found, nibbles.reference(operands).float().to(dtype))


@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens(bias, device, monkeypatch):
    """Three slabs, the last of them short."""
    monkeypatch.setattr(dequantize, "rows_of", lambda *_: 128)
    monkeypatch.setattr(codebook, "FEW", 4)
    weight = draw(300, 320, 64, device)
    x = torch.randn(5, 320).to(device, F16)
    added = torch.randn(300).to(device, F16) if bias else None
    found = codebook.run(x, operands_of(weight, F16, device), added)
    expected = x.double() @ weight.dequantize().double().T
    assert relative(found, expected if added is None else expected + added.double()) < 1e-3


def test_opcheck(device):
    weight = draw(72, 256, 64, device)
    operands = operands_of(weight, BF16, device)
    for x, bias in (
        (torch.randn(3, 256), None),
        (torch.randn(2, 5, 256).requires_grad_(), torch.randn(72)),
        (torch.randn(3, 512)[:, ::2], torch.randn(72)),
        (torch.randn(0, 256), None),
    ):
        x = x.detach().to(device, BF16).requires_grad_(x.requires_grad)
        bias = None if bias is None else bias.to(device, BF16)
        arguments = (x, operands, bias, codebook.KERNEL.name, 72)
        torch.library.opcheck(torch.ops.qplug.apply_linear.default, arguments)


def test_without_the_interpreter_a_cpu_has_the_definition(device, monkeypatch):
    weight = draw(72, 256, 64, torch.device("cpu"))
    operands = operands_of(weight, F16, torch.device("cpu"))
    monkeypatch.setattr("qplug_kernels.gpu.compat.interpreted", lambda: False)
    x = torch.randn(3, 256).half()
    found = codebook.run(x, operands, None)
    assert relative(found, x.double() @ weight.dequantize().double().T) < 1e-3
    assert relative(codebook.decode_all(operands), weight.dequantize().double()) < 1e-3


def test_gradients_go_through_the_weight(device):
    weight = draw(40, 96, 32, device)
    tensors = codebook.prepare(weight, Problem.here(weight, F16, device))
    prepared = Prepared(codebook.KERNEL.name, 96, 40, F16, tensors)
    x = torch.randn(2, 96).to(device, F16).requires_grad_()
    apply_linear(x, prepared).backward(torch.ones(2, 40).to(device, F16))
    assert relative(x.grad, weight.dequantize().double().sum(0).expand(2, 96)) < 1e-3


# What it refuses ----------------------------------------------------------------------------------


def test_it_is_chosen_for_codebooks():
    for arch, table, blocksize in (
        ("sm_80", NF4, 64),
        ("sm_90", TURNED, 4096),
        ("gfx942", FP4, 32),
    ):
        problem = replace(CUDA, arch=arch, table=table, group_size=blocksize)
        assert choose(problem).kernel is codebook.KERNEL


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": Kind.AFFINE}, "codes are on a grid of kind affine, not in a table"),
        ({"bits": 8}, "the table is of 8 bits, and PRMT reads one of 4"),
        ({"device": "cpu"}, "it runs on a GPU"),
        ({"in_features": 1000}, "blocks of 64 weights over rows of 1000 end at inputs that are"),
        ({"run": 16}, "no multiples of 32"),
        ({"arch": "sm_75"}, "Triton has no tensor cores on sm_75"),
        ({"dtype": torch.float32}, "activations are float32"),
    ],
)
def test_what_it_cannot_it_says(change, reason):
    assert reason in (codebook.cannot(replace(CUDA, **change)) or "")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, o: (x.float(), o), "x is torch.float32"),
        (lambda x, o: (x[:, 1:], o), r"expected torch.float16 \[M, 96\]"),
        (lambda x, o: (x, [o[0], o[1].half(), o[2]]), "absmax is torch.float16"),
        (lambda x, o: (x, [o[0], o[1][..., :1], o[2]]), "absmax|whole"),
        (lambda x, o: (x, [o[0].transpose(2, 3), o[1], o[2]]), "words is"),
    ],
)
def test_wrong_operands_are_named_before_a_launch(wrong, message, device, monkeypatch):
    monkeypatch.setattr(codebook, "launch", None)
    weight = draw(40, 96, 32, device)
    x = torch.randn(2, 96).to(device, F16)
    x, operands = wrong(x, operands_of(weight, F16, device))
    with pytest.raises(ValueError, match=message):
        codebook.run(x, operands, None)
