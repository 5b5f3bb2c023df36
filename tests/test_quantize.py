"""Round to nearest: the grid, the codes on it, and what is refused or left as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import GOLDEN, Command, Draft, Stored, dense
from torch import Tensor

from qplug.quantizers import QUANTIZERS, QuantizeReport, fitting, quantize, rtn
from qplug_converters import formats
from qplug_converters.blocks import read_rows
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.scheme import Scheme
from qplug_converters.weight import QuantizedWeight

TARGETS = [
    (name, bits)
    for name in ("gptq", "gptq_v2", "awq", "canonical")
    for bits in (formats.find(name).capacity or pytest.fail("dense")).bits
]
SLACK = 1 + 1e-5


def run(
    draft: Draft,
    folder: Path,
    target: str = "gptq",
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = False,
    allow_dense: bool = False,
) -> QuantizeReport:
    source = folder / "dense"
    if not source.exists():
        draft.save(source)
    return quantize(
        open_checkpoint(source),
        folder / "out",
        formats.find(target),
        QUANTIZERS["rtn"],
        bits=bits,
        group_size=group_size,
        sym=sym,
        allow_dense=allow_dense,
    )


def linears(folder: Path) -> dict[str, QuantizedWeight]:
    """Read every linear of a quantized checkpoint."""
    checkpoint = open_checkpoint(folder)
    found, model = checkpoint.scheme()
    return {
        name: read_rows(checkpoint, found.layout(s), s, name, 0, s.out_features)
        for name, s in model.linears.items()
    }


def check_codes(weight: Tensor, found: QuantizedWeight) -> None:
    """Hold every code to: nearest, of those that the grid has."""
    inp, top = found.in_features, (1 << found.bits) - 1
    scale = found.grid.spread(found.grid.scales.double(), inp)
    zero = found.grid.spread(found.grid.zeros.double(), inp)
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())
    assert int(found.codes.max()) <= top
    exact = weight.double()
    error = (found.dequantize().double() - exact).abs()
    inside = (exact >= -zero * scale) & (exact <= (top - zero) * scale)
    assert bool((error <= scale / 2 * SLACK)[inside].all())
    # What lies outside takes the last code of its side.
    over, under = exact > (top - zero) * scale, exact < -zero * scale
    assert bool((found.codes[over] == top).all())
    assert bool((found.codes[under] == 0).all())


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("target", "bits"), TARGETS)
def test_every_target_and_width(target: str, bits: int, sym: bool, tmp_path: Path) -> None:
    if sym and bits == 1:
        pytest.skip("a symmetric bit is refused: test_one_symmetric_bit")
    draft = dense()
    report = run(draft, tmp_path, target, bits=bits, sym=sym)
    assert report.left_dense == ()
    found = linears(tmp_path / "out")
    assert set(found) == set(report.errors)
    holds = formats.find(target).capacity
    assert holds is not None
    low, high = holds.zeros(bits)
    squares = np.zeros(2)
    for name, quantized in found.items():
        weight = torch.from_numpy(draft.tensors[f"{name}.weight"].array)
        zeros = quantized.grid.zeros
        assert int(zeros.min()) >= low
        assert int(zeros.max()) <= high
        if sym:
            assert bool((zeros == 1 << (bits - 1)).all())
        check_codes(weight, quantized)
        dequantized = quantized.dequantize()
        # Zeros stay zero, and no sign of a row of one sign is lost.
        assert not dequantized[2].any()
        assert bool((dequantized[0] >= 0).all())
        assert bool((dequantized[1] <= 0).all())
        difference = float((dequantized - weight).double().norm())
        norm = float(weight.double().norm())
        assert report.errors[name] == pytest.approx(difference / norm, rel=1e-6)
        squares += difference**2, norm**2
    assert report.relative_error == pytest.approx(float((squares[0] / squares[1]) ** 0.5), rel=1e-6)
    assert report.errors[report.worst] == max(report.errors.values())
    assert report.relative_error < {1: 0.9, 2: 0.6, 3: 0.25}.get(bits, 0.12)


def test_more_bits_are_better(tmp_path: Path) -> None:
    errors = []
    for bits in (2, 3, 4, 8):
        (tmp_path / str(bits)).mkdir()
        errors.append(run(dense(), tmp_path / str(bits), bits=bits).relative_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("span", [(0, 15), (1, 15)])
def test_groups_of_every_kind(span: tuple[int, int], sym: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(12, 64, generator=rng)
    rows[0] = 0  # nothing
    rows[1] = rows[1].abs()  # one sign
    rows[2] = -rows[2].abs()
    rows[3] = 2.5  # constant
    rows[4] = -2.5
    rows[5] *= 1e-9  # below what float16 has
    rows[6] *= 1e-30
    rows[7, 0] = 100  # an outlier
    rows[8, 0] = -100
    rows[9], rows[9, 3] = 0, 1e-3  # a single weight
    rows[10], rows[10, 3] = 0, -1e-3
    rows[11] *= 1e4  # large, and within float16
    found = rtn.quantize(rows, Scheme(12, 64, 4, 32, sym=sym), span)
    check_codes(rows, found)
    assert int(found.grid.zeros.min()) >= span[0]
    assert int(found.grid.zeros.max()) <= span[1]
    dequantized = found.dequantize()
    assert not dequantized[0].any()
    for row in (3, 4, 9, 10):
        # A constant, and a single weight, cost no more than float16 does; half a step (and what
        # float16 took off the scale) if the grid is symmetric or may not have a zero at its end.
        step = float(found.grid.scales[row].max())
        bound = step * 0.51 if sym or span[0] else 2e-3 * float(rows[row].abs().max())
        assert float((dequantized[row] - rows[row]).abs().max()) <= bound


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrow_sources(dtype: str, tmp_path: Path) -> None:
    draft = dense()
    for name, stored in draft.tensors.items():
        tensor = torch.from_numpy(stored.array)
        tensor = tensor.half() if dtype == "F16" else tensor.bfloat16()
        raw = tensor.view(torch.int16).numpy().tobytes()
        draft.tensors[name] = Stored(dtype, stored.shape, raw)
    run(draft, tmp_path)
    checkpoint = open_checkpoint(tmp_path / "dense")
    for name, quantized in linears(tmp_path / "out").items():
        check_codes(checkpoint.tensor(f"{name}.weight").float(), quantized)
    assert checkpoint.headers["model.norm.weight"].dtype == dtype
    out = open_checkpoint(tmp_path / "out")
    assert out.raw("model.norm.weight") == checkpoint.raw("model.norm.weight")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"


def test_short_last_group(tmp_path: Path) -> None:
    """64 = 48 + 16 and 96 = 48 + 48: gptq holds it, awq leaves what it cannot."""
    draft = dense()
    report = run(draft, tmp_path, "gptq", group_size=48)
    assert report.left_dense == ()
    found = linears(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    assert found[name].grid.scales.shape == (64, 2)
    for module, quantized in found.items():
        check_codes(torch.from_numpy(draft.tensors[f"{module}.weight"].array), quantized)


def test_channelwise(tmp_path: Path) -> None:
    run(dense(), tmp_path, group_size=-1)
    assert {q.grid.scales.shape[1] for q in linears(tmp_path / "out").values()} == {1}


def test_a_group_larger_than_the_linear(tmp_path: Path) -> None:
    run(dense(), tmp_path, "gptq", group_size=80)
    by_width = {q.in_features: q.grid.scales.shape[1] for q in linears(tmp_path / "out").values()}
    assert by_width == {64: 1, 96: 2}


def test_left_dense(tmp_path: Path, qplug: Command) -> None:
    """What the target cannot hold stays as it is, and is reported."""
    draft = dense()
    report = run(draft, tmp_path, "awq", group_size=48, allow_dense=True)
    # 64 inputs are no whole groups of 48; 96 are.
    left = {n for n in draft.tensors if n.startswith("model.layers") and "down" not in n}
    assert {f"{name}.weight" for name in report.left_dense} == left
    assert set(report.errors) == {"model.layers.0.mlp.down_proj"}
    out = open_checkpoint(tmp_path / "out")
    for name in left:
        assert bytes(out.raw(name)) == draft.tensors[name].data
    skipped = out.block["modules_to_not_convert"] if out.block else ()
    assert all(any(entry in name for entry in skipped) for name in report.left_dense)
    assert not [name for name in report.errors if any(entry in name for entry in skipped)]
    awq = ("quantize", tmp_path / "dense", tmp_path / "o", "--to", "awq", "--group-size", "48")
    ran = qplug(*awq, "--allow-dense")
    assert ran.code == 0
    assert "left dense      3 shapes\n" in ran.out
    assert ran.err == (
        "warning: 3 linears left dense: awq needs whole groups, and 64 inputs are not a multiple "
        f"of 48 ({', '.join(report.left_dense)})\n"
    )


def test_a_group_size_that_fits_little(tmp_path: Path, qplug: Command) -> None:
    """As SmolLM2: widths 576 and 1536, and AWQ's usual groups of 128."""
    source = dense(hidden=144, inter=256).save(tmp_path / "dense")
    ran = qplug("quantize", source, tmp_path / "q", "--to", "awq")
    assert ran.code == 1
    assert ran.errors == [
        f"error: {source}: 3 of 4 linears would stay dense: awq needs whole groups, and 144 inputs "
        "are not a multiple of 128"
    ]
    assert "hint: --group-size 16 fits every linear; --allow-dense leaves them dense" in ran.err
    assert not (tmp_path / "q").exists()
    ran = qplug("quantize", source, tmp_path / "q", "--to", "awq", "--group-size", "16")
    assert (ran.code, ran.err) == (0, "")
    ran = qplug("quantize", source, tmp_path / "q2", "--to", "awq", "--allow-dense", "--json")
    assert (ran.code, ran.err, ran.json["linears"]) == (0, "", 1)
    assert [(x["kind"], len(x["linears"])) for x in ran.json["left_dense"]] == [("shapes", 3)]


