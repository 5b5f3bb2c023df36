"""`qplug convert --for`: which exact form is chosen, what it costs, and the answer no."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import GOLDEN, Command, Draft, Stored

from qplug_converters.checkpoint import open_checkpoint

SYM, ORDERED = "gptq-4b-sym-g32", "gptq-4b-sym-g64-actorder"
Q = "model.layers.0.self_attn.q_proj"


def block_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


CHOSEN = {
    "gptq-2b-asym-g32": "gptq 4-bit sym g32",
    "gptq-3b-asym-g128": "gptq 4-bit sym channel",
    "gptq-3b-sym-g128-by-5.8.0": "gptq 4-bit sym channel",
    "autogptq-3b-sym-g64": "gptq 4-bit sym g64",
    "gptq-4b-asym-g64": "awq 4-bit asym g64",
    "gptq_v2-4b-asym-g64": "awq 4-bit asym g64",
    # Some zeros are 16, which AWQ cannot hold: eight bits are what is left.
    "autogptq-4b-asym-g128": "gptq 8-bit sym channel",
    "autogptq-4b-sym-ragged-g96": "gptq 4-bit sym g32",
    "gptq-8b-sym-g128": "gptq 8-bit sym channel",
    "awq-gemm-g128": "awq 4-bit asym channel",
    "awq-gemv-g64": "awq 4-bit asym g64",
    "autoround-gptq-sym-g128": "autoround_gptq 4-bit sym channel",
}


@pytest.mark.parametrize("name", CHOSEN)
def test_goldens_for_vllm(name: str, tmp_path: Path, qplug: Command) -> None:
    target = tmp_path / "m"
    ran = qplug("convert", GOLDEN / name, target, "--for", "vllm", "--verify", "--json")
    assert ran.code == 0
    found = ran.json
    chosen = f"{found['plan']['to']} {found['plan']['linears'][0]['to']}"
    assert chosen == CHOSEN[name]
    assert found["proof"]["verdict"] in ("COPIED", "EXACT")
    assert found["command"] == f"vllm serve {target}"
    answers = qplug("inspect", target, "--zeros", "--json").json["engines"]
    (last,) = [a for a in answers if (a["engine"], a["last"]) == ("vllm", "0.33")]
    assert last["outcome"] == "runs"
    size = sum(spec.nbytes for spec in open_checkpoint(target).headers.values())
    assert size in [form["bytes"] for form in found["for"]["forms"] if form["answer"] == "runs"]


def test_what_is_printed(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", GOLDEN / "gptq-2b-asym-g32", tmp_path / "m", "--for", "vllm=0.32")
    assert ran.code == 0
    rows = [re.split(r"\s{2,}", line) for line in ran.out.splitlines()]
    assert rows[0] == ["form", "how", "bytes", "more", "answer"]
    assert ["awq 4-bit asym g32", "widen(4)", "90.4 kB", "+31.7%", "runs"] in rows
    assert ["gptq 4-bit sym g32", "symmetrize(4)", "94.0 kB", "+36.9%", "runs"] in rows
    three = next(row for row in rows if row[0] == "gptq 3-bit sym g32")
    assert three[-1] == "refused: 3-bit symmetric: GPTQ is taken as 4 or 8 bits, symmetric"
    # The chosen one, the next three, and of each format one that is refused; the rest is in --json.
    assert rows[1][0] == "gptq 4-bit sym g32"
    answers = [row[-1].partition(":")[0] for row in rows[1:8]]
    assert answers == ["runs"] * 4 + ["refused"] * 3
    assert len({row[0].split()[0] for row in rows[5:8]}) == 3
    assert rows[8][0] == "linears"
    again = qplug(
        "convert", GOLDEN / "gptq-2b-asym-g32", "n", "--for", "vllm=0.32", "--dry-run", "--json"
    )
    found = again.json["for"]
    assert "gptq 8-bit sym g32" in [form["form"] for form in found["forms"]]
    left = len(found["forms"]) - 8 + len(found["unreachable"])
    assert f"--json has {left} more forms and formats\n" in ran.err
    assert ran.err.startswith("vLLM 0.32, as it is: refused: 2-bit asymmetric")
    assert ran.err.endswith(f"vLLM takes it: vllm serve {tmp_path / 'm'}\n")


STATED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a flag without order": (SYM, {"desc_act": True}, {"desc_act": False}),
    "no desc_act": (SYM, {"desc_act": ...}, {"desc_act": False}),
    "symmetric after all": (SYM, {"sym": False}, {"sym": True}),
    "no quant_method": (SYM, {"quant_method": ..., "method": ...}, {"quant_method": "gptq"}),
    "no zero_point": ("awq-gemm-g128", {"zero_point": ...}, {"zero_point": True}),
}


@pytest.mark.parametrize("name", STATED)
def test_a_config_is_cured_first(name: str, tmp_path: Path, qplug: Command) -> None:
    """Tensors are copied, and what decides how they are read stays as it was."""
    golden, keys, stated = STATED[name]
    draft = Draft.of(golden).set(**{k: v for k, v in keys.items() if v is not ...})
    draft.drop(*(k for k, v in keys.items() if v is ...))
    source, target = draft.save(tmp_path / "source"), tmp_path / "m"
    ran = qplug("convert", source, target, "--for", "vllm", "--verify", "--json")
    assert ran.code == 0
    assert ran.json["plan"]["verdict"] == "COPIED"
    assert ran.json["proof"]["problems"] == []
    assert Draft.of(target).tensors == Draft.of(source).tensors
    assert block_of(target) == {**block_of(source), **stated}
    if draft.side is not None:
        side = json.loads((target / "quantize_config.json").read_text())
        assert {key: side[key] for key in stated} == stated
    certificate = json.loads((target / "qplug-certificate.json").read_text())
    assert certificate["config"] == stated
    again = qplug("convert", target, tmp_path / "again", "--for", "vllm", "--dry-run")
    assert again.err.startswith("vLLM 0.33, as it is: runs\n")


def test_a_block_is_moved_to_config_json(tmp_path: Path, qplug: Command) -> None:
    draft = Draft.of(SYM)
    draft.side = draft.config.pop("quantization_config")
    source, target = draft.save(tmp_path / "source"), tmp_path / "m"
    for reader in ("vllm", "vllm-cpu", "transformers"):
        ran = qplug("convert", source, tmp_path / reader, "--for", reader, "--json")
        assert ran.code == 0
        assert block_of(tmp_path / reader) == draft.side
    ran = qplug("convert", source, target, "--for", "vllm")
    assert "config: moved to config.json" in ran.out


def test_a_null_list_beside_scales_of_the_kv_cache(tmp_path: Path, qplug: Command) -> None:
    draft = Draft.of("awq-gemm-g128")
    draft.tensors["model.layers.0.self_attn.k_scale"] = Stored.of(np.ones(1, np.float32))
    source, target = draft.save(tmp_path / "source"), tmp_path / "m"
    assert qplug("convert", source, target, "--for", "vllm").code == 0
    assert block_of(target)["modules_to_not_convert"] == ["lm_head"]


def test_no_form(tmp_path: Path, qplug: Command) -> None:
    target = tmp_path / "m"
    ran = qplug("convert", GOLDEN / ORDERED, target, "--for", "vllm")
    assert ran.code == 3
    assert not target.exists()
    assert "awq" in ran.out
    no = "no exact form that vLLM 0.33 takes (as it is: refused: the columns are in act order)"
    assert ran.errors == [f"error: {no}"]
    assert "Transformers with qplug: AutoModelForCausalLM.from_pretrained(" in ran.err
    assert f"vLLM with qplug: vllm serve {GOLDEN / ORDERED} --quantization qplug-gptq; " in ran.err
    ran = qplug("convert", GOLDEN / ORDERED, target, "--for", "vllm", "--dry-run", "--json")
    assert ran.code == 3
    assert ran.json["refused"]["found"].startswith("no exact form that vLLM 0.33 takes")
    assert {form["answer"] for form in ran.json["for"]["forms"]} == {"refused"}


def test_what_qplug_would_serve_in_another_form(tmp_path: Path, qplug: Command) -> None:
    """No engine has layers for the canonical form; act order stays exact in others."""
    canonical = tmp_path / "c"
    assert qplug("convert", GOLDEN / ORDERED, canonical, "--to", "canonical").code == 0
    ran = qplug("convert", canonical, tmp_path / "m", "--for", "vllm")
    assert ran.code == 3
    convert = f"qplug convert {canonical} NEW --to gptq_v2"
    assert f"vLLM with qplug: {convert}, then vllm serve NEW --quantization qplug-gptq" in ran.err


def test_what_qplug_would_serve(tmp_path: Path, qplug: Command) -> None:
    """8-bit asymmetric weights have no exact form that the CPU build takes; 4-bit ones have."""
    ran = qplug("convert", GOLDEN / "autogptq-4b-asym-g128", tmp_path / "m", "--for", "vllm-cpu")
    assert ran.code == 3
    folder = GOLDEN / "autogptq-4b-asym-g128"
    assert f"vLLM with qplug: vllm serve {folder} --quantization qplug-gptq" in ran.err


def test_a_grid_that_no_form_holds(tmp_path: Path, qplug: Command) -> None:
    """NF4 has no exact uniform form; the reason of each format is printed."""
    ran = qplug("convert", GOLDEN / "bnb-nf4", tmp_path / "m", "--for", "vllm")
    assert ran.code == 3
    serve = f"vllm serve {GOLDEN / 'bnb-nf4'} --quantization qplug-bitsandbytes"
    load = f"AutoModelForCausalLM.from_pretrained('{GOLDEN / 'bnb-nf4'}')"
    assert ran.err.splitlines()[-1] == (
        f"hint: vLLM with qplug: {serve}; Transformers with qplug: {load}"
    )
    for name in ("gptq", "awq", "compressed-tensors"):
        assert re.search(rf"^{name} .*REQUANTIZED: ", ran.out, re.MULTILINE)
    assert qplug("convert", GOLDEN / "bnb-nf4", tmp_path / "m", "--for", "vllm=0.27").code == 0
    for name in ("bnb-nf4-after-forward", "bnb-nf4-dq-after-forward"):
        ran = qplug(
            "convert", GOLDEN / name, tmp_path / name, "--for", "transformers", "--verify", "--json"
        )
        assert (ran.code, ran.json["proof"]["problems"]) == (0, [])
        answers = qplug("inspect", tmp_path / name, "--json").json["engines"]
        assert [a["outcome"] for a in answers if a["engine"] == "transformers"] == ["runs"]


def test_an_older_version_takes_more(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", GOLDEN / ORDERED, tmp_path / "m", "--for", "vllm=0.29", "--json")
    assert ran.code == 0
    assert ran.json["plan"]["verdict"] == "COPIED"


def test_for_transformers(tmp_path: Path, qplug: Command) -> None:
    """Its GPTQ reader takes everything but zeros that GPTQModel misreads."""
    as_it_is = qplug("convert", GOLDEN / ORDERED, tmp_path / "a", "--for", "transformers", "--json")
    assert as_it_is.json["plan"]["verdict"] == "COPIED"
    legacy = GOLDEN / "gptq-3b-sym-g128-by-5.8.0"
    ran = qplug("convert", legacy, tmp_path / "b", "--for", "transformers", "--verify", "--json")
    assert ran.code == 0
    assert ran.json["plan"]["to"] in ("gptq", "gptq_v2")
    assert ran.json["plan"]["linears"][0]["to"] == "3-bit sym channel"
    # Zero points of compressed-tensors do not load; AWQ holds them at the same size.
    asym = GOLDEN / "ct-int4-asym-g64"
    ran = qplug("convert", asym, tmp_path / "c", "--for", "transformers", "--verify", "--json")
    assert (ran.code, ran.json["plan"]["to"]) == (0, "awq")


def test_the_way_through_qplug_works(tmp_path: Path, qplug: Command) -> None:
    new = tmp_path / "new"
    args = ("convert", GOLDEN / "bnb-nf4", new, "--to", "awq", "--allow", "requantized")
    assert qplug(*args).code == 0
    answers = qplug("inspect", new, "--json").json["engines"]
    (served,) = [a for a in answers if a["engine"] == "vllm+qplug"]
    assert served["command"] == f"vllm serve {new} --quantization qplug-awq"


def ranked(name: str, engine: str, ranks: int, target: Path, qplug: Command) -> Any:
    return qplug("convert", GOLDEN / name, target, "--for", engine, "--tp", ranks, "--json")


def test_ranks_that_share_what_is_there(tmp_path: Path, qplug: Command) -> None:
    ran = ranked(SYM, "vllm", 4, tmp_path / "m", qplug)
    assert ran.json["plan"]["verdict"] == "COPIED"
    assert ran.json["command"] == f"vllm serve {tmp_path / 'm'} --tensor-parallel-size 4"


def test_ranks_that_need_finer_groups(tmp_path: Path, qplug: Command) -> None:
    ran = ranked("gptq-4b-sym-g128", "vllm", 4, tmp_path / "m", qplug)
    assert ran.code == 0
    source = ran.json["for"]["forms"][0]
    assert source["answer"] == "refused"
    assert source["why"].endswith("inputs of model.layers.0.self_attn.o_proj in groups of 128 do "
                                  "not split between 4 ranks")  # fmt: skip
    groups = {one["module"]: one["to"] for one in ran.json["plan"]["linears"]}
    assert groups["model.layers.0.self_attn.o_proj"] == "4-bit sym g32"
    assert groups[Q] == "4-bit sym channel"
    again = qplug("convert", tmp_path / "m", "n", "--for", "vllm", "--tp", 4, "--dry-run", "--json")
    assert again.json["plan"]["verdict"] == "COPIED"


def test_more_ranks_than_groups(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", GOLDEN / SYM, tmp_path / "m", "--for", "vllm", "--tp", 8)
    assert ran.code == 3
    assert "IMPOSSIBLE: 128 inputs do not split between 8 ranks" in ran.out
    assert "awq 4-bit sym g16" in ran.out
    assert "not tested: group size 16: Marlin takes -1, 32, 64, 128" in ran.out
    assert "hint: on one rank: vLLM with qplug: vllm serve" in ran.err


def test_another_format_where_groups_come_to_differ(tmp_path: Path, qplug: Command) -> None:
    """The config class of GPTQ drops `dynamic`, which would say which groups are finer."""
    ran = ranked("gptq-4b-sym-g128", "transformers", 4, tmp_path / "m", qplug)
    assert ran.code == 0
    answers = {form["format"]: form["answer"] for form in ran.json["for"]["forms"][1:]}
    assert answers["gptq"] == "not tested"
    assert answers[ran.json["plan"]["to"]] == "runs"


def test_from_the_canonical_form(tmp_path: Path, qplug: Command) -> None:
    own = tmp_path / "own"
    assert qplug("convert", GOLDEN / "gptq-4b-asym-g64", own, "--to", "canonical").code == 0
    ran = qplug("convert", own, tmp_path / "m", "--for", "vllm", "--json")
    assert (ran.code, ran.json["plan"]["to"]) == (0, "awq")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "one of --to and --for"),
        (("--to", "awq", "--for", "vllm"), "one of --to and --for"),
        (("--for", "vllm", "--bits", "8"), "leave out --bits"),
        (("--for", "vllm", "--tp", "2", "--group-size", "64"), "leave out --group-size"),
        (("--for", "vllm", "--allow", "rounded", "--sym"), "leave out --sym, --allow"),
        (("--for", "sglang"), "no engine 'sglang': choose one of vllm, vllm-cpu, transformers"),
        (("--for", "vllm=new"), "'new' is no version; write e.g. 0.33"),
        (("--for", "vllm=0.10"), "nothing is known of vLLM before 0.21"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], told: str, tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", GOLDEN / SYM, tmp_path / "m", *options)
    assert ran.code == 2
    assert told in ran.err


def test_versions_to_come(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", GOLDEN / SYM, tmp_path / "m", "--for", "vllm=0.99", "--dry-run")
    assert ran.code == 0
    assert ran.err.startswith("warning: of vLLM 0.99 nothing is known: judged as 0.33\n")
