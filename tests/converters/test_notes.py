"""What a plan says besides its verdicts, and what a certificate knows of its source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import laws
import pytest

from qplug_converters import formats
from qplug_converters.check import check
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.execute import execute
from qplug_converters.plan import Plan, Verdict, Wishes, make_plan

GOLDEN = Path(__file__).parents[1] / "golden"


def planned(name: str, to: str, wishes: Wishes | None = None) -> Plan:
    _, found, model = laws.surveyed(GOLDEN / name)
    return make_plan(found, model, formats.find(to), wishes)


@pytest.mark.parametrize(("to", "said"), [("gptq", True), ("awq", True)])
def test_a_config_without_a_key_for_the_cache(to: str, said: bool) -> None:
    plan = planned("ct-int4-sym-g128-kv-fp8", to)
    assert any("--kv-cache-dtype fp8" in note for note in plan.notes) is said


def test_a_config_with_a_key_for_the_cache() -> None:
    for to in ("compressed-tensors", "gptq"):
        plan = planned("ct-int4-asym-g64", to)
        assert not any("--kv-cache-dtype" in note for note in plan.notes)
    notes = planned("ct-int4-sym-g128-kv-fp8", "compressed-tensors").notes
    assert not any("--kv-cache-dtype" in note for note in notes)


def test_zeros_of_an_old_release_are_written_anew(tmp_path: Path) -> None:
    name = "gptq-3b-sym-g128-by-5.8.0"
    plan = planned(name, "gptq")
    assert plan.verdict is Verdict.EXACT
    execute(plan, open_checkpoint(GOLDEN / name), tmp_path / "b")
    there = open_checkpoint(tmp_path / "b")
    assert {s.zero_rule for s in there.scheme()[1].linears.values()} == {"plain"}


@pytest.mark.parametrize(
    ("name", "to", "wishes", "fix"),
    [
        ("autogptq-4b-asym-g128", "awq", None, "--to gptq_v2 --bits 8"),
        ("gptq-4b-sym-g128", "gptq", Wishes(bits=3), "--bits 4 keeps them"),
    ],
)
def test_ways_out(name: str, to: str, wishes: Wishes | None, fix: str) -> None:
    plan = planned(name, to, wishes)
    assert plan.verdict is Verdict.REQUANTIZED
    assert fix in plan.steps[0].fix


@pytest.mark.parametrize("which", ["config.json", "header"])
def test_a_certificate_knows_its_source(which: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "gptq-4b-sym-g128", tmp_path / "a")
    plan = planned("gptq-4b-sym-g128", "awq")
    execute(plan, open_checkpoint(tmp_path / "a"), tmp_path / "b")
    made = open_checkpoint(tmp_path / "b")
    assert check(made, open_checkpoint(tmp_path / "a")).holds
    if which == "config.json":
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"more": 1}))
    else:
        shard = tmp_path / "a" / "model.safetensors"
        raw = shard.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        head = raw[8 : 8 + length]
        first, second = b"input_layernorm", b"post_attention_layernorm"
        assert head.count(first) == head.count(second) == 1
        other = head.replace(second, b"?").replace(first, second).replace(b"?", first)
        shard.write_bytes(len(other).to_bytes(8, "little") + other + raw[8 + length :])
    found = check(made, open_checkpoint(tmp_path / "a"))
    assert found.problems == ["the source: other files than the certificate names"]
