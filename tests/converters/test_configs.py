"""Configs as people have them (`tests/configs`): each yields its scheme, or a reason not to.

`expect` in each file says what a reader of the config alone must come to; `engines_parse` what
other readers made of it, for comparison. A format that is not built is refused by its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qplug_converters.errors import QplugError
from qplug_converters.formats import FORMATS
from qplug_converters.judge import KNOWN_KEYS, Judgement, judge

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))

BUILT = {found.name for found in FORMATS}
CALLED = {
    "awq-gemm": ("awq",),
    "awq-gemv": ("awq_gemv",),
    "awq-gemv_fast": ("awq_gemv_fast",),
    "gptq": ("gptq",),
    "gptq_v2": ("gptq_v2",),
    "compressed-tensors:pack-quantized": ("compressed-tensors",),
    "bnb-4bit": ("bnb-nf4", "bnb-fp4"),
    "bnb-int8": ("bnb-int8",),
    "auto-round:gptq": ("autoround_gptq",),
}
"""What the files call a format, and its names here."""

REFUSED = {
    "autoround_doc_auto_gptq": ("'auto-gptq'", "did you mean 'gptq'?"),
    "autoround_gptq_twin": ("group_size", "no such key"),
    "awq_bits_only": ("group_size", "no such key"),
    "awq_marlin_version": ("version", "marlin"),
    "awq_quant_type_odd": ("bits and w_bit", "8 and 4"),
    "ct_fp8_naive": ("naive-quantized", "for quantized activations"),
    "ct_naive_w8a8": ("naive-quantized", "quantized activations"),
    "ct_nvfp4_autoround": ("nvfp4-pack-quantized", "NVFP4"),
    "ct_old_key_compression_config": ("int-quantized", "quantized activations"),
    "fp8_block_deepseek": ("quant_method 'fp8'", "another tool's format"),
    "fp8_scheme_typo": ("quant_method 'fp8'", "another tool's format"),
    "gptq_bits_string": ("bits", "found '4', expected a JSON integer"),
    "gptq_group_zero": ("group_size", "found 0, expected -1 or a positive number"),
    "gptq_planar_6bit": ("quantization_config.bits", "6 (planar"),
    "gptq_v2_side_wins": ("group_size -1 in config.json and 32 in quantize_config.json",),
    "gptq_webgpu_unknown_keys": ("'mixed_precision', 'modules_not_quantized'",),
    "hqq_dict": ("quant_method 'hqq'", "another tool's format"),
    "litgpt_null_quant_method": ("nothing that names the layout",),
    "marlin_checkpoint_format": ("checkpoint_format", "Marlin tiles"),
    "marlin_flag_true": ("checkpoint_format", "Marlin tiles"),
    "modelopt_fp8_kv_fp8": ("ModelOpt",),
    "modelopt_w8a16": ("ModelOpt",),
    "mxfp4_gpt_oss": ("quant_method 'mxfp4'", "another tool's format"),
    "onnx_same_filename_1": ("ONNX",),
    "openvino_awq": ("OpenVINO",),
}
"""What the refusal of each says."""


def case(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return found


def files(found: dict[str, Any]) -> dict[str, Any]:
    """Return the files that a case stands for, by name."""
    config: dict[str, Any] = found["config"]
    if " + " in found["file"]:
        return config
    name, colon, key = found["file"].partition(":")
    if name in config:
        return {name: config[name]}
    return {name: {key: config} if colon else config}


def judged(name: str) -> Judgement:
    return judge(files(case(name)))


def reasons(error: QplugError) -> str:
    """Return everything an error says."""
    return " ".join(f"{one} {one.fix}" for one in (error, *error.others))


def test_every_refusal_is_looked_at() -> None:
    assert {name for name in NAMES if not case(name)["expect"]["accept"]} == REFUSED.keys()
    assert len(NAMES) == 78


@pytest.mark.parametrize("name", NAMES)
def test_expected(name: str) -> None:
    expect = case(name)["expect"]
    if not expect["accept"]:
        with pytest.raises(QplugError) as caught:
            judged(name)
        for told in REFUSED[name]:
            assert told in reasons(caught.value)
        return
    names = CALLED[expect["format"]]
    if not BUILT & set(names):
        with pytest.raises(QplugError, match=r"quant_method|nothing that names the layout"):
            judged(name)
        return
    found = judged(name)
    base = found.claim.base
    assert found.format.name in names
    assert (base.bits, base.group_size) == (expect["bits"], expect["group_size"])
    if found.format.name.startswith("awq"):
        # `zero_point: true` says that zeros are stored, not that they differ from the midpoint.
        assert (base.sym is True) is expect["sym"]
    elif not expect["format"].startswith("bnb"):
        assert base.sym is expect["sym"]
    in_force = base.desc_act and base.group_size != -1
    if expect.get("decided_by") == "g_idx":
        assert any("g_idx decides" in note for note in found.notes)
    elif expect["desc_act"] is not None:
        assert in_force is expect["desc_act"]
    if "desc_act_flag" in expect:
        assert base.desc_act is expect["desc_act_flag"]
    if "lm_head" in expect:
        assert found.claim.lm_head is expect["lm_head"]


def test_modules_have_schemes_of_their_own() -> None:
    claim = judged("gptq_dynamic_skip_and_8bit").claim
    for module, expected in case("gptq_dynamic_skip_and_8bit")["expect"]["modules"].items():
        if expected == "dense":
            assert claim.skip(module) is not None
        else:
            stated = claim.of(module)
            assert claim.skip(module) is None
            assert {key: getattr(stated, key) for key in expected} == expected


def test_names_of_what_is_left_dense() -> None:
    claim = judged("awq_deepseek_v32_prefixes").claim
    skipped = case("awq_deepseek_v32_prefixes")["expect"]["skip_examples"]
    assert {module: claim.skip(module) is not None for module in skipped} == skipped
    assert judged("awq_qwen2_vl_visual").claim.skip("visual.blocks.0.mlp.fc1") == "visual"


def test_two_files_of_one_checkpoint(tmp_path: Path) -> None:
    """`desc_act` alone may differ; it is said which file says what."""
    notes = judged("gptq_sides_disagree_desc_act").notes
    assert notes[0] == (
        "desc_act is false in config.json and true in quantize_config.json: g_idx decides"
    )


def test_keys_of_checkpoints_are_known(golden: Path) -> None:
    """What real tools wrote is never refused for a key."""
    for path in golden.glob("*/config.json"):
        block = json.loads(path.read_text()).get("quantization_config", {})
        unknown = {key for key in block if not key.startswith("enable_")} - KNOWN_KEYS
        assert not unknown, path


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({}, "nothing that names the layout"),
        ({"model_type": "llama"}, "no quantization_config"),
        ({"quantization_config": []}, "expected a JSON object"),
        ([], "expected a JSON object"),
    ],
)
def test_what_is_no_config(value: Any, told: str) -> None:
    with pytest.raises(QplugError, match=told):
        judge({"config.json": value})
