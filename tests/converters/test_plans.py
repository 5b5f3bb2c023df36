"""Plans and proofs at their edges: what a review found once must not come back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import laws
import pytest
import torch

from qplug_converters import formats
from qplug_converters.checkpoint import Checkpoint, open_checkpoint
from qplug_converters.errors import QplugError, Refused
from qplug_converters.execute import execute
from qplug_converters.plan import Verdict, Wishes, make_plan
from qplug_converters.scheme import Scheme
from qplug_converters.survey import survey
from qplug_converters.verify import verify
from qplug_converters.weight import AffineGrid

GOLDEN = Path(__file__).parents[1] / "golden"
UP, DOWN = laws.MODULES


def convert(source: Path, target: Path, to: str, wishes: Wishes | None = None) -> Verdict:
    checkpoint, found, model = laws.surveyed(source)
    plan = make_plan(found, model, formats.find(to), wishes)
    execute(plan, checkpoint, target)
    return plan.verdict


def test_awq_of_widths_below_the_group_size(tmp_path: Path) -> None:
    """One config has one group size: 64 inputs cannot be said to have groups of 128."""
    gptq = formats.find("gptq")
    linears = {}
    for module, inp in ((UP, 64), (DOWN, 256)):
        scheme = gptq.adopt(Scheme(32, inp, 4, min(128, inp)))
        linears[module] = (scheme, laws.weight_of(scheme, gptq, 3))
    source = laws.write(tmp_path / "a", gptq, linears)
    assert source.block is not None
    assert source.block["group_size"] == 128
    assert convert(tmp_path / "a", tmp_path / "b", "awq") is Verdict.EXACT
    proof = verify(source, open_checkpoint(tmp_path / "b"))
    assert proof.same
    block = open_checkpoint(tmp_path / "b").block
    assert block is not None
    assert block["group_size"] == 64


def test_only_linears_that_can_be_converted_share_a_group_size() -> None:
    _, found, model = laws.surveyed(GOLDEN / "gptq-dynamic-mixed")
    plan = make_plan(found, model, formats.find("awq"))
    assert plan.verdict is Verdict.REQUANTIZED
    fine = [s for s in plan.steps if s.verdict is Verdict.EXACT]
    assert fine
    assert {s.target.group_size for s in fine} == {64}
    assert {s.target.group_size for s in plan.steps if s.refits} == {64}


def with_scales(folder: Path, scales: torch.Tensor) -> Checkpoint:
    """Write a canonical checkpoint of one linear with these scales, [32, 2]."""
    canonical = formats.find("canonical")
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    scheme = canonical.adopt(Scheme(32, 64, 4, 32, scale_dtype=names[scales.dtype]))
    weight = laws.weight_of(scheme, formats.find("gptq"), 4)
    grid = AffineGrid(scales, weight.grid.zeros, 32)
    return laws.write(folder, canonical, {UP: (scheme, replace(weight, grid=grid))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_scales_are_proven_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    scales = torch.rand(32, 2, generator=torch.Generator().manual_seed(1)) / 1e4
    source = with_scales(tmp_path / "a", scales.to(dtype))
    assert convert(tmp_path / "a", tmp_path / "b", "gptq") is Verdict.ROUNDED
    proof = verify(source, open_checkpoint(tmp_path / "b"))
    assert proof.verdict is Verdict.ROUNDED
    assert proof.problems == ()
    assert proof.linears[0].max_abs <= 16 * 2.0**-25


def test_scales_that_fit_are_exact(tmp_path: Path) -> None:
    source = with_scales(tmp_path / "a", torch.full((32, 2), 0.25, dtype=torch.bfloat16))
    assert convert(tmp_path / "a", tmp_path / "b", "awq") is Verdict.EXACT
    assert verify(source, open_checkpoint(tmp_path / "b")).same


@pytest.mark.parametrize("lost", [1e-11, 1e6, -1e6])
def test_scales_that_float16_loses_are_no_rounding(lost: float, tmp_path: Path) -> None:
    scales = torch.full((32, 2), 0.25)
    scales[3, 1] = lost
    with_scales(tmp_path / "a", scales)
    _, found, model = laws.surveyed(tmp_path / "a")
    plan = make_plan(found, model, formats.find("gptq"))
    assert plan.verdict is Verdict.IMPOSSIBLE
    with pytest.raises(Refused, match="overflow F16, or become 0") as caught:
        plan.refuse_above(Verdict.ROUNDED)
    assert "canonical" in caught.value.fix
    assert "gptq_v2" not in caught.value.fix
    with pytest.raises(Refused, match="overflow F16, or become 0"):
        execute(plan, open_checkpoint(tmp_path / "a"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_forced_rule_is_written_out(tmp_path: Path) -> None:
    """Under a forced rule bytes cannot be copied: the config still names the producer's rule."""
    checkpoint = open_checkpoint(GOLDEN / "gptq-4b-asym-g64", zero_rule="field")
    found, model = checkpoint.scheme()
    model = survey(checkpoint, found, model)
    assert model.forced
    plan = make_plan(found, model, found)
    assert plan.verdict is Verdict.REQUANTIZED  # zeros of 0, which v1 cannot say to all readers
    plan = make_plan(found, model, found, Wishes(bits=8))
    execute(plan, checkpoint, tmp_path / "c")
    assert verify(checkpoint, open_checkpoint(tmp_path / "c")).same
    plain = open_checkpoint(GOLDEN / "gptq-4b-asym-g64")
    assert not verify(plain, open_checkpoint(tmp_path / "c")).same