def test_fitting_group_sizes() -> None:
    assert fitting([576, 1536], 128) == 64
    assert fitting([4096, 11008], 128) == 128
    assert fitting([4096, 11008], 1024) == 256
    assert fitting([4096, 100], 128) == 0


def test_one_stated_group_size(tmp_path: Path, qplug: Command) -> None:
    """AWQ's config names one group size: a linear shorter than a group stays dense beside others.

    Where all are shorter, each is one group.
    """
    draft = dense(hidden=256, inter=256)
    short = np.ones((64, 64), np.float32)
    draft.tensors["model.layers.0.short_proj.weight"] = Stored.of(short)
    report = run(draft, tmp_path, "awq", group_size=128)
    assert report.left_dense == ("model.layers.0.short_proj",)
    assert "64 inputs are not a multiple of 128" in report.dense[0].reason
    found = linears(tmp_path / "out")
    assert {q.grid.group_size for q in found.values()} == {128}
    ran = qplug("quantize", tmp_path / "dense", tmp_path / "g", "--to", "gptq", "--json")
    assert (ran.code, ran.json["left_dense"], ran.json["linears"]) == (0, [], 5)
    (tmp_path / "all").mkdir()
    report = run(dense(), tmp_path / "all", "awq", group_size=128)
    assert report.left_dense == ()
    for quantized in linears(tmp_path / "all" / "out").values():
        assert quantized.grid.scales.shape[1] == 1


