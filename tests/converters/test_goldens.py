"""Checkpoints written by the real tools: bit-equal weights, byte-identical re-encoding.

`reference.safetensors` holds the dequantized weights, checked against the tool that wrote the
checkpoint (tests/golden/README.md).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import laws
import pytest
import torch
from safetensors import safe_open

from qplug_converters import formats
from qplug_converters.checkpoint import Checkpoint, open_checkpoint
from qplug_converters.codec import decode, encode
from qplug_converters.errors import QplugError, Refused
from qplug_converters.execute import execute
from qplug_converters.plan import Plan, Verdict, Wishes, make_plan
from qplug_converters.survey import survey
from qplug_converters.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
READ = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
ACT_ORDER = "gptq-4b-sym-g64-actorder"


def test_the_goldens_are_here() -> None:
    assert len(READ) == 39
    assert all(p.stat().st_size < 1 << 20 for p in GOLDEN.rglob("*"))


@pytest.mark.parametrize("name", READ)
def test_weights_are_those_of_the_tool(name: str) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / name)
    with safe_open(GOLDEN / name / "reference.safetensors", "pt") as reference:
        assert {f"{m}.weight" for m in model.linears} == set(reference.keys())
        for module, scheme in model.linears.items():
            layout = found.layout(scheme)
            stored = {p.name: checkpoint.tensor(f"{module}.{p.name}") for p in layout}
            weight = decode(layout, scheme, stored)
            assert torch.equal(weight.dequantize(), reference.get_tensor(f"{module}.weight"))
            again = encode(layout, weight)
            for part, tensor in stored.items():
                assert again[part].dtype == tensor.dtype
                assert torch.equal(again[part].view(torch.uint8), tensor.view(torch.uint8)), part


@pytest.mark.parametrize("target", [f.name for f in formats.FORMATS])
@pytest.mark.parametrize("name", READ)
def test_every_exact_pair_there_and_back(name: str, target: str, tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / name)
    to = formats.find(target)
    plan = make_plan(found, model, to)
    if plan.verdict > Verdict.EXACT:
        if plan.verdict > Verdict.ROUNDED:
            with pytest.raises(Refused):
                plan.refuse_above(Verdict.ROUNDED)
        if plan.verdict < Verdict.IMPOSSIBLE:
            promised_error(plan, checkpoint, tmp_path / "there")
        return
    execute(plan, checkpoint, tmp_path / "there")
    there = open_checkpoint(tmp_path / "there")
    proof = verify(checkpoint, there)
    assert proof.same, (proof.problems, proof.notes)
    assert len(proof.linears) == len(model.linears)
    if plan.copied_whole:
        for name in checkpoint.headers:
            assert checkpoint.raw(name) == there.raw(name)
        assert there.config == checkpoint.config
    if to.read is None:
        return
    there, to, again = laws.surveyed(tmp_path / "there")
    assert again.notes == () or plan.copied_whole, again.notes
    back = make_plan(to, again, found)
    if back.verdict <= Verdict.EXACT:
        execute(back, there, tmp_path / "back")
        assert verify(checkpoint, open_checkpoint(tmp_path / "back")).same


def promised_error(plan: Plan, checkpoint: Checkpoint, folder: Path) -> None:
    """Convert, and find every weight as near as its step says."""
    execute(plan, checkpoint, folder)
    there = open_checkpoint(folder)
    proof = verify(checkpoint, there)
    assert proof.problems == ()
    assert proof.verdict <= plan.verdict
    said = json.loads((folder / "qplug-certificate.json").read_text())["linears"]
    for step in plan.steps:
        entry = said[step.module]
        assert entry["verdict"] == step.verdict.name
        assert ("relative_error" in entry) is step.refits
        if step.refits:
            assert entry["relative_error"] <= entry["minmax_relative_error"]
            assert entry["relative_error"] < 0.3
            # The bytes have the error that the certificate states.
            report = next(r for r in proof.linears if r.module == step.module)
            assert (report.differing == 0) == (entry["relative_error"] == 0)


@pytest.mark.parametrize(
    ("name", "verdict", "words"),
    [
        (ACT_ORDER, Verdict.REQUANTIZED, "act order"),
        ("gptq-8b-sym-g128", Verdict.REQUANTIZED, "8-bit"),
        ("autogptq-4b-asym-g128", Verdict.REQUANTIZED, "zeros are 16"),
        ("gptq-4b-sym-g32", Verdict.EXACT, "repacked"),
        ("gptq-2b-asym-g32", Verdict.EXACT, "widen(4)"),
        ("gptq-3b-sym-g128-by-5.8.0", Verdict.EXACT, "symmetrize(4)"),
        ("autogptq-4b-sym-ragged-g96", Verdict.EXACT, "split_groups(32)"),
    ],
)
def test_verdicts_to_awq(name: str, verdict: Verdict, words: str) -> None:
    _, found, model = laws.surveyed(GOLDEN / name)
    plan = make_plan(found, model, formats.find("awq-layout"))
    assert plan.verdict is verdict
    assert words in plan.steps[0].reason


def test_requantizing_needs_consent() -> None:
    _, found, model = laws.surveyed(GOLDEN / ACT_ORDER)
    plan = make_plan(found, model, formats.find("awq"))
    with pytest.raises(Refused) as caught:
        plan.refuse_above(Verdict.ROUNDED)
    assert caught.value.exit_code == 3
    assert caught.value.fix.endswith("; or --allow requantized")
    plan.refuse_above(Verdict.REQUANTIZED)


@pytest.mark.parametrize(
    ("name", "target", "wishes"),
    [
        ("gptq-4b-asym-g64", "gptq", Wishes(bits=8, sym=True)),
        ("autogptq-4b-asym-g128", "gptq_v2", Wishes(bits=8)),
        ("awq-gemm-g32-bias", "gptq", Wishes(bits=8)),
        ("gptq-2b-asym-g32", "gptq", Wishes(bits=4, sym=True)),
        ("gptq-3b-asym-g128", "gptq", Wishes(bits=4, sym=True, group_size=32)),
        ("gptq-4b-sym-channel", "awq", Wishes(group_size=64)),
        ("gptq-4b-sym-g64-actorder", "gptq", Wishes(bits=8)),
        ("gptq-dynamic-mixed", "gptq_v2", Wishes(group_size=16)),
    ],
)
def test_exact_moves(name: str, target: str, wishes: Wishes, tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / name)
    plan = make_plan(found, model, formats.find(target), wishes)
    assert plan.verdict is Verdict.EXACT, plan.steps[0]
    execute(plan, checkpoint, tmp_path / "c")
    _, _, again = laws.surveyed(tmp_path / "c")
    assert again.notes == ()
    for scheme in again.linears.values():
        if wishes.bits is not None:
            assert scheme.bits == wishes.bits
        if wishes.sym:
            assert scheme.sym
            assert scheme.zeros is not None
            assert scheme.zeros.symmetric
        if wishes.group_size is not None:
            assert scheme.group_size == wishes.group_size
    assert verify(checkpoint, open_checkpoint(tmp_path / "c")).same


def flagged(source: str, folder: Path, **changes: object) -> Path:
    shutil.copytree(GOLDEN / source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()
    return folder


def test_a_desc_act_flag_with_trivial_g_idx_is_no_act_order(tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(
        flagged("gptq-4b-sym-g32", tmp_path / "c", desc_act=True)
    )
    assert not any(scheme.act_order for scheme in model.linears.values())
    assert "desc_act is true but g_idx is in order" in model.notes[0]
    plan = make_plan(found, model, formats.find("awq"))
    assert plan.verdict is Verdict.EXACT
    execute(plan, checkpoint, tmp_path / "awq")
    assert verify(checkpoint, open_checkpoint(tmp_path / "awq")).same


def test_a_g_idx_that_contradicts_the_flag_is_reported(tmp_path: Path) -> None:
    _, _, model = laws.surveyed(flagged(ACT_ORDER, tmp_path / "c", desc_act=False))
    assert all(scheme.act_order for scheme in model.linears.values())
    assert "desc_act is false but g_idx is not in order" in model.notes[0]


def test_zero_rules(tmp_path: Path) -> None:
    """The producer decides; another rule gives other weights and is in the certificate."""
    checkpoint, found, model = laws.surveyed(GOLDEN / "gptq-4b-asym-g64")
    assert {s.zero_rule for s in model.linears.values()} == {"word"}
    assert any("read by rule `word`" in note for note in model.notes)
    _, forced = checkpoint.scheme(zero_rule="field")
    plan = make_plan(found, survey(checkpoint, found, forced), formats.find("canonical"))
    execute(plan, checkpoint, tmp_path / "forced")
    proof = verify(checkpoint, open_checkpoint(tmp_path / "forced"))
    assert not proof.same
    assert any(r.differing for r in proof.linears)
    written = json.loads((tmp_path / "forced" / "qplug-certificate.json").read_text())
    assert {entry["zero_rule"] for entry in written["linears"].values()} == {"field"}


def test_a_symmetric_file_under_the_wrong_producer_is_read_by_the_rule_that_fits(
    tmp_path: Path,
) -> None:
    """An old 3-bit file whose `meta` was lost decodes to midpoints only by `legacy3`."""
    folder = flagged("gptq-3b-sym-g128-by-5.8.0", tmp_path / "c", meta={})
    _, _, model = laws.surveyed(folder)
    assert {s.zero_rule for s in model.linears.values()} == {"legacy3"}
    assert any("midpoints by rule `legacy3`" in note for note in model.notes)


def test_a_symmetric_file_labelled_with_the_other_version_is_refused(tmp_path: Path) -> None:
    folder = flagged(
        "gptq-4b-sym-g32", tmp_path / "c", checkpoint_format="gptq_v2", format="gptq_v2"
    )
    with pytest.raises(QplugError, match="zeros of a symmetric v1 file"):
        laws.surveyed(folder)


def test_awq_config_is_what_readers_take(tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / "gptq-4b-sym-g128")
    execute(make_plan(found, model, formats.find("awq")), checkpoint, tmp_path / "c")
    block = open_checkpoint(tmp_path / "c").block
    assert block == {
        "bits": 4,
        "group_size": 128,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }


def test_a_router_is_not_listed_where_it_would_unquantize_a_projection(tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / "gptq-moe-mixtral-4b-g64")
    assert "model.layers.0.mlp.gate" in model.dense
    execute(make_plan(found, model, formats.find("awq")), checkpoint, tmp_path / "c")
    block = open_checkpoint(tmp_path / "c").block
    assert block is not None
    skipped = block["modules_to_not_convert"]
    assert skipped
    assert not any(entry in module for entry in skipped for module in model.linears)
