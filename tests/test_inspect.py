"""`qplug inspect`: what is printed and what JSON holds, with the table of engines."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from builders import GOLDEN, Command, Draft, dense

ASYM = GOLDEN / "gptq-4b-asym-g64"
"""Has stored zeros of 2^bits - 1, on which readers disagree."""
ORDERED = GOLDEN / "gptq-4b-sym-g64-actorder"
AMBIGUOUS = (
    "warning: 15 stored zeros are 2^bits - 1, which readers of gptq decode in different ways; "
    "read by rule `word` (producer gptqmodel:7.7.0; --zero-rule overrides)\n"
)
LEFT = "warning: not part of the model, and not carried along: reference.safetensors\n"
"""What a golden holds besides: the weights as its own tool reads them."""


def shaped(text: str) -> str:
    """Turn an indented block into what is printed."""
    return textwrap.dedent(text).lstrip("\n")


def test_inspect(qplug: Command) -> None:
    ran = qplug("inspect", ASYM)
    assert (ran.code, ran.err) == (0, LEFT)
    assert ran.out == shaped(
        f"""
        folder             {ASYM}
        format             gptq
        architecture       LlamaForCausalLM
        shards             1
        tensors            32
        bytes              90.1 kB
        config             config.json quantization_config
        producer           gptqmodel:7.7.0
        quantized linears  7
        weights            98,304
        bits per weight    4.604
        schemes            7 x 4-bit asym g64
        act order          0 of 7 linears
        zero rules         7 x word
        dense              1 modules: model.embed_tokens

        engine                   versions      answer          with, or why
        vLLM                     0.21          runs            vllm serve {ASYM}
        vLLM                     0.22 to 0.33  refused         4-bit asymmetric: GPTQ is taken as 4 or 8 bits, symmetric
        vLLM on a CPU            0.26 to 0.32  refused         4-bit asymmetric: GPTQ is taken as 4 or 8 bits, symmetric
        vLLM with humming        0.32 to 0.33  silently wrong  zeros are stored minus one, and it takes them as they are
        vLLM with qplug          0.28 to 0.33  runs            vllm serve {ASYM} --quantization qplug-gptq
        Transformers             5.0 to 5.23   runs            AutoModelForCausalLM.from_pretrained('{ASYM}')  # pip install optimum gptqmodel
        Transformers with qplug  5.15 to 5.23  runs            AutoModelForCausalLM.from_pretrained('{ASYM}')
        """  # noqa: E501
    )


def test_inspect_answers_for_engines(qplug: Command) -> None:
    """Act order: what one version serves, a later one refuses."""
    found = qplug("inspect", ORDERED, "--json").json["engines"]
    stock = [one for one in found if one["engine"] == "vllm"]
    assert [(one["first"], one["last"], one["outcome"]) for one in stock] == [
        ("0.21", "0.29", "runs"),
        ("0.30", "0.33", "refused"),
    ]
    assert [one["command"] for one in stock] == [f"vllm serve {ORDERED}", ""]
    assert stock[1]["why"] == "the columns are in act order"


def test_inspect_counts_zeros(qplug: Command) -> None:
    found = qplug("inspect", ASYM, "--zeros", "--json").json["zeros"]
    times = found["histogram"]["4"]
    assert sum(times.values()) == found["count"] == 1536
    assert times["8"] == found["at_midpoint"]
    assert times["0"] == 14  # as the maker of this golden counted them
    mixed = qplug("inspect", GOLDEN / "gptq-dynamic-mixed", "--zeros").out
    assert "4-bit zeros        8: " in mixed
    assert "8-bit zeros        128: " in mixed


def test_inspect_reads_zeros_when_asked(qplug: Command) -> None:
    ran = qplug("inspect", ASYM, "--zeros")
    assert ran.code == 0
    assert ran.err == LEFT + AMBIGUOUS
    assert "zeros              lowest 0, highest 15" in ran.out
    found = qplug("inspect", ASYM, "--zeros", "--json")
    assert found.err == ""
    assert found.json["zeros"]["stored_as_maxq"] == 15
    said = LEFT + AMBIGUOUS
    assert [f"warning: {note}" for note in found.json["notes"]] == said.splitlines()


def test_inspect_of_a_dense_model(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("inspect", dense().save(tmp_path / "dense"), "--json")
    assert ran.code == 0
    assert ran.json["format"] == "dense"
    assert "schemes" not in ran.json


def test_inspect_of_contradictions(tmp_path: Path, qplug: Command) -> None:
    """A flag that the g_idx contradicts is said, not refused."""
    ordered = Draft.of(ORDERED).set(desc_act=False).save(tmp_path / "ordered")
    ran = qplug("inspect", ordered)
    assert ran.code == 0
    assert "act order          7 of 7 linears" in ran.out
    assert ran.err.startswith("warning: desc_act is false but g_idx is not in order in ")
    trivial = Draft.of(ASYM).set(desc_act=True).save(tmp_path / "trivial")
    ran = qplug("inspect", trivial)
    assert "act order          0 of 7 linears" in ran.out
    assert ran.err.startswith("warning: desc_act is true but g_idx is in order in ")


@pytest.mark.parametrize("value", ["Llama", 5, {"a": 1}, [], None])
def test_inspect_of_odd_architectures(value: object, tmp_path: Path, qplug: Command) -> None:
    draft = Draft.of(ASYM)
    draft.config["architectures"] = value
    ran = qplug("inspect", draft.save(tmp_path / "odd"), "--json")
    assert ran.json["architecture"] == "unknown"


# A config alone -----------------------------------------------------------------------------------


def test_inspect_of_a_config_alone(qplug: Command) -> None:
    ran = qplug("inspect", "--config", ORDERED / "config.json")
    assert ran.code == 0
    assert ran.out.startswith(
        shaped(
            """
            config      config.json quantization_config
            format      gptq
            producer    gptqmodel:7.7.0
            bits        4
            group size  64
            sym         true
            desc act    true
            lm head     false

            engine """
        )
    )
    assert "vLLM                     0.30 to 0.33  refused  desc_act is true\n" in ran.out
    assert ran.err == (
        "warning: desc_act is true: g_idx decides whether columns are in act order\n"
    )


def test_inspect_of_configs_as_json(tmp_path: Path, qplug: Command) -> None:
    """A side file has another meaning for engines than the same block in config.json."""
    block = {"bits": 3, "group_size": 128, "sym": True, "desc_act": False}
    side = tmp_path / "quantize_config.json"
    side.write_text(json.dumps(block))
    found = qplug("inspect", "--config", side, "--json").json
    assert (found["format"], found["bits"], found["sym"]) == ("gptq", 3, True)
    outcomes = {one["engine"]: one["outcome"] for one in found["engines"]}
    assert outcomes["transformers"] == "silently wrong"
    assert outcomes["vllm+qplug"] == "runs"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": {**block, "quant_method": "gptq"}}))
    found = qplug("inspect", "--config", config, "--config", side, "--json").json
    outcomes = {one["engine"]: one["outcome"] for one in found["engines"]}
    assert outcomes["transformers"] == "runs"
    side.write_text(json.dumps({**block, "group_size": 64}))
    ran = qplug("inspect", "--config", config, "--config", side)
    assert ran.code == 1
    assert "group_size 128 in config.json quantization_config and 64 in quantize" in ran.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "one of SRC and --config"),
        ((ASYM, "--config", ASYM / "config.json"), "one of SRC and --config"),
        (("--config", ASYM / "config.json", "--zeros"), "are about tensors"),
    ],
)
def test_wrong_usage(arguments: tuple[object, ...], told: str, qplug: Command) -> None:
    ran = qplug("inspect", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err


def test_configs_that_are_not_there(tmp_path: Path, qplug: Command) -> None:
    assert qplug("inspect", "--config", tmp_path / "config.json").code == 1
    (tmp_path / "config.json").write_text("[]")
    assert "a JSON list" in qplug("inspect", "--config", tmp_path / "config.json").err