def test_forcing_the_producers_own_rule_changes_nothing() -> None:
    checkpoint = open_checkpoint(GOLDEN / "gptq-4b-asym-g64", zero_rule="word")
    found, model = checkpoint.scheme()
    assert not model.forced
    plan = make_plan(found, survey(checkpoint, found, model), found)
    assert plan.verdict is Verdict.COPIED


@pytest.mark.parametrize("left", [("bits", "quant_method"), ()])
def test_a_side_file_fills_what_the_config_leaves_out(
    left: tuple[str, ...], tmp_path: Path
) -> None:
    """Transformers drops `meta`, which says by which rule zeros were stored."""
    folder = tmp_path / "c"
    shutil.copytree(GOLDEN / "gptq-4b-asym-g64", folder)
    config = json.loads((folder / "config.json").read_text())
    block = config["quantization_config"]
    config["quantization_config"] = {key: block[key] for key in left}
    (folder / "config.json").write_text(json.dumps(config))
    _, _, model = laws.surveyed(folder)
    assert {s.zero_rule for s in model.linears.values()} == {"word"}
    assert verify(open_checkpoint(GOLDEN / "gptq-4b-asym-g64"), open_checkpoint(folder)).same


def test_a_pattern_that_never_ends_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(GOLDEN / "gptq-4b-sym-g32", folder)
    (folder / "quantize_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    groups = "(.*)" * 9 + "".join(f"\\{n}" for n in range(9, 0, -1))
    config["quantization_config"]["dynamic"] = {f"+:{groups}(?<!proj)$": {"bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QplugError, match="does not come to an end") as caught:
        open_checkpoint(folder).scheme()
    assert caught.value.where == "quantization_config.dynamic"


def test_sizes_beyond_any_file_are_refused(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [10**2000] * 3, "data_offsets": [0, 4]}}
    raw = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"1234")
    with pytest.raises(QplugError, match="damaged entry"):
        open_checkpoint(tmp_path)


def test_text_that_is_no_text_survives(tmp_path: Path) -> None:
    """A lone surrogate in config.json is carried along as JSON says it."""
    folder = tmp_path / "c"
    shutil.copytree(GOLDEN / "gptq-4b-sym-g32", folder)
    raw = (folder / "config.json").read_text()
    (folder / "config.json").write_text(raw.replace("{", '{"odd": "\\ud800", ', 1))
    convert(folder, tmp_path / "d", "awq")
    assert open_checkpoint(tmp_path / "d").config["odd"] == "\ud800"


def test_a_file_that_cannot_be_carried_is_met_first(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(GOLDEN / "gptq-4b-sym-g32", folder)
    (folder / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    checkpoint, found, model = laws.surveyed(folder)
    plan = make_plan(found, model, formats.find("awq"))
    seen: list[str] = []
    with pytest.raises(QplugError):
        execute(plan, checkpoint, tmp_path / "d", progress=lambda *now: seen.append(now[2]))
    assert seen == []
    assert not list(tmp_path.glob("*d*"))


def test_what_is_left_behind_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(GOLDEN / "gptq-4b-sym-g32", folder)
    (folder / "original").mkdir()
    _, _, model = laws.surveyed(folder)
    assert model.notes == (
        "not part of the model, and not carried along: original/, reference.safetensors",
    )


def test_a_quantized_head_of_a_tied_model_is_named(tmp_path: Path) -> None:
    gptq = formats.find("gptq")
    scheme = gptq.adopt(Scheme(32, 64, 4, 32))
    linear = (scheme, laws.weight_of(scheme, gptq, 1))
    laws.write(tmp_path / "c", gptq, {"lm_head": linear}, config={"tie_word_embeddings": True})
    _, _, model = laws.surveyed(tmp_path / "c")
    assert any("tie_word_embeddings" in note for note in model.notes)


def test_a_copy_keeps_its_side_files_to_the_byte(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(GOLDEN / "gptq-4b-sym-g32", folder)
    side = json.loads((folder / "quantize_config.json").read_text())
    side["only_here"] = 1
    (folder / "quantize_config.json").write_text(json.dumps(side))
    assert convert(folder, tmp_path / "d", "gptq") is Verdict.COPIED
    assert json.loads((tmp_path / "d" / "quantize_config.json").read_text()) == side


@pytest.mark.parametrize(
    ("golden", "before", "after"),
    [
        ("awq-gemm-g32-bias", "4-bit g32", "4-bit asym g32"),
        ("autoround-autoawq-sym-g64", "4-bit sym g64", "4-bit sym g64"),
        ("gptq-4b-sym-g32", "4-bit sym g32", "4-bit sym g32"),
    ],
)
def test_nothing_is_said_of_zeros_that_nobody_saw(golden: str, before: str, after: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / golden)
    found, model = checkpoint.scheme()
    seen = survey(checkpoint, found, model)
    assert {s.describe() for s in model.linears.values()} == {before}
    assert {s.describe() for s in seen.linears.values()} == {after}
