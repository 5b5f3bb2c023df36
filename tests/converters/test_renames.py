"""Names of other tools: written as the target's readers want them, and proven."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import laws
import pytest
import torch

from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.execute import execute
from qplug_converters.plan import Plan, Verdict, make_plan
from qplug_converters.scheme import Scheme
from qplug_converters.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def planned(folder: Path, to: str) -> Plan:
    checkpoint, found, model = laws.surveyed(folder)
    return make_plan(
        found,
        model,
        formats.find(to),
        headers=checkpoint.headers,
        model_type=checkpoint.model_type,
    )


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_experts_take_the_names_of_the_target(to: str, tmp_path: Path) -> None:
    source = open_checkpoint(GOLDEN / "gptq-moe-mixtral-4b-g64")
    plan = planned(source.folder, to)
    execute(plan, source, tmp_path / "b")
    there = open_checkpoint(tmp_path / "b")
    experts = {name for name in there.headers if ".experts." in name}
    assert experts
    assert all(".block_sparse_moe.experts." in name for name in experts)
    assert "model.layers.0.block_sparse_moe.gate.weight" in there.headers
    said = json.loads((tmp_path / "b" / "qplug-certificate.json").read_text())
    old = "model.layers.0.mlp.experts.0.gate_proj"
    assert said["renamed"][old] == ["model.layers.0.block_sparse_moe.experts.0.w1"]
    assert said["linears"][old]["name"] == "model.layers.0.block_sparse_moe.experts.0.w1"
    block = there.config["quantization_config"]
    left = block.get("modules_to_not_convert") or block["ignore"]
    # AutoAWQ looks for entries in what follows `layers.0.`.
    inside = "block_sparse_moe.gate"
    assert (inside if to == "awq" else f"model.layers.0.{inside}") in left
    proof = verify(source, there)
    assert proof.same, proof
    _, _, model = laws.surveyed(tmp_path / "b")
    assert {m.rpartition(".")[2] for m in model.linears if "experts" in m} == {"w1", "w2", "w3"}
    back = planned(tmp_path / "b", "gptq")
    assert back.verdict is Verdict.EXACT
    execute(back, there, tmp_path / "c")
    assert set(open_checkpoint(tmp_path / "c").headers) == set(source.headers)


def test_a_changed_expert_is_found_under_its_other_name(tmp_path: Path) -> None:
    source = open_checkpoint(GOLDEN / "gptq-moe-mixtral-4b-g64")
    execute(planned(source.folder, "awq"), source, tmp_path / "b")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.qweight"
    laws.mutate_tensor(tmp_path / "b", tmp_path / "c", name, "bit", 3)
    assert laws.found(source, tmp_path / "c") == "verify"
    swapped = tmp_path / "d"
    shutil.copytree(tmp_path / "b", swapped)
    raw = (swapped / "model.safetensors").read_bytes()
    raw = raw.replace(b"experts.0.w1.qweight", b"experts.9.w1.qweight")
    raw = raw.replace(b"experts.1.w1.qweight", b"experts.0.w1.qweight")
    raw = raw.replace(b"experts.9.w1.qweight", b"experts.1.w1.qweight")
    (swapped / "model.safetensors").write_bytes(raw)
    assert laws.found(source, swapped) == "verify"


@pytest.mark.parametrize(
    ("scale", "names"),
    [
        ("self_attn.k_proj.output_scale", ["self_attn.k_scale"]),
        ("self_attn.kv_scale", ["self_attn.k_scale", "self_attn.v_scale"]),
        ("self_attn.k_scale", ["self_attn.k_scale"]),
    ],
)
def test_scales_of_the_cache_are_carried(scale: str, names: list[str], tmp_path: Path) -> None:
    awq = formats.find("awq")
    scheme = awq.adopt(Scheme(64, 64, 4, 32))
    linears = {"model.layers.0.mlp.up_proj": (scheme, laws.weight_of(scheme, awq, 1))}
    rest = {f"model.layers.0.{scale}": torch.tensor([0.25])}
    source = laws.write(tmp_path / "a", awq, linears, rest)
    execute(planned(tmp_path / "a", "compressed-tensors"), source, tmp_path / "b")
    there = open_checkpoint(tmp_path / "b")
    for name in names:
        assert there.tensor(f"model.layers.0.{name}") == 0.25
    assert len(there.headers) == 4 + len(names)
    assert there.config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert verify(source, there).same
    assert verify(there, source).same
