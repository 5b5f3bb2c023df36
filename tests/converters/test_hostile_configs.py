"""Configs made to mislead: keys that change what weights mean, numbers and patterns without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import Draft, Q
from spoil import AWQ, GPTQ, SIDE, Bad, Write, config_text, keys, refused_on_the_way, side

from qplug_converters.errors import QplugError
from qplug_converters.patterns import matcher

CT = "ct-int4-asym-g64"
NF4, INT8 = "bnb-nf4", "bnb-int8"
FAST = "awq-gemv_fast-g64"
ROUND, MIXED, PLANAR = "autoround-gptq-sym-g128", "autoround-mixed-extra", "gptq_p-3b-sym-g128"
WHERE = "quantization_config"
GROUP = f"{WHERE}.config_groups.group_0"


def group(**changes: Any) -> Write:
    """Change a config group of compressed-tensors; `weights_` is merged into its weights."""

    def write(draft: Draft, folder: Path) -> None:
        mine = draft.block["config_groups"]["group_0"]
        mine["weights"] |= changes.pop("weights_", {})
        mine |= changes
        draft.save(folder)

    return write


def block_text(old: str, new: str) -> Write:
    """Change the text of config.json."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save(folder)
        text = (folder / "config.json").read_text()
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new, 1))

    return write


def nested(depth: int) -> Any:
    deep: Any = 0
    for _ in range(depth):
        deep = {"a": deep}
    return deep