def test_the_certificate_holds_the_errors(tmp_path: Path) -> None:
    report = run(dense(), tmp_path)
    certificate = json.loads((tmp_path / "out" / "qplug-certificate.json").read_text())
    made = certificate["quantizer"]
    assert (made["method"], made["bits"], made["group_size"], made["sym"]) == ("rtn", 4, 32, False)
    assert made["errors"] == pytest.approx(dict(report.errors))
    assert made["relative_error"] == pytest.approx(report.relative_error)


def test_heads_routers_and_towers_stay(tmp_path: Path) -> None:
    draft = dense()
    square = draft.tensors["model.layers.0.self_attn.q_proj.weight"]
    for name in ("lm_head", "model.layers.0.mlp.gate", "visual.blocks.0.attn.qkv", "score"):
        draft.tensors[f"{name}.weight"] = square
    odd = Stored("F64", square.shape, square.array.astype("float64").tobytes())
    draft.tensors["model.layers.0.mlp.odd_proj.weight"] = odd
    report = run(draft, tmp_path)
    assert len(report.errors) == 4
    assert {left.kind: left.linears for left in report.dense} == {
        "heads": ("lm_head", "score"),
        "routers": ("model.layers.0.mlp.gate",),
        "towers": ("visual.blocks.0.attn.qkv",),
        "dtypes": ("model.layers.0.mlp.odd_proj",),
    }
    assert report.left_dense == ()
    out = open_checkpoint(tmp_path / "out")
    assert bytes(out.raw("lm_head.weight")) == square.data


