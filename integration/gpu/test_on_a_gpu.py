"""What only a card can show of the kernels: their numbers, races, streams, graphs, compilers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from qplug_kernels import apply_linear, prepare
from qplug_kernels.gpu import workspace

from .adapters import OURS
from .cases import FORMS, Form, Linear, activations, draw, named
from .gate import judge
from .machine import ROOT

pytestmark = pytest.mark.gpu

EVEN = Linear("even", 1024, 512)
DEEP = Linear("deep", 8192, 256)
"""So few outputs that K is split among many programs."""
ODD = Linear("odd", 1152, 328)
LINEARS = (EVEN, DEEP, ODD)
TOKENS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 129, 300)

each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
some_forms = pytest.mark.parametrize(
    "form",
    named(["int4", "int4-act-order", "int3", "nf4", "int8-rows"]),
    ids=lambda form: form.name,
)


def made(form: Form, linear: Linear, device: torch.device):
    """Return a prepared linear on a Triton kernel and its weight in float64."""
    weight = draw(form, linear, device)
    prepared = prepare(weight, form.dtype, device)
    assert prepared.kernel.startswith("triton_"), prepared.kernel
    return prepared, weight.dequantize().double()


def at_rest() -> bool:
    """Whether no program is counted in any workspace."""
    torch.cuda.synchronize()
    return not any(piece.count.any() for piece in workspace._OF_STREAM.values())


@each_form
@pytest.mark.parametrize("linear", LINEARS, ids=lambda linear: linear.name)
def test_products_are_those_of_float64(form, linear, device):
    prepared, exact = made(form, linear, device)
    bias = torch.randn(linear.out_features, device=device).to(form.dtype)
    for tokens in TOKENS:
        x = activations(form, linear, tokens, device)
        expected = x.double() @ exact.T + bias.double()
        error, why = judge(apply_linear(x, prepared, bias), expected, OURS[form.dtype])
        assert not why, f"{tokens} tokens: {why}"
        assert error > 0
    assert at_rest()


@each_form
def test_hundred_runs_are_equal_bit_by_bit(form, device):
    prepared, _ = made(form, DEEP, device)
    for tokens in (1, 16, 64):
        x = activations(form, DEEP, tokens, device)
        first = apply_linear(x, prepared)
        for _ in range(100):
            assert torch.equal(apply_linear(x, prepared), first)
    assert at_rest()


@some_forms
def test_two_streams_at_once_do_not_meet(form, device):
    prepared, _ = made(form, DEEP, device)
    xs = [activations(form, DEEP, tokens, device) for tokens in (1, 16)]
    wanted = [apply_linear(x, prepared) for x in xs]
    streams = [torch.cuda.Stream(device) for _ in xs]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(200):
        for at, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[at].append(apply_linear(xs[at], prepared))
    torch.cuda.synchronize()
    for found, expected in zip(results, wanted, strict=True):
        assert all(torch.equal(one, expected) for one in found)
    assert at_rest()


@some_forms
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_a_graph_is_captured_and_replayed_with_other_activations(form, tokens, device):
    prepared, _ = made(form, DEEP, device)
    x = activations(form, DEEP, tokens, device)
    apply_linear(x, prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = apply_linear(x, prepared)
        z = apply_linear(x, prepared)
    for seed in range(3):
        other = torch.randn_like(x) + seed
        x.copy_(other)
        graph.replay()
        graph.replay()
        expected = apply_linear(other, prepared)
        assert torch.equal(y, expected)
        assert torch.equal(z, expected)
    assert at_rest()


@some_forms
def test_a_new_stream_is_captured_after_nothing_but_preparing(form, device):
    prepared, _ = made(form, DEEP, device)
    x = activations(form, DEEP, 16, device)
    expected = apply_linear(x, prepared)  # compiled here: no compiler runs under a capture
    torch.cuda.synchronize()
    workspace.forget()
    again, _ = made(form, DEEP, device)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        y = apply_linear(x, again)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert at_rest()


@some_forms
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_compiled_with_reduced_overhead(form, tokens, device):
    workspace.forget()  # nothing ran before: a model's first call may be a compiled one
    prepared, exact = made(form, EVEN, device)
    bias = torch.randn(EVEN.out_features, device=device).to(form.dtype)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return apply_linear(torch.nn.functional.silu(x), prepared, bias) * 2

    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # compiled, recorded, replayed
        x = torch.randn(tokens, EVEN.in_features, device=device).to(form.dtype)
        found = compiled(x).clone()
        inner = torch.nn.functional.silu(x.double()) @ exact.T + bias.double()
        assert not judge(found, inner * 2, 4 * OURS[form.dtype])[1]
    torch.compiler.reset()


@some_forms
def test_gradients_are_those_of_the_dequantized_weight(form, device):
    prepared, exact = made(form, ODD, device)
    x = activations(form, ODD, 5, device).requires_grad_()
    grad = torch.randn(5, ODD.out_features, device=device).to(form.dtype)
    apply_linear(x, prepared).backward(grad)
    assert not judge(x.grad, grad.double() @ exact, 2 * OURS[form.dtype])[1]


@some_forms
def test_rows_that_no_wide_load_may_read(form, device):
    prepared, exact = made(form, EVEN, device)
    width = EVEN.in_features
    wide = torch.randn(9, width + 24, device=device).to(form.dtype)
    turned = torch.randn(width, 9, device=device).to(form.dtype).T
    for x in (wide[:, 1 : width + 1], wide[:, 8 : width + 8], turned, wide[::2, :width]):
        assert not judge(apply_linear(x, prepared), x.double() @ exact.T, OURS[form.dtype])[1]


@each_form
def test_no_tokens_give_no_rows(form, device):
    prepared, _ = made(form, EVEN, device)
    found = apply_linear(
        torch.empty(0, EVEN.in_features, dtype=form.dtype, device=device), prepared
    )
    assert found.shape == (0, EVEN.out_features)
    assert found.dtype == form.dtype
    found = apply_linear(
        torch.empty(2, 0, EVEN.in_features, dtype=form.dtype, device=device), prepared
    )
    assert found.shape == (2, 0, EVEN.out_features)


@each_form
def test_wrong_arguments_are_named_before_a_launch(form, device):
    prepared, _ = made(form, EVEN, device)
    x = activations(form, EVEN, 2, device)
    bias = torch.zeros(EVEN.out_features, dtype=form.dtype, device=device)
    other = torch.bfloat16 if form.dtype is torch.float16 else torch.float16
    wrong = [
        ("x is", (x[:, :-1], None)),
        ("x is", (x.to(other), None)),
        ("x is", (x.cpu(), None)),
        ("bias is", (x, bias[:-1])),
        ("bias is", (x, bias.to(other))),
        ("bias is", (x, bias.cpu())),
    ]
    for told, (activation, added) in wrong:
        with pytest.raises(ValueError, match=told):
            apply_linear(activation, prepared, added)
    torch.cuda.synchronize()


@pytest.mark.parametrize("tool", ["racecheck", "memcheck", "synccheck"])
def test_the_sanitizer_finds_nothing_in_the_tail_of_a_split(tool):
    """Addresses, barriers, and races in shared memory: racecheck does not look at global memory.

    That programs meet rightly at the counters is what equal runs, streams and graphs show.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on PATH")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    done = subprocess.run(
        [*command, "integration.gpu.split_tail"], cwd=ROOT, env=os.environ, capture_output=True,
        text=True, check=False, timeout=500,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if "Device not supported" in said or "not supported on this" in said:
        pytest.skip(f"compute-sanitizer does not run on this machine: {said[-300:]}")
    assert done.returncode == 0, said[-4000:]
    assert "split by" in said
