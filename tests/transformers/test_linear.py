"""QuantLinear by itself: what may move it, what may not, and what reads its weight."""

import copy
import io
from pathlib import Path

import cards
import pytest
import torch

from qplug.transformers.linear import QuantLinear
from qplug_converters.checkpoint import open_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
MODULE = "model.layers.0.mlp.down_proj"
NAMES = [
    "autoround-native-2b-asym-g32",
    "awq-gemm-g128",
    "awq-gemv_fast-g64",
    "bnb-fp4",
    "bnb-int8",
    "bnb-nf4-dq",
    "ct-int4-asym-g64",
    "gptq-3b-asym-g128",
    "gptq-4b-asym-g64",
    "gptq-4b-sym-g64-actorder",
]


def make(name="gptq-4b-asym-g64", dtype=torch.float32, bias=False):
    """Load one linear of a golden checkpoint, as Transformers' loader does."""
    checkpoint = open_checkpoint(GOLDEN / name)
    known, model = checkpoint.scheme()
    scheme = model.linears[MODULE]
    linear = QuantLinear(known.layout(scheme), scheme, dtype, bias=bias)
    for part in linear.layout:
        setattr(linear, linear.names[part.name], checkpoint.tensor(f"{MODULE}.{part.name}").clone())
    if bias:
        linear.bias = torch.nn.Parameter(torch.randn(scheme.out_features).to(dtype))
    return linear


def same_bytes(linear, stored):
    return all(
        t.dtype is stored[n].dtype and torch.equal(t, stored[n]) for n, t in linear.stored.items()
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward(name, dtype):
    torch.manual_seed(0)
    linear = make(name, dtype, bias=True)
    x = torch.randn(2, 3, linear.in_features).to(dtype)
    expected = x.double() @ linear.dequantize().double().T + linear.bias.double()
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    error = (linear(x).double() - expected).norm() / expected.norm()
    assert error < bound
    assert linear(x).dtype is dtype


@pytest.mark.parametrize("name", cards.GPU_KERNELS)
@pytest.mark.parametrize("arch", cards.ARCHS)
def test_the_kernel_of_a_card(arch, name, monkeypatch):
    chosen = cards.put_in(monkeypatch, arch)
    linear = make(name)
    linear(torch.zeros(1, linear.in_features))
    assert chosen == [cards.expected(name, arch)]


@pytest.mark.parametrize("name", ["gptq-4b-asym-g64", "bnb-nf4-dq", "ct-int4-asym-g64"])
def test_casts_leave_the_stored_tensors_alone(name):
    linear = make(name, bias=True)
    before = {name: tensor.clone() for name, tensor in linear.stored.items()}
    for change in ("half", "bfloat16", "float", "double", "cpu"):
        assert getattr(linear, change)() is linear
        assert same_bytes(linear, before)
    linear.to(torch.bfloat16)
    assert same_bytes(linear, before)
    assert linear.bias.dtype is torch.bfloat16
    assert list(linear.state_dict()) == ["bias", *map(linear.names.get, before)]


def test_moves_to_meta_and_back_to_memory():
    linear = make().to("meta")
    assert all(t.is_meta for t in linear.stored.values())
    assert linear.weight.is_meta
    assert all(not t.is_meta for t in linear.to_empty(device="cpu").stored.values())


def test_pack_follows_the_activations():
    linear = make()
    x = torch.randn(4, linear.in_features)
    linear(x)
    first = linear.prepare_for(torch.float32, x.device)
    assert linear.prepare_for(torch.float32, x.device) is first
    assert linear(x.bfloat16()).dtype is torch.bfloat16
    assert torch.equal(linear(x), linear(x.clone()))
    linear.keeps_pack = False
    linear.drop_pack()
    linear(x)
    assert linear.prepare_for(torch.float32, x.device) is not first
    assert linear._prepared is None


def test_the_first_call_may_be_a_compiled_one():
    """The pack is then made outside the graph, which was traced into NumPy otherwise."""
    linear = make()
    x = torch.randn(3, linear.in_features)
    expected = linear(x)
    linear.drop_pack()
    compiled = torch.compile(linear, backend="eager")
    assert torch.equal(compiled(x), expected)
    torch._dynamo.reset()
    # With its pack it is one graph.
    assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x), expected)


def test_pack_is_no_state():
    linear = make(bias=True)
    x = torch.randn(1, linear.in_features)
    y = linear(x)
    assert set(linear.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    for twin in (copy.deepcopy(linear), torch.load(saved(linear), weights_only=False)):
        assert twin._prepared is None
        assert torch.equal(twin(x), y)


def saved(linear):
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    return buffer


def test_gradient_reaches_the_input():
    linear = make(bias=True)
    x = torch.randn(3, linear.in_features, requires_grad=True)
    linear(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    dense = torch.nn.functional.linear(twin, linear.dequantize(), linear.bias.detach())
    dense.square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, rtol=1e-5, atol=1e-5)
    assert linear.bias.grad is not None


def test_autocast():
    linear = make()
    x = torch.randn(3, linear.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(1),
        lambda w: w.add_(1),
        lambda w: w.copy_(w),
        lambda w: w.__iadd__(1),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: setattr(w, "data", w),
        lambda w: w.data.__isub__(1),
        lambda w: torch.nn.init.normal_(w),
        lambda w: torch.nn.init.zeros_(tensor=w),
        lambda w: torch.add(w, 1, out=w),
    ],
)
def test_weight_cannot_be_written(write):
    with pytest.raises(RuntimeError, match="cannot be written"):
        write(make().weight)


def test_weight_cannot_be_replaced():
    linear = make()
    for value in (torch.zeros(2, 2), torch.nn.Parameter(torch.zeros(2, 2))):
        with pytest.raises(RuntimeError, match="cannot be written"):
            linear.weight = value


def test_weight_reads_as_a_plain_tensor():
    linear = make(dtype=torch.bfloat16)
    weight = linear.weight
    assert weight.dtype is torch.bfloat16
    assert weight.shape == (linear.out_features, linear.in_features)
    assert type(weight * 2) is torch.Tensor
    assert type(weight.float()) is torch.Tensor
    assert type(weight.clone()) is torch.Tensor
    assert torch.equal(weight.float(), linear.dequantize().bfloat16().float())
    assert "weight" not in dict(linear.named_parameters())
    assert "weight" not in linear.state_dict()
