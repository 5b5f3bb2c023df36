"""Experts in one launch against float64: formats, routings, odd sizes, splits; and one by one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qplug_converters.weight import CodebookGrid, QuantizedWeight, RowGrid
from qplug_kernels import PreparedExperts, Problem, apply_experts, experts
from qplug_kernels.gpu import affine, codebook, compat, form, moe, nibbles, routing, rows
from qplug_kernels.gpu.configs import Config

BOUND = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
HALF = torch.float16


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def draw(random_weight, device):
    """Return a function that draws experts, and gives their weights and operands."""

    def of(kernel, count, n, k, dtype=HALF, symmetric=(), **more):
        def one(number):
            if kernel is codebook.KERNEL:
                codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
                grid = CodebookGrid(torch.tensor(nibbles.TABLES[0]), torch.rand(n * k // 64), 64)
                return QuantizedWeight(codes, 4, grid)
            if kernel is rows.KERNEL:
                codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
                return QuantizedWeight(codes, 8, RowGrid(torch.rand(n)))
            weight = random_weight(n, k, **{"group_size": 64, **more})
            if number in symmetric:
                weight.affine.zeros.fill_(1 << (weight.bits - 1))
            return weight

        weights = [one(number) for number in range(count)]
        problem = experts._together([Problem.here(weight, dtype, device) for weight in weights])
        tensors = experts.stack(weights, kernel, problem, device)
        return weights, PreparedExperts(kernel.name, count, k, n, dtype, tensors)

    return of


@pytest.fixture
def mixture(draw):
    """Return a function that draws up and down, and gives the function that they mean."""

    def of(kernel=affine.KERNEL, count=3, inner=40, k=256, n=72, dtype=HALF, **more):
        ups, up = draw(kernel, count, 2 * inner, k, dtype, **more)
        downs, down = draw(kernel, count, n, inner, dtype, **more)

        def expected(x, ids, weights):
            result = torch.zeros(len(x), n, dtype=torch.float64)
            for token, chosen in enumerate(ids.tolist()):
                for place, number in enumerate(chosen):
                    if not 0 <= number < count:
                        continue
                    both = ups[number].dequantize().double() @ x[token].cpu().double()
                    hidden = torch.nn.functional.silu(both[:inner]) * both[inner:]
                    out = downs[number].dequantize().double() @ hidden
                    result[token] += out * float(weights[token, place])
            return result

        return up, down, expected

    return of


@pytest.fixture
def configured(monkeypatch, device):
    """Return a function that decides how everything is launched."""

    def by(*numbers, **more):
        config = Config(*numbers, ptx=device.type == "cuda", **more)
        monkeypatch.setattr(moe, "configuration", lambda *_: config)

    return by


def check(up, down, expected, ids, again=True):
    """Multiply, twice with the same counters: both alike, and right."""
    device = next(iter(up.tensors.values())).device
    x = torch.randn(len(ids), up.in_features).to(device, up.dtype)
    weights = torch.rand(ids.shape)
    wanted = expected(x, ids, weights)
    ids, weights = ids.to(device), weights.to(device)
    found = apply_experts(x, ids, weights, up, down)
    assert found.dtype == up.dtype
    assert relative(found.cpu(), wanted) < BOUND[up.dtype]
    assert not again or torch.equal(apply_experts(x, ids, weights, up, down), found)


def some_ids(tokens, topk, count):
    return torch.stack([torch.randperm(count)[:topk] for _ in range(tokens)])


@pytest.mark.parametrize(
    ("kernel", "more", "dtype", "joined"),
    [
        (affine.KERNEL, {"bits": 2}, torch.bfloat16, False),
        (affine.KERNEL, {"bits": 3, "group_size": 32}, HALF, True),
        (affine.KERNEL, {"bits": 4}, torch.bfloat16, True),
        (affine.KERNEL, {"bits": 4, "group_size": 512}, HALF, False),
        (affine.KERNEL, {"bits": 8}, HALF, False),
        (affine.KERNEL, {"act_order": True}, HALF, False),
        (affine.KERNEL, {"symmetric": (0, 1, 2)}, HALF, False),
        (affine.KERNEL, {"symmetric": (0, 2)}, HALF, True),
        (codebook.KERNEL, {}, HALF, True),
        (rows.KERNEL, {}, torch.bfloat16, False),
    ],
)
def test_formats(kernel, more, dtype, joined, mixture, configured):
    configured(8, 1, joined=joined)
    up, down, expected = mixture(kernel, k=320, inner=96, dtype=dtype, **more)
    if "symmetric" in more:
        alike = len(more["symmetric"]) == 3
        assert (up.tensors["scales"].dtype == torch.int16) == alike
    check(up, down, expected, torch.tensor([[0, 2], [2, 1]]), again=False)


@pytest.mark.parametrize(
    ("tokens", "topk", "count", "inner", "k", "n", "splits", "width"),
    [
        (1, 1, 1, 72, 300, 130, 3, 8),
        (3, 4, 4, 66, 520, 130, 2, 8),
        (20, 2, 2, 16, 264, 5, 1, 16),  # several blocks of an expert
        (9, 3, 3, 40, 256, 64, 1, 64),
    ],
)
def test_odd_sizes(tokens, topk, count, inner, k, n, splits, width, mixture, configured):
    configured(width, splits)
    up, down, expected = mixture(count=count, inner=inner, k=k, n=n, group_size=1024)
    check(up, down, expected, some_ids(tokens, topk, count))


@pytest.mark.parametrize(
    "ids",
    [
        [[2]] * 9,  # one expert has all tokens, and a block more than it fills
        [[3], [0]],  # one token each
        [[-1, 3], [4, 4], [1, 1 << 20]],  # of another rank: none, and nothing but those
        [[1, 1], [1, 2]],  # the same twice
        [[-1]],
    ],
)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_routings(ids, kind, mixture, configured):
    configured(8, 2)
    up, down, expected = mixture(count=4)
    ids = torch.tensor(ids, dtype=kind)
    if int(ids.max()) < 0:
        x = torch.ones(1, 256, dtype=HALF, device=next(iter(up.tensors.values())).device)
        ids = ids.to(x.device)
        assert not apply_experts(x, ids, torch.ones(1, 1, device=x.device), up, down).any()
    else:
        check(up, down, expected, ids)


def test_blocks_behind_the_last_one_do_nothing(mixture, configured, monkeypatch):
    if not compat.interpreted():
        pytest.skip("programs are counted in the interpreter")
    ran = []

    def finish(*arguments):
        ran.append(int(arguments[5]))
        return kept(*arguments)

    kept = affine.loop.finish
    configured(8, 1)
    up, down, expected = mixture(count=4)
    monkeypatch.setattr(affine.loop, "finish", finish)
    check(up, down, expected, torch.tensor([[1, 1], [1, 3], [1, 1]]), again=False)
    assert routing.most_blocks(6, 4, 8) == 4
    assert sorted(ran) == [0, 0, 1, 1]


def literal(ids, count, block):
    """Return the pairs of each block, and its expert."""
    found = []
    for expert in range(count):
        pairs = [pair for pair, number in enumerate(ids.flatten().tolist()) if number == expert]
        found += [(pairs[at : at + block], expert) for at in range(0, len(pairs), block)]
    return found


@pytest.mark.parametrize(
    ("tokens", "topk", "count", "block"),
    [(1, 1, 1, 8), (1, 8, 128, 8), (7, 2, 3, 8), (50, 4, 5, 16), (33, 2, 60, 64), (3, 3, 2, 8)],
)
def test_align_is_its_definition(tokens, topk, count, block, device):
    for lowest, highest in ((0, count), (-1, count + 2), (count - 1, count), (count, count + 1)):
        ids = torch.randint(lowest, highest, (tokens, topk))
        pairs, numbers = (t.cpu() for t in routing.align(ids.to(device), count, block))
        wanted = literal(ids, count, block)
        assert len(numbers) == routing.most_blocks(tokens * topk, count, block) >= len(wanted)
        assert numbers.tolist() == [n for _, n in wanted] + [-1] * (len(numbers) - len(wanted))
        for found, (there, _) in zip(pairs.view(-1, block).tolist(), wanted, strict=False):
            assert found == there + [tokens * topk] * (block - len(there))
        assert (pairs.view(-1, block)[len(wanted) :] == tokens * topk).all()


def test_no_shape_depends_on_the_routing():
    with FakeTensorMode():  # refuses what would ask the device
        pairs, numbers = routing.align(torch.zeros(5, 2, dtype=torch.int32), 4, 8)
    assert (len(pairs), len(numbers)) == (8 * len(numbers), 4 + 10 // 8 - 1)


def test_the_sum_runs_in_the_order_of_the_experts(device):
    parts = torch.tensor([2.0**30, 1.0, -(2.0**30), 3.0], device=device)[:, None].expand(4, 1030)
    ids = torch.tensor([[0, 1, 2, -1]], device=device)
    for order, total in (([0, 2, 1, 3], 1.0), ([0, 1, 2, 3], 0.0)):
        found = routing.combine(parts[order].contiguous(), ids, 3, torch.bfloat16)
        assert found.shape == (1, 1030)
        assert (found == total).all()


def test_stacks_beyond_32_bits(draw, device):
    """The last of 2^18 experts begins behind 2^31 words: memory that is never touched but there."""
    weights, one = draw(affine.KERNEL, 1, 128, 256, group_size=64)
    count, last = (1 << 18) + 1, 1 << 18
    words, scales, numbers = one.tensors.values()
    operands = []
    for tensor in (words, scales):
        many = torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype, device=device)
        many[last] = tensor[0]
        operands.append(many[0])
    x = torch.randn(1, 256).to(device, HALF)
    pairs = torch.zeros(8, dtype=torch.int32, device=device).index_fill_(
        0, torch.arange(1, 8, device=device), 1
    )
    block = torch.full((1,), last, dtype=torch.int32, device=device)
    found = affine.launch(
        x, [*operands, numbers[0]], None, Config(8, ptx=device.type == "cuda"),
        routing.Routing(pairs, block, 1, 1),
    )  # fmt: skip
    expected = x.cpu().double() @ weights[0].dequantize().double().T
    assert relative(found.cpu(), expected) < BOUND[HALF]


def test_shards_that_end_on_tiles_are_stacks_of_tiles(draw):
    weights, whole = draw(affine.KERNEL, 2, 256, 512)
    halves = [
        QuantizedWeight(
            w.codes[128:], 4, type(w.affine)(w.affine.scales[128:], w.affine.zeros[128:], 64)
        )
        for w in weights
    ]
    problem = experts._together([Problem.here(half, HALF) for half in halves])
    shard = experts.stack(halves, affine.KERNEL, problem, weights[0].codes.device)
    for name in ("words", "scales"):
        assert torch.equal(shard[name], whole.tensors[name][:, 1:].cpu())


def test_experts_in_one_launch_only_where_it_is_right(mixture, device, monkeypatch):
    up, down, expected = mixture(count=2)
    few, names = affine.FEW, (up.kernel, down.kernel)
    assert moe.cannot(names, 2 * few, 2, device, False) is None
    assert f"more than {few}" in moe.cannot(names, 2 * few + 1, 2, device, False)
    assert moe.cannot(names, 1 << 20, 2, device, True) is None
    assert "`reference`" in moe.cannot((up.kernel, "reference"), 1, 2, device, True)
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    assert "on a GPU" in moe.cannot(names, 1, 2, torch.device("cpu"), False)
    monkeypatch.undo()
    monkeypatch.setattr(moe, "run", lambda *_: pytest.fail("in one launch"))
    monkeypatch.setitem(moe.LOOPS, up.kernel, moe.replace(moe.LOOPS[up.kernel], few=1))
    check(up, down, expected, torch.tensor([[0, -1], [1, 0], [2, 1], [1, 1]]))


def test_without_interpreter_a_cpu_computes_the_definition(mixture, monkeypatch):
    up, down, expected = mixture(act_order=True)
    for one in (up, down):
        one.tensors.update({name: tensor.cpu() for name, tensor in one.tensors.items()})
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    check(up, down, expected, some_ids(4, 2, 3))


def test_blocks_are_as_large_as_the_share_of_an_expert(mixture, device):
    up, _, _ = mixture(count=3)
    loop = moe.LOOPS[up.kernel]
    layout = form.Form.of([t[0] for t in up.tensors.values()])
    found = [moe.configuration(loop, layout, pairs, 3, device) for pairs in (1, 48, 49, 1000)]
    assert [config.tokens for config in found] == [16, 16, 32, 32]
    one = loop.configuration(layout, 1, device)
    assert found[0].splits == one.splits
    assert moe.configuration(loop, layout, 2, 3, device).splits == -(-one.splits // 2)


def test_opcheck(mixture, device):
    up, down, _ = mixture(dtype=torch.bfloat16)
    operands = list(up.tensors.values()), list(down.tensors.values())
    for tokens in (0, 3):
        x = torch.randn(tokens, 256).to(device, torch.bfloat16)
        ids = torch.randint(0, 3, (tokens, 2), device=device)
        weights = torch.rand(tokens, 2, device=device)
        arguments = (x, ids, weights, *operands, up.kernel, down.kernel, "silu", 72)
        torch.library.opcheck(torch.ops.qplug.apply_experts.default, arguments)


def test_compiled_once_for_all_numbers_of_tokens(mixture, device):
    up, down, _ = mixture()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def multiply(x, ids, weights):
        return apply_experts(x * 2, ids, weights, up, down, "gelu_tanh") + 1

    compiled = torch.compile(multiply, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (20, 2):
        x = torch.randn(tokens, 256).to(device, HALF)
        ids, weights = some_ids(tokens, 2, 3).to(device), torch.rand(tokens, 2, device=device)
        assert torch.equal(compiled(x, ids, weights), multiply(x, ids, weights))
    assert len(graphs) == 1


def test_operands_of_other_shapes_are_named_before_a_launch(mixture, device):
    up, down, _ = mixture()
    x = torch.zeros(2, 256, dtype=HALF, device=device)
    ids, weights = torch.zeros(2, 1, dtype=torch.int64, device=device), torch.ones(2, 1).to(device)
    for wrong in (up.tensors["words"][:2], up.tensors["words"].transpose(0, 1)):
        bad = experts.replace(up, tensors={**up.tensors, "scales": wrong})
        with pytest.raises(ValueError, match=r"expected \[3, \.\.\.\] in one piece"):
            apply_experts(x, ids, weights, bad, down)