MEANINGS = [
    Bad("transforms", CT, keys(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        f"{WHERE}.transform_config", "transforms"),
    Bad("sparse", CT, keys(sparsity_config={"format": "sparse-24-bitmask"}),
        f"{WHERE}.sparsity_config", "'sparse-24-bitmask'"),
    Bad("pruned experts", CT, keys(moe_sparsity_config={"kept": [0]}),
        f"{WHERE}.moe_sparsity_config", "experts"),
    Bad("a status", CT, keys(quantization_status="calibration"), f"{WHERE}.quantization_status",
        "'calibration'"),
    Bad("activations", CT, group(input_activations={"num_bits": 8}), f"{GROUP}.input_activations",
        "quantized activations"),
    Bad("floats", CT, group(weights_={"type": "float"}), f"{GROUP}.weights.type", "'float'"),
    Bad("dynamic weights", CT, group(weights_={"dynamic": True}), f"{GROUP}.weights.dynamic",
        "True"),
    Bad("blocks", CT, group(weights_={"strategy": "block"}), f"{GROUP}.weights.strategy",
        "'block'"),
    Bad("groups of 0", CT, group(weights_={"group_size": 0}), f"{GROUP}.weights.group_size", "0"),
    Bad("groups of -64", CT, group(weights_={"group_size": -64}), f"{GROUP}.weights.group_size",
        "-64"),
    Bad("another packing", CT, group(format="marlin-24"), f"{GROUP}.format", "'marlin-24'"),
    Bad("an order of its own", CT, group(weights_={"actorder": "spiral"}),
        f"{GROUP}.weights.actorder", "'spiral'"),
    Bad("words of 16 bits", GPTQ, keys(pack_dtype="int16"), f"{WHERE}.pack_dtype", "'int16'"),
    Bad("words of 64 bits", GPTQ, keys(pack_dtype="int64"), f"{WHERE}.pack_dtype", "'int64'"),
    Bad("tiles", GPTQ, keys(checkpoint_format="bitblas", format="bitblas"),
        f"{WHERE}.checkpoint_format", "'bitblas'"),
    Bad("microscaled floats", ROUND, keys(data_type="mx_fp"), f"{WHERE}.data_type", "'mx_fp'"),
    Bad("doubly quantized scales", ROUND, keys(super_bits=6, super_group_size=8),
        f"{WHERE}.super_bits", "6"),
    Bad("activations of 8 bits", ROUND, keys(act_bits=8), f"{WHERE}.act_bits", "8"),
    Bad("an unknown packing", ROUND, keys(packing_format="auto_round:nv_fp4"),
        f"{WHERE}.packing_format", "'auto_round:nv_fp4'"),
    Bad("a packing that is a number", ROUND, keys(packing_format=4), WHERE, "4"),
    Bad("floats in one module", MIXED, keys(extra_config={Q: {"data_type": "fp"}}),
        f"extra_config for {Q}.data_type", "'fp'"),
    Bad("groups of 0 in one module", MIXED, keys(extra_config={Q: {"group_size": 0}}),
        f"extra_config for {Q}.group_size", "0"),
    Bad("a module that is a number", MIXED, keys(extra_config={Q: 8}), f"{WHERE}.extra_config",
        "8"),
    Bad("planes of 4 bits", PLANAR, keys(bits=4), Q, "I32"),
    Bad("planes as a stream", PLANAR, keys(pack_dtype="int8"), f"{WHERE}.pack_dtype", "'int8'"),
    Bad("nf5", NF4, keys(bnb_4bit_quant_type="nf5"), f"{WHERE}.bnb_4bit_quant_type", "'nf5'"),
    Bad("storage of 64 bits", NF4, keys(bnb_4bit_quant_storage="int64"),
        f"{WHERE}.bnb_4bit_quant_storage", "'int64'"),
    Bad("storage a number", NF4, keys(bnb_4bit_quant_storage=8), f"{WHERE}.bnb_4bit_quant_storage",
        "8"),
]  # fmt: skip

ENDS = [
    Bad("bits of 400 digits", GPTQ, keys(bits=10**399), f"{WHERE}.bits", "1000000"),
    Bad("bits of 5000 digits", GPTQ, block_text('"bits": 4', '"bits": 4' + "0" * 5000),
        "config.json", "no JSON"),
    Bad("bits infinite", GPTQ, block_text('"bits": 4', '"bits": 1e400'), "configs", "bits inf"),
    Bad("bits NaN", GPTQ, keys(bits=float("nan")), "configs", "bits nan"),
    Bad("bits -4", GPTQ, keys(bits=-4), f"{WHERE}.bits", "-4"),
    Bad("group 10^30", AWQ, keys(group_size=10**30), Q, "group_size 1000000"),
    Bad("group -2^63", GPTQ, keys(group_size=-(1 << 63)), f"{WHERE}.group_size", "-92233720368"),
    Bad("group 2^64", FAST, keys(group_size=1 << 64), Q, "18446744073709551616"),
    Bad("a value of a megabyte", GPTQ, keys(sym="x" * 1_000_000), f"{WHERE}.sym", "'xxx"),
    Bad("a method of lines", GPTQ, keys(quant_method="a\n\x1b[1mb", method="a\n\x1b[1mb"), "source",
        "'a\\n\\x1b[1mb'"),
    Bad("a method no text", GPTQ, keys(quant_method="\ud800", method="\ud800"), "source",
        "\\ud800"),
    Bad("nested 101 deep", GPTQ, keys(meta=nested(101)), "config.json", "more than 100 deep"),
    Bad("nested 900 deep", GPTQ, block_text('"bits"', '"x": ' + "[" * 900 + "]" * 900 + ', "bits"'),
        "config.json", "more than 100 deep"),
    Bad("side nested", GPTQ, side(SIDE, meta=nested(150)), SIDE, "more than 100 deep"),
    Bad("bits twice in the block", GPTQ, block_text('"bits": 4', '"bits": 4, "bits": 8'),
        "config.json", "two entries named 'bits'"),
    Bad("block twice", GPTQ, block_text("{", '{"quantization_config": null, '), "config.json",
        "two entries named 'quantization_config'"),
    Bad("50000 keys and one twice", GPTQ, config_text(
        "{" + ",".join(f'"{n % 49_999}": 0' for n in range(50_000)) + "}"), "config.json",
        "two entries named '0'"),
    Bad("a pattern that recurses", GPTQ, keys(dynamic={"-:" + "(" * 5000 + ")" * 5000: {}}),
        f"{WHERE}.dynamic", "((("),
    Bad("model_type a list", GPTQ, lambda d, f: (d.config.update(model_type=["llama"]),
        d.drop("bits").save(f)), f"{WHERE}.bits", "no such key"),
    Bad("text_config a list", GPTQ, lambda d, f: (d.config.update(text_config=[1]),
        d.drop("bits").save(f)), f"{WHERE}.bits", "no such key"),
    Bad("a block in text_config, of text", GPTQ, lambda d, f: (
        d.config.update(text_config={"quantization_config": "x"}), d.save(f)),
        "config.json text_config", "'x'"),
    Bad("8 bits and 4", INT8, keys(load_in_4bit=True), "", "4"),
]  # fmt: skip


@pytest.mark.parametrize("bad", [*MEANINGS, *ENDS], ids=lambda b: b.name)
def test_refused(bad: Bad, tmp_path: Path) -> None:
    refused_on_the_way(bad, tmp_path)


def test_a_pattern_takes_little_time_for_all_names_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second for each of ten thousand names would be hours."""
    matches = matcher("(.*)(.*)(.*)\\3\\2\\1(?<!proj)$", "here")
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(1000)]
    assert not any(map(matches, names[:10]))
    monkeypatch.setattr("qplug_converters.patterns.ALL_SECONDS", 0.01)
    with pytest.raises(QplugError, match="does not come to an end") as caught:
        any(map(matches, names))
    assert caught.value.where == "here"