# Refusals ----------------------------------------------------------------------------------------


def refused(draft: Draft, folder: Path, target: str = "gptq", **more: int) -> QplugError:
    with pytest.raises(QplugError) as caught:
        run(draft, folder, target, **more)
    assert [path.name for path in folder.iterdir()] == ["dense"]
    assert str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize("name", ["gptq-4b-asym-g64", "awq-gemm-g128"])
def test_quantized_already(name: str, tmp_path: Path) -> None:
    error = refused(Draft.of(GOLDEN / name), tmp_path)
    assert "qplug convert" in error.fix


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
def test_transposed_linears(kind: str, tmp_path: Path) -> None:
    draft = dense()
    draft.config["model_type"] = kind
    assert kind in str(refused(draft, tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    draft, name = dense(), "model.layers.0.mlp.up_proj.weight"
    array = draft.tensors[name].array
    array[5, 7] = value
    draft.tensors[name] = Stored.of(array)
    error = refused(draft, tmp_path)
    assert error.where == name
    assert "NaN or infinite" in error.found


@pytest.mark.parametrize(
    ("target", "bits"), [("awq", 3), ("awq", 8), ("gptq", 5), ("canonical", 9), ("dense", 4)]
)
def test_bits_not_held(target: str, bits: int, tmp_path: Path) -> None:
    assert str(bits) in str(refused(dense(), tmp_path, target, bits=bits))


def test_group_size_not_held(tmp_path: Path) -> None:
    assert "--group-size: found 0" in str(refused(dense(), tmp_path, group_size=0))
    assert "multiple" in str(refused(dense(), tmp_path, "awq", group_size=40))


def test_nothing_to_quantize(tmp_path: Path) -> None:
    draft = dense()
    for name in list(draft.tensors):
        if name.startswith("model.layers"):
            del draft.tensors[name]
    assert "no linear" in str(refused(draft, tmp_path))


def test_one_symmetric_bit(tmp_path: Path) -> None:
    """Its two values would be 0 and one negative one: nothing that a weight could be rounded to."""
    refused(dense(), tmp_path, "canonical", bits=1, sym=True)


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_scales_beyond_float16(sym: bool, tmp_path: Path) -> None:
    draft, name = dense(), "model.layers.0.mlp.up_proj.weight"
    array = draft.tensors[name].array
    array[5, 7] = 1e7
    draft.tensors[name] = Stored.of(array)
    error = refused(draft, tmp_path, sym=sym)
    assert error.where.startswith(name.removesuffix(".weight"))


def test_small_scales_cover_their_weights() -> None:
    """A scale below 2^-14 is rounded by up to a third: upwards, or weights fall off the grid."""
    rows = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) * 5e-7
    found = rtn.quantize(rows, Scheme(64, 64, 4, 32), (0, 15))
    check_codes(rows, found)
    steps = (found.dequantize() - rows).abs() / found.grid.spread(found.grid.scales.float(), 64)
    assert float(steps.max()) < 0.6
