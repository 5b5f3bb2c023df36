"""AWQ's other layouts, AutoRound's packings, planar GPTQ: names, configs, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import laws
import numpy as np
import pytest
import torch
from builders import GOLDEN, Command, Draft, Q, Stored
from safetensors import safe_open
from spoil import Bad, keys, poke, refused_by_command, refused_by_library, tensor, without

from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.codec import decode
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.plan import Verdict, make_plan
from qplug_converters.scheme import Kind, ModelScheme, Scheme
from qplug_converters.verify import verify

GEMM, GEMV, FAST = "awq-gemm-g128", "awq-gemv-g64", "awq-gemv_fast-g64"
SYM_AWQ = "autoround-autoawq-sym-g64"
V1, NATIVE = "autoround-gptq-sym-g128", "autoround-native-2b-asym-g32"
AS_AWQ, MIXED = "autoround-awq-asym-g128", "autoround-mixed-extra"
PLANAR, GPTQ = "gptq_p-3b-sym-g128", "gptq-4b-sym-g128"
GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"


def is_what_it_was(folder: Path, golden: str) -> tuple[str, ModelScheme]:
    """Hold the weights of a changed copy against what the tool of the original says they are."""
    checkpoint, found, model = laws.surveyed(folder)
    with safe_open(GOLDEN / golden / "reference.safetensors", "pt") as reference:
        assert {f"{module}.weight" for module in model.linears} == set(reference.keys())
        for module, scheme in model.linears.items():
            layout = found.layout(scheme)
            stored = {p.name: checkpoint.tensor(f"{module}.{p.name}") for p in layout}
            weight = decode(layout, scheme, stored).dequantize()
            assert torch.equal(weight, reference.get_tensor(f"{module}.weight"))
    return found.name, model


def renamed(draft: Draft, old: str, new: str) -> Draft:
    """Rename a part of every linear."""
    draft.tensors = {
        name.removesuffix(old) + new if name.endswith(old) else name: stored
        for name, stored in draft.tensors.items()
    }
    return draft


def dropped(draft: Draft, part: str) -> Draft:
    """Remove a part of every linear."""
    draft.tensors = {n: t for n, t in draft.tensors.items() if not n.endswith(f".{part}")}
    return draft


# Names of keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden", "drop", "said", "name"),
    [
        (GEMM, ("bits", "group_size"), {"w_bit": 4, "q_group_size": 128}, "awq"),
        (GEMM, ("bits", "group_size"), {"wbits": 4, "groupsize": 128}, "awq"),
        (GEMM, ("bits",), {"weight_bits": 4, "version": "GEMM"}, "awq"),
        (GEMM, ("version",), {"format": "gemm", "quant_method": "AWQ"}, "awq"),
        (GEMM, ("quant_method",), {"method": "awq"}, "awq"),
        (GEMM, ("quant_method", "bits", "group_size"), {"w_bit": 4, "q_group_size": 128}, "awq"),
        (GEMM, (), {"version": "exllama", "backend": "autoawq", "do_fuse": False}, "awq"),
        (GEMM, ("zero_point",), {"sym": False, "modules_to_not_convert": None}, "awq"),
        (GEMM, (), {"sym": True}, "awq"),
        (SYM_AWQ, ("zero_point",), {}, "awq"),
        (GEMV, (), {"version": "GEMV"}, "awq_gemv"),
        (GEMV, ("version", "quant_method"), {"format": "gemv"}, "awq_gemv"),
        (FAST, (), {"version": "GEMV_FAST"}, "awq_gemv_fast"),
        (FAST, (), {"version": "gemv-fast"}, "awq_gemv_fast"),
        (V1, ("packing_format",), {}, "autoround_gptq"),
        (V1, (), {"quant_method": "inc"}, "autoround_gptq"),
        (V1, ("quant_method",), {}, "autoround_gptq"),
        (
            V1,
            ("packing_format",),
            {"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"},
            "autoround_gptq",
        ),
        (V1, (), {"quant_method": "Auto-Round", "packing_format": "AUTO_ROUND:AUTO_GPTQ"},
            "autoround_gptq"),
        (V1, (), {"backend": "auto", "extra_config": None, "act_bits": 16}, "autoround_gptq"),
        (V1, (), {"block_name_to_quantize": [["model.layers.0", "model.layers.1"]]},
            "autoround_gptq"),
        (V1, ("block_name_to_quantize",), {"to_quant_block_names": "model.layers, model.vision"},
            "autoround_gptq"),
        (NATIVE, (), {"packing_format": "auto_round:exllamav2"}, "autoround"),
        (NATIVE, (), {"packing_format": "auto_round:gptqmodel"}, "autoround"),
        (AS_AWQ, (), {"packing_format": "auto_round:awq"}, "autoround_awq"),
        (MIXED, ("extra_config",), {"extra_config": {
            "mlp.down_proj": {"bits": 8, "group_size": 64, "super_bits": None},
            r".*\.v_proj$": {"bits": 16, "data_type": "float"}}}, "autoround_gptq"),
        (GPTQ, ("group_size", "desc_act"), {"groupsize": 128, "actorder": False}, "gptq"),
        (GPTQ, (), {"quant_method": "GPTQ", "method": "GPTQ"}, "gptq"),
        (GPTQ, (), {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn"], ["mlp"]]},
            "gptq"),
        (GPTQ, (), {"modules_in_block_to_quantize": []}, "gptq"),
        (GPTQ, (), {"dynamic": None, "hyb_act": False, "is_marlin_format": False}, "gptq"),
        (PLANAR, ("checkpoint_format",), {"format": "GPTQ_P"}, "gptq_p"),
    ],
)  # fmt: skip
def test_other_names_for_the_same(
    golden: str, drop: tuple[str, ...], said: Mapping[str, Any], name: str, tmp_path: Path
) -> None:
    draft = Draft.of(golden).drop(*drop).set(**said)
    found, model = is_what_it_was(draft.save(tmp_path / "c"), golden)
    assert found == name
    ours = ("not part of the model", "the config names no quant_method")
    assert [note for note in model.notes if not note.startswith(ours)] == []


@pytest.mark.parametrize(
    ("golden", "said", "note"),
    [
        (GPTQ, {"modules_in_block_to_quantize": ["self_attn"]}, "modules_in_block_to_quantize"),
        (GPTQ, {"modules_to_not_convert": ["mlp"]}, "modules_to_not_convert leaves"),
        (V1, {"block_name_to_quantize": "model.other"}, "block_name_to_quantize leaves"),
        (V1, {"quant_method": "gptq"}, "AutoRound's packing_format"),
        (AS_AWQ, {"quant_method": "awq"}, "AutoRound's packing_format"),
        (GEMV, {"version": None}, "names no version"),
        (GEMM, {"modules_to_not_convert": ["q_proj"]}, "'q_proj', which readers also find"),
    ],
)
def test_what_the_tensors_contradict_is_said(
    golden: str, said: Mapping[str, Any], note: str, tmp_path: Path
) -> None:
    _, model = is_what_it_was(Draft.of(golden).set(**said).save(tmp_path / "c"), golden)
    assert any(note in one for one in model.notes)


# Shapes alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden", "name"),
    [(GEMM, "awq"), ("awq-gemm-g32-bias", "awq"), (GEMV, "awq_gemv"), (FAST, "awq_gemv_fast")],
)
def test_without_any_config(golden: str, name: str, tmp_path: Path) -> None:
    draft = Draft.of(golden)
    del draft.config["quantization_config"]
    found, model = is_what_it_was(draft.save(tmp_path / "c"), golden)
    assert found == name
    sizes = {scheme.group_size for scheme in model.linears.values()}
    assert sizes == {s.group_size for s in laws.surveyed(GOLDEN / golden)[2].linears.values()}


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("name", ["awq_gemv", "awq_gemv_fast", "llm_awq"])
def test_padding_tells_the_group_size(name: str, size: int, tmp_path: Path) -> None:
    target = formats.find(name)
    assert target.capacity is not None
    scheme = target.adopt(Scheme(16, 2048, 4, size, kind=target.capacity.kind))
    weight = laws.weight_of(scheme, target, 3)
    laws.write(tmp_path / "c", target, dict.fromkeys(laws.MODULES, (scheme, weight)))
    written = laws.surveyed(tmp_path / "c")
    draft = Draft.of(tmp_path / "c")
    del draft.config["quantization_config"]
    draft.save(tmp_path / "d")
    checkpoint, found, model = laws.surveyed(tmp_path / "d")
    assert found is target
    assert {s.group_size for s in model.linears.values()} == {size}
    assert verify(written[0], checkpoint).verdict is Verdict.EXACT


def test_a_g_idx_is_not_needed(tmp_path: Path) -> None:
    draft = dropped(Draft.of(GPTQ), "g_idx")
    found, model = is_what_it_was(draft.save(tmp_path / "c"), GPTQ)
    assert found == "gptq"
    assert not any(scheme.has_g_idx for scheme in model.linears.values())
    # What is written has one: GPTQ's readers ask for it.
    checkpoint, source, model = laws.surveyed(tmp_path / "c")
    execute(make_plan(source, model, formats.find("gptq_v2")), checkpoint, tmp_path / "v2")
    assert f"{Q}.g_idx" in open_checkpoint(tmp_path / "v2").headers
    assert verify(checkpoint, open_checkpoint(tmp_path / "v2")).same


# Other storage of the same numbers ----------------------------------------------------------------


def test_llm_awq_is_gemv_fast_by_other_names(tmp_path: Path) -> None:
    draft = renamed(Draft.of(FAST).set(version="llm-awq"), ".qzeros", ".scaled_zeros")
    found, model = is_what_it_was(draft.save(tmp_path / "llm"), FAST)
    assert found == "llm_awq"
    assert {scheme.kind for scheme in model.linears.values()} == {Kind.OFFSET}
    draft.set(version="gemm", backend="llm-awq").save(tmp_path / "backend")
    assert is_what_it_was(tmp_path / "backend", FAST)[0] == "llm_awq"
    checkpoint, source, model = laws.surveyed(tmp_path / "llm")
    plan = make_plan(source, model, formats.find("awq_gemv_fast"))
    assert plan.verdict is Verdict.EXACT
    execute(plan, checkpoint, tmp_path / "fast")
    there, first = open_checkpoint(tmp_path / "fast"), open_checkpoint(GOLDEN / FAST)
    assert all(there.raw(name) == first.raw(name) for name in first.headers)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_awq_without_qzeros_means_the_midpoint(version: str, tmp_path: Path) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / SYM_AWQ)
    there = tmp_path / "there"
    target = formats.find("awq" if version == "gemm" else "awq_gemv")
    execute(make_plan(found, model, formats.find("canonical")), checkpoint, tmp_path / "own")
    own, canonical, model = laws.surveyed(tmp_path / "own")
    execute(make_plan(canonical, model, target), own, there)
    draft = dropped(Draft.of(there).set(zero_point=False), "qzeros")
    name, model = is_what_it_was(draft.save(tmp_path / "c"), SYM_AWQ)
    assert name == target.name
    assert {scheme.lacks for scheme in model.linears.values()} == {("qzeros",)}
    bare, found, model = laws.surveyed(tmp_path / "c")
    execute(make_plan(found, model, formats.find("gptq")), bare, tmp_path / "gptq")
    assert verify(checkpoint, open_checkpoint(tmp_path / "gptq")).same
    execute(make_plan(formats.find("gptq"), *laws.surveyed(tmp_path / "gptq")[2:], target),
            open_checkpoint(tmp_path / "gptq"), tmp_path / "again")  # fmt: skip
    assert f"{Q}.qzeros" in open_checkpoint(tmp_path / "again").headers


def test_symmetric_gemv_fast_is_exact_and_asymmetric_rounded(tmp_path: Path) -> None:
    for golden, verdict in ((SYM_AWQ, Verdict.EXACT), (GEMV, Verdict.ROUNDED)):
        checkpoint, found, model = laws.surveyed(GOLDEN / golden)
        plan = make_plan(found, model, formats.find("awq_gemv_fast"))
        assert plan.verdict is verdict
        execute(plan, checkpoint, tmp_path / golden)
        assert verify(checkpoint, open_checkpoint(tmp_path / golden)).verdict is verdict


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_odd_widths_of_autoround_are_a_plain_stream(bits: int, tmp_path: Path) -> None:
    target = formats.find("autoround_gptq")
    scheme = target.adopt(Scheme(64, 128, bits, 32))
    weight = laws.weight_of(scheme, target, bits)
    original = laws.write(tmp_path / "c", target, {laws.MODULES[0]: (scheme, weight)})
    draft = Draft.of(tmp_path / "c").drop("packing_format", "extra_config")
    draft.set(quant_method="gptq", provider="auto-round", checkpoint_format="gptq")
    made = open_checkpoint(draft.save(tmp_path / "made"))
    assert made.detect().name == "gptq"
    assert verify(original, made).verdict is Verdict.EXACT
    draft.drop("provider").set(meta={"quantizer": ["gptqmodel:7.7.0"]}).save(tmp_path / "other")
    with pytest.raises(QplugError, match=f"{bits} \\(planar") as caught:
        open_checkpoint(tmp_path / "other").scheme()
    assert caught.value.where == "quantization_config.bits"


# Configs that are written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden", "target", "block"),
    [
        (GEMM, "awq_gemv", {"bits": 4, "group_size": 128, "quant_method": "awq",
            "version": "gemv", "zero_point": True, "modules_to_not_convert": ["lm_head"]}),
        (SYM_AWQ, "awq_gemv_fast", {"bits": 4, "group_size": 64, "quant_method": "awq",
            "version": "gemv_fast", "zero_point": True, "modules_to_not_convert": ["lm_head"]}),
        (SYM_AWQ, "llm_awq", {"bits": 4, "group_size": 64, "quant_method": "awq",
            "version": "llm-awq", "zero_point": True, "modules_to_not_convert": ["lm_head"]}),
        (GEMM, "autoround", {"bits": 4, "group_size": 128, "sym": False, "data_type": "int",
            "quant_method": "auto-round", "packing_format": "auto_round",
            "block_name_to_quantize": "model.layers"}),
        ("gptq-dynamic-mixed", "autoround_gptq", {"bits": 4, "group_size": 64, "sym": True,
            "data_type": "int", "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers",
            "extra_config": {"model.layers.0.self_attn.v_proj": {"bits": 16},
                DOWN: {"bits": 8, "group_size": 32}}}),
    ],
)  # fmt: skip
def test_configs_are_what_the_main_tools_write(
    golden: str, target: str, block: Mapping[str, Any], tmp_path: Path
) -> None:
    checkpoint, found, model = laws.surveyed(GOLDEN / golden)
    execute(make_plan(found, model, formats.find(target)), checkpoint, tmp_path / "c")
    assert open_checkpoint(tmp_path / "c").block == block


def test_a_quantized_head_is_named_in_extra_config(tmp_path: Path) -> None:
    target = formats.find("autoround")
    scheme = target.adopt(Scheme(64, 128, 4, 32))
    weight = laws.weight_of(scheme, target, 1)
    names = (*laws.MODULES, "lm_head")
    checkpoint = laws.write(tmp_path / "c", target, dict.fromkeys(names, (scheme, weight)))
    assert checkpoint.block is not None
    assert checkpoint.block["extra_config"] == {
        "lm_head": {"bits": 4, "group_size": 32, "sym": False}
    }
    assert checkpoint.scheme()[1].notes == ()


# What is refused ----------------------------------------------------------------------------------


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def v2_zeros(draft: Draft, folder: Path) -> None:
    for name, stored in draft.tensors.items():
        if name.endswith(".qzeros"):
            words = np.full(stored.shape, 0x88888888, np.uint32).view(np.int32)
            draft.tensors[name] = Stored.of(words)
    draft.save(folder)


BLOCK = "quantization_config"
ENDLESS = "(.*)" * 9 + "".join(f"\\{n}" for n in range(9, 0, -1)) + "(?<!proj)$"
REFUSED = [
    Bad("gemv padded scales", GEMV, poke(f"{Q}.scales", (0, 2), 1.0), f"{Q}.scales",
        "numbers behind the last of 2 groups", data=True),
    Bad("gemv padded zeros", GEMV, poke(f"{Q}.qzeros", (0, 1), 1), f"{Q}.qzeros",
        "numbers behind the last of 2 groups", data=True),
    Bad("gemv larger groups", GEMV, keys(group_size=128), f"{GATE}.qzeros", "I32[128, 2]"),
    Bad("gemv smaller groups", GEMV, keys(group_size=32), f"{GATE}.qzeros", "I32[128, 2]"),
    Bad("gemv uneven groups", GEMV, keys(group_size=96), f"{GATE}.qweight", "group_size 96"),
    Bad("gemv group 0", GEMV, keys(group_size=0), f"{BLOCK}.group_size", "0"),
    Bad("gemv 8 bits", GEMV, keys(bits=8), f"{BLOCK}.bits", "8"),
    Bad("gemv as fast", GEMV, keys(version="gemv_fast"), f"{BLOCK}.version", "as 'gemv'"),
    Bad("gemv without zeros", GEMV, without(f"{Q}.qzeros"), f"{Q}.qzeros", "no such tensor"),
    Bad("gemv wide scales", GEMV, tensor(f"{Q}.scales", lambda a: a.astype(np.float64)),
        f"{Q}.scales", "F64"),
    Bad("fast as gemv", FAST, keys(version="gemv"), f"{BLOCK}.version", "as 'gemv_fast'"),
    Bad("fast as llm-awq", FAST, keys(version="llm-awq"), f"{BLOCK}.version", "as 'gemv_fast'"),
    Bad("fast backend", FAST, keys(backend="llm-awq"), f"{BLOCK}.version", "as 'gemv_fast'"),
    Bad("fast wide zeros", FAST, tensor(f"{Q}.qzeros", wide), f"{Q}.qzeros", "F32[16, 128]"),
    Bad("fast cut tile", FAST, tensor(f"{Q}.qweight", lambda a: a[:, :96]), f"{Q}.qweight",
        "a multiple of 256 codes"),
    Bad("fast padded scales", FAST, poke(f"{Q}.scales", (5, 0), 1.0), f"{Q}.scales",
        "numbers behind the last of 2 groups", data=True),
    Bad("fast padded zeros", FAST, poke(f"{Q}.qzeros", (15, 127), 1.0), f"{Q}.qzeros",
        "numbers behind the last of 2 groups", data=True),
    Bad("fast NaN", FAST, poke(f"{Q}.qzeros", (0, 0), np.nan), Q, "NaN or infinite", data=True),
    Bad("awq marlin", GEMM, keys(version="Marlin"), f"{BLOCK}.version", "Marlin tiles"),
    Bad("awq bitblas", GEMM, keys(version="bitblas"), f"{BLOCK}.version", "BitBLAS tiles"),
    Bad("awq neither", GEMM, keys(zero_point=False, sym=False), "zero_point and sym", "false"),
    Bad("gptq exllama", GPTQ, keys(checkpoint_format="exllama", format=None),
        f"{BLOCK}.checkpoint_format", "'exllama' (an unknown packing)"),
    Bad("gptq skip text", GPTQ, keys(modules_to_not_convert="lm_head"),
        f"{BLOCK}.modules_to_not_convert", "'lm_head'"),
    Bad("planar 5 bits", PLANAR, keys(bits=5), f"{BLOCK}.bits", "5 (planar"),
    Bad("planar dynamic", PLANAR, keys(dynamic={".*": {"bits": 7}}), f"{GATE}.bits", "7 (planar"),
    Bad("planar cut", PLANAR, tensor(f"{Q}.qweight", lambda a: a[:9]), f"{Q}.qweight", "g_idx"),
    Bad("data type", V1, keys(data_type="mx_fp"), f"{BLOCK}.data_type", "'mx_fp'"),
    Bad("activations", V1, keys(act_bits=8), f"{BLOCK}.act_bits", "8"),
    Bad("rotated", V1, keys(rotation_config={"block_size": 32}), f"{BLOCK}.rotation_config",
        "block_size"),
    Bad("fp8 packing", V1, keys(packing_format="auto_round:fp8_static"),
        f"{BLOCK}.packing_format", "'auto_round:fp8_static'"),
    Bad("other packing", V1, keys(packing_format="auto_round:llm_compressor"),
        f"{BLOCK}.packing_format", "llm_compressor"),
    Bad("marlin backend", V1, lambda d, f: d.drop("packing_format").set(
        backend="auto_round:gptq:marlin").save(f), f"{BLOCK}.backend", "marlin"),
    Bad("packing no text", V1, keys(packing_format=5), f"{BLOCK}.packing_format", "5"),
    Bad("no bits", V1, lambda d, f: d.drop("bits").save(f), f"{BLOCK}.bits", "no such key"),
    Bad("9 bits", V1, keys(bits=9), f"{BLOCK}.bits", "9"),
    Bad("blocks are a number", V1, keys(block_name_to_quantize=5),
        f"{BLOCK}.block_name_to_quantize", "5"),
    Bad("group is a list", V1, keys(group_size=[128, 128]), f"{BLOCK}.group_size", "[128, 128]"),
    Bad("extra no object", MIXED, keys(extra_config={DOWN: 8}), f"{BLOCK}.extra_config", "8"),
    Bad("extra a list", MIXED, keys(extra_config=[DOWN]), f"{BLOCK}.extra_config", DOWN),
    Bad("extra bits", MIXED, keys(extra_config={DOWN: {"bits": 9}}), f"{DOWN}.bits", "9"),
    Bad("extra text", MIXED, keys(extra_config={DOWN: {"bits": "8"}}), f"{DOWN}.bits", "'8'"),
    Bad("extra float", MIXED, keys(extra_config={DOWN: {"bits": 8, "data_type": "fp"}}),
        f"{DOWN}.data_type", "'fp'"),
    Bad("extra group 0", MIXED, keys(extra_config={DOWN: {"group_size": 0}}),
        f"{DOWN}.group_size", "0"),
    Bad("extra no regex", MIXED, keys(extra_config={"(": {"bits": 8}}), f"{BLOCK}.extra_config",
        "'('"),
    Bad("extra without end", MIXED, keys(extra_config={ENDLESS: {"bits": 8}}),
        f"{BLOCK}.extra_config", "does not come to an end"),
    Bad("extra dense", MIXED, keys(extra_config={Q: {"bits": 16}}), f"{Q}.qweight",
        "a quantized linear"),
    Bad("extra missing", MIXED, keys(extra_config=None), f"{DOWN}.qzeros", "I32[2, 32]"),
    Bad("v2 zeros as v1", V1, v2_zeros, ".qzeros", "symmetric v2 file",
        data=True),
    Bad("native as v1", NATIVE, keys(packing_format="auto_round:auto_awq"),
        f"{BLOCK}.bits", "2"),
    Bad("gptq tensors as awq", V1, keys(packing_format="auto_round:auto_awq"),
        f"{BLOCK}.packing_format", "stored as 'gptq'"),
    Bad("awq tensors as gptq", AS_AWQ, keys(packing_format="auto_round"),
        f"{BLOCK}.packing_format", "stored as 'gemm'"),
]  # fmt: skip


@pytest.mark.parametrize("bad", [b for b in REFUSED if not b.data], ids=lambda b: b.name)
def test_library(bad: Bad, tmp_path: Path) -> None:
    refused_by_library(bad, tmp_path)


@pytest.mark.parametrize("bad", REFUSED, ids=lambda b: b.name)
def test_command_line(bad: Bad, tmp_path: Path, qplug: Command) -> None:
    refused_by_command(bad, tmp_path, qplug)
