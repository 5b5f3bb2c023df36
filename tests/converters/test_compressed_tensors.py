"""compressed-tensors: configs, both packings, unpacked zero points, g_idx, targets."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.codec import decode, encode
from qplug_converters.errors import QplugError, Refused
from qplug_converters.execute import execute
from qplug_converters.formats import canonical, compressed_tensors, find, gptq_v2
from qplug_converters.patterns import finder
from qplug_converters.plan import Verdict, Wishes, make_plan
from qplug_converters.scheme import ModelScheme, Scheme
from qplug_converters.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
CT = compressed_tensors.FORMAT
LINEAR = "model.layers.0.mlp.down_proj"


def block(**changes: Any) -> dict[str, Any]:
    """Return a config block; `weights` and `group` change those of its only group."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}
    weights |= {"strategy": "group"} | changes.pop("weights", {})
    group = {"targets": ["Linear"], "weights": weights} | changes.pop("group", {})
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return base | {"config_groups": {"group_0": group}} | changes


def edited(source: str, folder: Path, tensors: Any = None, **changes: Any) -> Path:
    """Copy a golden; `tensors` changes its tensors, `changes` its config block."""
    shutil.copytree(GOLDEN / source, folder)
    (folder / "reference.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        stored = load_file(folder / "model.safetensors")
        tensors(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def written_block(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return dict(found["quantization_config"])


# Config -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "ct-int3-sym-g128",
        "ct-int4-asym-g64",
        "ct-int4-sym-g128-kv-fp8",
    ],
)
def test_what_is_written_is_what_the_tool_writes(name: str) -> None:
    """The same keys in the same order; `observer`, how the scales were found, is not known."""
    _, _, model = laws.surveyed(GOLDEN / name)
    adopted = {module: CT.adopt(scheme) for module, scheme in model.linears.items()}
    wanted = written_block(GOLDEN / name)
    del wanted["config_groups"]["group_0"]["weights"]["observer"]
    assert json.dumps(CT.write(replace(model, linears=adopted)).block) == json.dumps(wanted)


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format", "NVFP4"),
        ({"format": "mxfp4-pack-quantized"}, "format", "MXFP4"),
        ({"format": "float-quantized"}, "format", "float8"),
        ({"format": "naive-quantized"}, "format", "unpacked"),
        ({"format": "int-quantized"}, "format", "int8"),
        ({"format": "zip"}, "format", "unknown packing"),
        ({"group": {"format": "float-quantized"}}, "config_groups.group_0.format", "float8"),
        (
            {"format": "mixed-precision", "group": {"format": "nvfp4-pack-quantized"}},
            "config_groups.group_0.format",
            "NVFP4",
        ),
        (
            {"group": {"input_activations": {"num_bits": 8}}},
            "config_groups.group_0.input_activations",
            "quantized activations",
        ),
        ({"weights": {"type": "float"}}, "config_groups.group_0.weights.type", "float"),
        ({"weights": {"num_bits": 9}}, "config_groups.group_0.weights.num_bits", "9"),
        ({"weights": {"num_bits": "4"}}, "config_groups.group_0.weights.num_bits", "'4'"),
        ({"weights": {"dynamic": True}}, "config_groups.group_0.weights.dynamic", "True"),
        ({"weights": {"strategy": "block"}}, "config_groups.group_0.weights.strategy", "block"),
        ({"weights": {"strategy": "channel"}}, "config_groups.group_0.weights.group_size", "32"),
        ({"weights": {"group_size": 0}}, "config_groups.group_0.weights.group_size", "0"),
        ({"weights": {"actorder": "maybe"}}, "config_groups.group_0.weights.actorder", "maybe"),
        ({"group": {"targets": []}}, "config_groups.group_0.targets", "[]"),
        ({"group": {"targets": ["re:("]}}, "config_groups", "missing )"),
        ({"group": {"weights": None}}, "config_groups.group_0.weights", "null"),
        ({"config_groups": {}}, "config_groups", "no group"),
        ({"config_groups": {"FP8": ["Linear"]}}, "config_groups.FP8", "Linear"),
        ({"ignore": [4]}, "ignore", "4"),
        ({"transform_config": {"config_groups": {}}}, "transform_config", "transforms"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config", "sparse-24"),
        ({"moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config", "experts"),
        ({"kv_cache_scheme": {}}, "kv_cache_scheme", "{}"),
        ({"quantization_status": "calibration"}, "quantization_status", "calibration"),
    ],
)
def test_what_is_not_read_is_named(changes: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(QplugError) as caught:
        compressed_tensors.parse(block(**changes))
    assert caught.value.where == f"quantization_config.{where}"
    assert words in caught.value.found
    assert caught.value.fix


def test_every_problem_of_a_config_is_told_at_once() -> None:
    with pytest.raises(QplugError) as caught:
        compressed_tensors.parse(block(weights={"num_bits": 9, "type": "float"}, ignore=3))
    assert len([caught.value, *caught.value.others]) == 3


@pytest.mark.parametrize(
    ("changes", "bits", "group_size", "sym", "desc_act"),
    [
        ({}, 4, 32, True, False),
        ({"format": "mixed-precision", "group": {"format": "pack-quantized"}}, 4, 32, True, False),
        ({"format": None}, 4, 32, True, False),
        ({"sparsity_config": {"format": "dense"}}, 4, 32, True, False),
        ({"weights": {"strategy": "channel", "group_size": -1}}, 4, -1, True, False),
        ({"weights": {"strategy": None, "group_size": -1}}, 4, -1, True, False),
        ({"weights": {"strategy": "tensor", "group_size": None}}, 4, None, True, False),
        ({"weights": {"num_bits": None, "symmetric": None}}, 8, 32, True, False),
        ({"weights": {"actorder": "group"}}, 4, 32, True, True),
        ({"weights": {"actorder": True}}, 4, 32, True, True),
        ({"weights": {"actorder": "static"}}, 4, 32, True, False),
        ({"config_groups": {"W3A16": ["Linear"]}}, 3, 128, True, False),
        ({"config_groups": {"w4a16_asym": ["Linear"]}}, 4, 128, False, False),
    ],
)
def test_aliases_and_defaults(
    changes: dict[str, Any], bits: int, group_size: int | None, sym: bool, desc_act: bool
) -> None:
    base = compressed_tensors.parse(block(**changes)).base
    found = (base.bits, base.group_size, base.sym, base.desc_act)
    assert found == (bits, group_size, sym, desc_act)


NAMES = ["lm_head", "a.q_proj", "a.k_proj", "a.b.q_proj", "model.embed_tokens"]
TARGETS = ["Linear", "Embedding", "Module", "Conv2d", "re:a.*", "re:.*q_proj$", "re:q_proj", *NAMES]


@settings(max_examples=200, deadline=None)
@given(targets=st.lists(st.sampled_from(TARGETS), unique=True), name=st.sampled_from(NAMES))
def test_targets_match_as_the_tool_does(targets: list[str], name: str) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    module = torch.nn.Embedding(1, 1) if "embed" in name else torch.nn.Linear(1, 1)
    wanted = match.match_targets(name, module, targets)
    assert finder(targets, "targets")(name) == (wanted[0] if wanted else None)


def test_an_expression_that_does_not_come_to_an_end_is_refused() -> None:
    claim = compressed_tensors.parse(block(group={"targets": ["re:^(a|aa|a?)+$", "Linear"]}))
    with pytest.raises(QplugError, match="does not come to an end"):
        claim.of("a" * 64 + "b")


def test_several_schemes_are_several_groups_that_name_modules() -> None:
    four, eight = Scheme(8, 64, 4, 32, sym=True), Scheme(8, 64, 8, 64, sym=False)
    model = ModelScheme("gptq", {"a": four, "b": eight, "c": four}, ("a.gate", "lm_head"))
    written = CT.write(model).block
    assert written is not None
    groups = written["config_groups"]
    assert {name: group["targets"] for name, group in groups.items()} == {
        "group_0": ["a", "c"],
        "group_1": ["b"],
    }
    assert groups["group_1"]["weights"]["strategy"] == "channel"
    assert groups["group_1"]["weights"]["group_size"] is None
    assert written["ignore"] == ["a.gate", "lm_head"]
    claim = compressed_tensors.parse(written)
    assert (claim.of("c").bits, claim.of("b").bits, claim.of("b").sym) == (4, 8, False)
    assert claim.skip("a.gate") == "a.gate"


def test_one_group_a_row_is_the_strategy_channel() -> None:
    schemes = {"a": Scheme(8, 64, 8, 64, sym=True), "b": Scheme(8, 128, 8, 128, sym=True)}
    written = CT.write(ModelScheme("gptq", schemes)).block
    assert written is not None
    wanted = written_block(GOLDEN / "ct-int8-sym-channel")["config_groups"]["group_0"]["weights"]
    del wanted["observer"]
    assert written["config_groups"]["group_0"]["weights"] == wanted


def test_the_old_name_of_the_block(tmp_path: Path) -> None:
    folder = edited("ct-int4-asym-g64", tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint, found, model = laws.surveyed(folder)
    assert found is CT
    execute(make_plan(found, model, gptq_v2.FORMAT), checkpoint, tmp_path / "b")
    assert verify(checkpoint, open_checkpoint(tmp_path / "b")).same
    assert "compression_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


# Packings ---------------------------------------------------------------------------------------


def test_the_old_packing_is_written_anew(tmp_path: Path) -> None:
    """No release from 0.18 on reads it: a copy would stay what nobody loads."""
    checkpoint, found, model = laws.surveyed(GOLDEN / "ct-int3-asym-g128-fields")
    assert {scheme.per_word for scheme in model.linears.values()} == {10}
    plan = make_plan(found, model, CT)
    assert plan.verdict is Verdict.EXACT
    assert not plan.copied_whole
    execute(plan, checkpoint, tmp_path / "a")
    there, found, model = laws.surveyed(tmp_path / "a")
    assert {scheme.per_word for scheme in model.linears.values()} == {0}
    assert written_block(tmp_path / "a")["version"] == "0.20.0"
    assert verify(checkpoint, there).same
    assert make_plan(found, model, CT).verdict is Verdict.COPIED


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize(("inp", "version"), [(96, None), (20, "0.17.1"), (20, "0.9.4")])
def test_old_packings_of_every_width(
    bits: int, inp: int, version: str | None, tmp_path: Path
) -> None:
    """Where both packings have the same number of words, the release tells them apart."""
    scheme = Scheme(40, inp, bits, inp, sym=False, scale_dtype="BF16", per_word=32 // bits)
    weight = laws.weight_of(scheme, CT, bits)
    laws.round_trip(CT, scheme, weight)
    laws.blocks_equal_whole(CT, scheme, weight)
    original = laws.write(tmp_path / "a", CT, {LINEAR: (scheme, weight)})
    laws.mutate_config(tmp_path / "a", tmp_path / "b", "version", version)
    _, _, model = laws.surveyed(tmp_path / "b")
    found = model.linears[LINEAR]
    words = [-(-inp * bits // 32), -(-inp // (32 // bits))]
    if version is None and words[0] == words[1]:
        pytest.fail("a case that a file without a version cannot decide")
    assert found.per_word == 32 // bits
    stored = {p.name: original.tensor(f"{LINEAR}.{p.name}") for p in CT.layout(found)}
    assert torch.equal(decode(CT.layout(found), found, stored).codes, weight.codes)


def test_rows_that_do_not_fill_their_words(tmp_path: Path) -> None:
    """in_features come from weight_shape; the padding is zero."""
    scheme = Scheme(7, 45, 3, 15, sym=False, scale_dtype="F32")
    weight = laws.weight_of(scheme, CT, 1)
    original = laws.write(tmp_path / "a", CT, {LINEAR: (scheme, weight)})
    assert original.headers[f"{LINEAR}.weight_packed"].shape == (7, 5)
    assert original.headers[f"{LINEAR}.weight_zero_point"].shape == (1, 3)
    found, model = original.scheme()
    assert model.linears[LINEAR].in_features == 45
    layout = found.layout(model.linears[LINEAR])
    stored = {part.name: original.tensor(f"{LINEAR}.{part.name}") for part in layout}
    assert laws.same(decode(layout, scheme, stored), weight)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_scale_for_the_whole_linear(bits: int, sym: bool, tmp_path: Path) -> None:
    scheme = Scheme(32, 64, bits, 64, sym=sym, scale_dtype="F16", shared=True)
    weight = laws.weight_of(replace(scheme, out_features=1), CT, 3)
    grid = replace(
        weight.grid, scales=weight.grid.scales.expand(32, 1), zeros=weight.grid.zeros.expand(32, 1)
    )
    weight = replace(weight, codes=weight.codes.expand(32, 64).contiguous(), grid=grid)
    layout = CT.layout(scheme)
    stored = encode(layout, weight)
    assert list(stored["weight_scale"].shape) == [1]
    if not sym:
        assert stored["weight_zero_point"].dtype == torch.int8
        signed = int(stored["weight_zero_point"]) + (1 << (bits - 1))
        assert signed == int(weight.grid.zeros[0, 0])
    assert laws.same(decode(layout, scheme, stored), weight)
    original = laws.write(tmp_path / "a", CT, {LINEAR: (scheme, weight)})
    config = written_block(tmp_path / "a")
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "tensor", "group_size": None}
    laws.mutate_config(tmp_path / "a", tmp_path / "b", "config_groups", config["config_groups"])
    original, found, model = laws.surveyed(tmp_path / "b")
    assert model.linears[LINEAR].shared
    assert make_plan(found, model, CT).verdict is Verdict.COPIED
    for target in (canonical.FORMAT, gptq_v2.FORMAT):
        plan = make_plan(found, model, target)
        assert plan.verdict is Verdict.EXACT
        execute(plan, original, tmp_path / target.name)
        assert verify(original, open_checkpoint(tmp_path / target.name)).same
    wider = make_plan(found, model, CT, Wishes(bits=8))
    execute(wider, original, tmp_path / "wider")
    assert verify(original, open_checkpoint(tmp_path / "wider")).same


def test_a_short_weight_shape(tmp_path: Path) -> None:
    def narrow(stored: dict[str, torch.Tensor]) -> None:
        for name in stored:
            if name.endswith("weight_shape"):
                stored[name] = stored[name].int()

    folder = edited("ct-int4-asym-g64", tmp_path / "a", narrow)
    checkpoint, found, model = laws.surveyed(folder)
    assert make_plan(found, model, CT).verdict is Verdict.COPIED
    execute(make_plan(found, model, gptq_v2.FORMAT), checkpoint, tmp_path / "b")
    assert verify(
        open_checkpoint(GOLDEN / "ct-int4-asym-g64"), open_checkpoint(tmp_path / "b")
    ).same


# Act order --------------------------------------------------------------------------------------


def test_act_order_is_read_and_never_written(tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / "ct-int4-asym-g64-gidx")
    assert all(scheme.act_order for scheme in model.linears.values())
    plan = make_plan(found, model, CT)
    assert plan.verdict is Verdict.REQUANTIZED
    with pytest.raises(Refused, match="act order"):
        plan.refuse_above(Verdict.ROUNDED)
    plan = make_plan(found, model, gptq_v2.FORMAT)
    assert plan.verdict is Verdict.ROUNDED or plan.verdict is Verdict.EXACT
    execute(plan, checkpoint, tmp_path / "a")
    assert verify(checkpoint, open_checkpoint(tmp_path / "a")).verdict <= plan.verdict


@pytest.mark.parametrize("kind", ["in order", "never set"])
def test_a_g_idx_that_says_nothing_is_dropped(kind: str, tmp_path: Path) -> None:
    def flatten(stored: dict[str, torch.Tensor]) -> None:
        for name in stored:
            if name.endswith("weight_g_idx"):
                stored[name] = torch.arange(len(stored[name]), dtype=torch.int32) // 64
                if kind == "never set":
                    stored[name][3:] = -1

    folder = edited("ct-int4-asym-g64-gidx", tmp_path / "a", flatten)
    checkpoint, found, model = laws.surveyed(folder)
    assert not any(scheme.act_order for scheme in model.linears.values())
    assert "actorder is group but weight_g_idx is in order" in model.notes[0]
    plan = make_plan(found, model, CT)
    assert plan.verdict is Verdict.EXACT
    execute(plan, checkpoint, tmp_path / "b")
    there, _, again = laws.surveyed(tmp_path / "b")
    assert not any("g_idx" in name for name in there.headers)
    assert again.notes == ()
    assert verify(checkpoint, there).same


def test_a_g_idx_that_the_flag_denies_is_reported(tmp_path: Path) -> None:
    groups = written_block(GOLDEN / "ct-int4-asym-g64-gidx")["config_groups"]
    groups["group_0"]["weights"]["actorder"] = None
    folder = edited("ct-int4-asym-g64-gidx", tmp_path / "a", config_groups=groups)
    _, _, model = laws.surveyed(folder)
    assert all(scheme.act_order for scheme in model.linears.values())
    assert "actorder is not group" in model.notes[0]


# Contradictions ---------------------------------------------------------------------------------


def drop(ending: str) -> Any:
    def change(stored: dict[str, torch.Tensor]) -> None:
        for name in [n for n in stored if n.endswith(ending)]:
            del stored[name]

    return change


def put(ending: str, value: torch.Tensor) -> Any:
    def change(stored: dict[str, torch.Tensor]) -> None:
        for name in [n for n in stored if n.endswith(ending)]:
            stored[name] = value.clone()

    return change


SHAPE = f"{LINEAR}.weight_shape"


@pytest.mark.parametrize(
    ("source", "tensors", "changes", "where", "words"),
    [
        ("ct-int4-asym-g64", drop(SHAPE), {}, "weight_shape", "no such tensor"),
        ("ct-int4-asym-g64", put(SHAPE, torch.tensor([128])), {}, "weight_shape", "I64[1]"),
        ("ct-int4-asym-g64", put(SHAPE, torch.tensor([-1, 128])), {}, "weight_shape", "[-1, 128]"),
        ("ct-int4-asym-g64", put(SHAPE, torch.tensor([64, 128])), {}, "weight_shape", "[64, 128]"),
        ("ct-int4-asym-g64", put(SHAPE, torch.tensor([128, 64])), {}, "weight_packed", "I32"),
        ("ct-int4-asym-g64", drop("weight_zero_point"), {}, "weight_zero_point", "no such tensor"),
        ("ct-int4-asym-g64-gidx", drop("weight_g_idx"), {}, "weight_g_idx", "no such tensor"),
        (
            "ct-int4-asym-g64-gidx",
            put("weight_g_idx", torch.full((128,), 2, dtype=torch.int32)),
            {},
            "weight_g_idx",
            "2 to 2",
        ),
        ("ct-int4-asym-g64", None, {"ignore": ["re:.*down_proj"]}, "weight_packed", "a quantized"),
        ("ct-int4-asym-g64", None, {"ignore": ["Linear"]}, "weight_packed", "a quantized linear"),
    ],
)
def test_what_contradicts_itself_is_refused(
    source: str, tensors: Any, changes: dict[str, Any], where: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(QplugError) as caught:
        laws.surveyed(edited(source, tmp_path / "a", tensors, **changes))
    problems = [caught.value, *caught.value.others]
    mine = [error for error in problems if error.where.endswith(f"{LINEAR}.{where}")]
    assert any(words in error.found for error in mine), problems


@pytest.mark.parametrize(
    ("change", "where"),
    [({"symmetric": True}, "weight_zero_point"), ({"group_size": 32}, "weight_scale")],
)
def test_a_scheme_that_the_tensors_deny_is_refused(
    change: dict[str, Any], where: str, tmp_path: Path
) -> None:
    groups = written_block(GOLDEN / "ct-int4-asym-g64")["config_groups"]
    groups["group_0"]["weights"] |= change
    with pytest.raises(QplugError) as caught:
        laws.surveyed(edited("ct-int4-asym-g64", tmp_path / "a", config_groups=groups))
    assert caught.value.where.endswith(where)


def test_a_quantized_linear_without_a_target_is_refused(tmp_path: Path) -> None:
    groups = written_block(GOLDEN / "ct-int4-asym-g64")["config_groups"]
    groups["group_0"]["targets"] = ["re:.*self_attn.*"]
    with pytest.raises(QplugError) as caught:
        laws.surveyed(edited("ct-int4-asym-g64", tmp_path / "a", config_groups=groups))
    assert {e.where for e in (caught.value, *caught.value.others)} == {
        f"model.layers.0.mlp.{name}_proj.weight_packed" for name in ("down", "gate", "up")
    }


# KV cache ---------------------------------------------------------------------------------------


def test_the_kv_scheme_is_carried(tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / "ct-int4-sym-g128-kv-fp8")
    assert model.kv_scheme["num_bits"] == 8
    execute(make_plan(found, model, CT, Wishes(bits=8)), checkpoint, tmp_path / "a")
    wanted = written_block(GOLDEN / "ct-int4-sym-g128-kv-fp8")["kv_cache_scheme"]
    assert written_block(tmp_path / "a")["kv_cache_scheme"] == wanted
    assert verify(checkpoint, open_checkpoint(tmp_path / "a")).same
    assert find("ct-layout") is CT


def test_the_kv_scheme_comes_back_from_a_format_that_has_no_key_for_it(tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / "ct-int4-sym-g128-kv-fp8")
    execute(make_plan(found, model, canonical.FORMAT), checkpoint, tmp_path / "a")
    assert "kv_cache_scheme" not in written_block(tmp_path / "a")
    there, found, model = laws.surveyed(tmp_path / "a")
    execute(make_plan(found, model, CT), there, tmp_path / "b")
    wanted = written_block(GOLDEN / "ct-int4-sym-g128-kv-fp8")["kv_cache_scheme"]
    assert written_block(tmp_path / "b")["kv_cache_scheme"] == wanted
    back = open_checkpoint(tmp_path / "b")
    for name in checkpoint.headers:
        if name.endswith(("k_scale", "v_scale")):
            assert back.raw(name) == checkpoint.raw(name)
