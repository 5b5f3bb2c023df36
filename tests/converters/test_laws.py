"""Every law of `laws.py` over every format and over schemes drawn from its capacity."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import laws
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.format import Format
from qplug_converters.formats import FORMATS
from qplug_converters.plan import Verdict, make_plan
from qplug_converters.survey import survey
from qplug_converters.verify import verify

STORED = [f for f in FORMATS if f.capacity is not None]
formats = pytest.mark.parametrize("target", STORED, ids=lambda f: f.name)
seeds = st.integers(0, 1 << 16)


@formats
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=seeds)
def test_one_linear(target: Format, data: st.DataObject, seed: int) -> None:
    scheme = data.draw(laws.schemes(target))
    weight = laws.weight_of(scheme, target, seed)
    laws.round_trip(target, scheme, weight)
    laws.blocks_equal_whole(target, scheme, weight)
    laws.fast_equals_literal(target, scheme, weight)


def drawn_checkpoint(
    data: st.DataObject, target: Format, seed: int, folder: Path
) -> dict[str, laws.Scheme]:
    """Draw two linears that one config of the format can describe, and write them."""
    first = data.draw(laws.schemes(target))
    second = data.draw(laws.schemes(target)) if target.name != "awq" else first
    linears = {}
    for module, scheme in zip(laws.MODULES, (first, second), strict=True):
        linears[module] = (scheme, laws.weight_of(scheme, target, seed))
    laws.write(folder, target, linears, max_shard=data.draw(st.sampled_from([1 << 10, 1 << 30])))
    return {module: scheme for module, (scheme, _) in linears.items()}


@formats
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=seeds)
def test_read_of_write(target: Format, data: st.DataObject, seed: int) -> None:
    with TemporaryDirectory() as tmp:
        schemes = drawn_checkpoint(data, target, seed, Path(tmp, "c"))
        checkpoint = open_checkpoint(Path(tmp, "c"))
        # desc_act is one flag for the model; what was drawn is the fact per linear
        found, model = checkpoint.scheme()
        assert found is target
        for module, scheme in schemes.items():
            got = model.linears[module]
            for field in ("out_features", "in_features", "bits", "act_order", "scale_dtype"):
                assert getattr(got, field) == getattr(scheme, field), field
            assert got.groups == scheme.groups
            assert got.group_size == min(scheme.group_size, scheme.in_features)
        laws.sizes_are_predicted(checkpoint, target, model)
        assert verify(checkpoint, open_checkpoint(Path(tmp, "c"))).same


@pytest.mark.parametrize("source", STORED, ids=lambda f: f.name)
@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=seeds)
def test_a_plan_keeps_its_promise(
    source: Format, target: Format, data: st.DataObject, seed: int
) -> None:
    """What a plan calls COPIED or EXACT verifies as the same, there and back again."""
    with TemporaryDirectory() as tmp:
        drawn_checkpoint(data, source, seed, Path(tmp, "a"))
        checkpoint = open_checkpoint(Path(tmp, "a"))
        found, model = checkpoint.scheme()
        plan = make_plan(found, survey(checkpoint, found, model), target)
        for step in plan.steps:
            assert (step.verdict <= Verdict.EXACT) == (step.verdict in (0, 1))
            if step.verdict > Verdict.EXACT:
                assert step.reason
        if plan.verdict > Verdict.EXACT:
            with pytest.raises(QplugError):
                plan.refuse_above(Verdict.EXACT)
            return
        execute(plan, checkpoint, Path(tmp, "b"))
        there = open_checkpoint(Path(tmp, "b"))
        proof = verify(checkpoint, there)
        assert proof.same, proof
        if target.read is None:
            return
        found, model = there.scheme()
        back = make_plan(found, survey(there, found, model), source)
        if back.verdict <= Verdict.EXACT:
            execute(back, there, Path(tmp, "c"))
            assert verify(checkpoint, open_checkpoint(Path(tmp, "c"))).same


# Mutations: each single change of a checkpoint is found by `check` or by `verify` ----------------


@pytest.fixture(scope="module", params=STORED, ids=lambda f: f.name)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target: Format = request.param
    folder = tmp_path_factory.mktemp(target.name) / "c"
    scheme = target.adopt(laws.Scheme(32, 64, 4, 32, act_order=target.name == "gptq"))
    weight = laws.weight_of(scheme, target, 5)
    laws.write(folder, target, dict.fromkeys(laws.MODULES, (scheme, weight)))
    return folder


def test_every_damaged_tensor_is_found(written: Path, tmp_path: Path) -> None:
    original = open_checkpoint(written)
    passed, count = [], 0
    for number, (name, kind, seed) in enumerate(laws.tensor_mutations(written)):
        copy = tmp_path / str(number)
        laws.mutate_tensor(written, copy, name, kind, seed)
        count += 1
        if laws.found(original, copy) is None:
            passed.append((name, kind))
    assert count >= 24
    assert passed == []


@pytest.mark.parametrize("seed", range(8))
def test_every_flipped_bit_is_found(written: Path, tmp_path: Path, seed: int) -> None:
    original = open_checkpoint(written)
    for number, name in enumerate(original.headers):
        copy = tmp_path / str(number)
        laws.mutate_tensor(written, copy, name, "bit", seed)
        assert laws.found(original, copy) is not None, name


CHANGES = {
    "bits": (2, 3, 8, 5, "4", None),
    "group_size": (16, 64, 0, -1, 96, "32"),
    "quant_method": ("awq", "gptq", "qplug", "bitsandbytes"),
    "sym": (True,),
    "desc_act": (False, True),
    "checkpoint_format": ("gptq", "gptq_v2", "marlin"),
    "version": ("gemv", "marlin", 2),
    "zero_point": (False, "true"),
    "modules_to_not_convert": (["up_proj"], ["model.layers.0"]),
}
"""Values other than those `written` has; a value equal to the one there is no mutation."""


def test_every_changed_config_key_is_found(written: Path, tmp_path: Path) -> None:
    original = open_checkpoint(written)
    block = json.loads((written / "config.json").read_text())["quantization_config"]
    passed, count = [], 0
    for key, values in CHANGES.items():
        for number, value in enumerate(values):
            if key not in block or block[key] == value:
                continue
            copy = tmp_path / f"{key}{number}"
            laws.mutate_config(written, copy, key, value)
            count += 1
            if laws.found(original, copy) is None:
                passed.append((key, value))
    assert count >= 3
    assert passed == []
