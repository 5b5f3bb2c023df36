"""Configs that are broken, or contradict each other, the tensors or the readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import Command, Draft, Q
from spoil import (
    AWQ,
    GATE,
    GPTQ,
    SIDE,
    SYM,
    Bad,
    config_text,
    folder_as_config,
    keys,
    refused_by_command,
    refused_by_library,
    side,
    v2_written_as_v1,
)

CONFIGS = [
    Bad("broken", GPTQ, config_text('{"a": '), "config.json", "no JSON"),
    Bad("empty", GPTQ, config_text(""), "config.json", "no JSON"),
    Bad("no text", GPTQ, config_text(b"\xff\xfe\x00{"), "config.json", "no JSON"),
    Bad("a list", GPTQ, config_text("[1]"), "config.json", "a JSON list"),
    Bad("null", GPTQ, config_text("null"), "config.json", "a JSON"),
    Bad("nested", GPTQ, config_text('{"a":' * 100_000), "config.json", "no JSON"),
    Bad("nested whole", GPTQ, config_text("[" * 99_999 + "]" * 99_999), "config.json", "no JSON"),
    Bad("a key twice", GPTQ, config_text('{"a": 1, "a": 2}'), "config.json", "two entries named"),
    Bad("a folder", GPTQ, folder_as_config, "config.json", "no regular file"),
    Bad("block is text", GPTQ, lambda d, f: (d.config.update(quantization_config="gptq"),
        d.save(f)), "config.json quantization_config", "'gptq'"),
    Bad("side bits", GPTQ, side(SIDE, bits=8), "configs", "bits 4 in config.json"),
    Bad("side groups", GPTQ, side(SIDE, group_size=32), "configs", "group_size"),
    Bad("side sym", GPTQ, side(SIDE, sym=True), "configs", "sym False"),
    Bad("side v2", GPTQ, side(SIDE, checkpoint_format="gptq_v2"), "configs",
        "checkpoint_format 'gptq'"),
    Bad("side method", GPTQ, side(SIDE, quant_method="awq"), "configs",
        "quant_method 'gptq'"),
    Bad("side alias", AWQ, side("quant_config.json", bits=None, w_bit=3), "configs", "bits 4"),
    Bad("side version", AWQ, side("quant_config.json", version="GEMV"), "configs", "version"),
    Bad("side broken", GPTQ, lambda d, f: (d.save(f),
        (f / "quantize_config.json").write_text("{")), "quantize_config.json", "no JSON"),
]  # fmt: skip

CONTRADICTIONS = [
    Bad("8 bits", GPTQ, keys(bits=8), f"{GATE}.qweight", "I32[16, 128]"),
    Bad("3 bits", GPTQ, keys(bits=3), f"{GATE}.qweight", "I32[16, 128]"),
    Bad("5 bits", GPTQ, keys(bits=5), "quantization_config.bits", "5"),
    Bad("0 bits", GPTQ, keys(bits=0), "quantization_config.bits", "0"),
    Bad("no bits", GPTQ, lambda d, f: d.drop("bits").save(f), "bits", "no such key"),
    Bad("bits as text", GPTQ, keys(bits="4"), "quantization_config.bits", "'4'"),
    Bad("bits as a fraction", GPTQ, keys(bits=4.0), "quantization_config.bits", "4.0"),
    Bad("bits as true", GPTQ, keys(bits=True), "quantization_config.bits", "True"),
    Bad("bits as a list", GPTQ, keys(bits=[4]), "quantization_config.bits", "[4]"),
    Bad("two bits", GPTQ, keys(w_bit=8), "bits and w_bit", "4 and 8"),
    Bad("group too large", GPTQ, keys(group_size=128), f"{GATE}.qzeros", "I32[2, 16]"),
    Bad("group too small", GPTQ, keys(group_size=32), f"{GATE}.qzeros", "I32[2, 16]"),
    Bad("channelwise", GPTQ, keys(group_size=-1), f"{GATE}.qzeros", "I32[2, 16]"),
    Bad("group 0", GPTQ, keys(group_size=0), "quantization_config.group_size", "0"),
    Bad("group -2", GPTQ, keys(group_size=-2), "quantization_config.group_size", "-2"),
    Bad("group as text", GPTQ, keys(group_size="64"), "quantization_config.group_size", "'64'"),
    Bad("sym as text", GPTQ, keys(sym="false"), "quantization_config.sym", "'false'"),
    Bad("sym as a number", GPTQ, keys(sym=0), "quantization_config.sym", "0"),
    Bad("desc_act as text", GPTQ, keys(desc_act="no"), "quantization_config.desc_act", "'no'"),
    Bad("words", GPTQ, keys(pack_dtype="int16"), "quantization_config.pack_dtype", "'int16'"),
    Bad("dynamic a list", GPTQ, keys(dynamic=[1]), "quantization_config.dynamic", "[1]"),
    Bad("dynamic no regex", GPTQ, keys(dynamic={"+:(": {}}), "quantization_config.dynamic", "+:("),
    Bad("dynamic no object", GPTQ, keys(dynamic={"+:.*": 4}), "quantization_config.dynamic", "4"),
    Bad("dynamic text", GPTQ, keys(dynamic={"+:.*": {"bits": "4"}}), "dynamic for model", "'4'"),
    Bad("dynamic bits", GPTQ, keys(dynamic={"+:.*": {"bits": 7}}), f"{GATE}.bits", "7"),
    Bad("dynamic group", GPTQ, keys(dynamic={"+:.*": {"group_size": 0}}), GATE, "group_size 0"),
    Bad("dynamic skip", GPTQ, keys(dynamic={"-:.*q_proj": {}}), f"{Q}.qweight", "a quantized lin"),
    Bad("marlin", GPTQ, keys(checkpoint_format="marlin", format="marlin"), "format", "'marlin'"),
    Bad("marlin flag", GPTQ, keys(is_marlin_format=True), "format", "'marlin'"),
    Bad("odd format", GPTQ, keys(checkpoint_format="v9", format="v9"), "format", "'v9'"),
    Bad("format number", GPTQ, keys(checkpoint_format=2, format=2), "checkpoint_format", "2"),
    Bad("two formats", GPTQ, keys(format="gptq_v2"), "checkpoint_format and format", "'gptq' and"),
    Bad("v1 called v2", SYM, keys(checkpoint_format="gptq_v2", format="gptq_v2"),
        f"{GATE}.qzeros", "zeros of a symmetric v1 file", data=True),
    Bad("v2 called v1", SYM, v2_written_as_v1, f"{GATE}.qzeros", "a symmetric v2 file", data=True),
    Bad("planar", "gptq_p-3b-sym-g128", keys(bits=6), "quantization_config.bits", "6 (planar"),
    Bad("unknown method", GPTQ, keys(quant_method="hqq", method="hqq"), "", "quant_method 'hqq'"),
    Bad("method number", GPTQ, keys(quant_method=5, method=5), "", "quant_method 5"),
    Bad("AWQ called GPTQ", AWQ, keys(quant_method="gptq"), "quant_method", "stored as 'gemm'"),
    Bad("GPTQ called AWQ", GPTQ, keys(quant_method="awq", method="awq", format="gemm",
        checkpoint_format=None), "quant_method", "stored as 'gptq'"),
    Bad("gemv tensors as gemm", "awq-gemv-g64", keys(version="gemm"), "version", "as 'gemv'"),
    Bad("gemm called gemv", AWQ, keys(version="gemv"), "quantization_config.version", "'gemv'"),
    Bad("awq 8 bits", AWQ, keys(bits=8), "quantization_config.bits", "8"),
    Bad("awq bits as text", AWQ, keys(bits="4"), "quantization_config.bits", "'4'"),
    Bad("awq group", AWQ, keys(group_size=64), f"{GATE}.qzeros", "I32[1, 16]"),
    Bad("awq odd group", AWQ, keys(group_size=96), f"{GATE}.qweight", "group_size 96"),
    Bad("awq group 0", AWQ, keys(group_size=0), "quantization_config.group_size", "0"),
    Bad("awq group -2", AWQ, keys(group_size=-2), "quantization_config.group_size", "-2"),
    Bad("awq zero_point", AWQ, keys(zero_point="true"), "quantization_config.zero_point", "'true'"),
    Bad("awq skip text", AWQ, keys(modules_to_not_convert="lm_head"), "not_convert", "'lm_head'"),
    Bad("awq no config", AWQ, lambda d, f: d.drop(*d.block).set(quant_method="awq").save(f),
        "quantization_config.bits", "no such key"),
]  # fmt: skip

ALL = [*CONFIGS, *CONTRADICTIONS]


@pytest.mark.parametrize("bad", [b for b in ALL if not b.data], ids=lambda b: b.name)
def test_library(bad: Bad, tmp_path: Path) -> None:
    refused_by_library(bad, tmp_path)


@pytest.mark.parametrize("bad", ALL, ids=lambda b: b.name)
def test_command_line(bad: Bad, tmp_path: Path, qplug: Command) -> None:
    refused_by_command(bad, tmp_path, qplug)


def test_all_problems_at_once(tmp_path: Path, qplug: Command) -> None:
    """Ten are shown and the rest counted."""
    draft = Draft.of("gptq-moe-mixtral-4b-g64")
    for name in list(draft.tensors):
        if name.endswith(".qzeros"):
            del draft.tensors[name]
    ran = qplug("inspect", draft.save(tmp_path / "source"))
    assert ran.code == 1
    assert len(ran.errors) == 10
    count = sum(name.endswith(".qweight") for name in draft.tensors)
    assert f"and {count - 10} more problems" in ran.err
    ran = qplug("inspect", tmp_path / "source", "--json")
    assert ran.error["count"] == count
