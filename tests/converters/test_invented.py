"""CONTRIBUTING's "add a format", held to its word: `invented.py` and one line in FORMATS.

The format exists in these tests only. Nothing else knows of it, so what works here follows from
its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import invented
import laws
import numpy as np
import pytest
import torch
from builders import Command, Draft, Stored, dense
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.format import Format
from qplug_converters.formats import FORMATS
from qplug_converters.plan import Verdict, Wishes, make_plan
from qplug_converters.scheme import Scheme

INVENTED = invented.FORMAT
UP, DOWN = laws.MODULES
few = settings(max_examples=4, deadline=None)
seeds = st.integers(0, 1 << 16)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Add the one line; before dense, which looks at tensors alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "FORMATS", (*FORMATS[:-1], INVENTED, FORMATS[-1]))
        yield


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of two linears, of which the second is an exception in the config."""
    folder = tmp_path_factory.mktemp("invented") / "mixed"
    schemes = {
        UP: Scheme(32, 64, 4, 32, scale_dtype="BF16"),
        DOWN: Scheme(48, 64, 2, 16, scale_dtype="BF16"),
    }
    linears = {m: (s, laws.weight_of(s, INVENTED, 3)) for m, s in schemes.items()}
    whole = torch.ones(8, 8)
    laws.write(
        folder, INVENTED, linears, {"model.embed_tokens.weight": whole, "lm_head.weight": whole}
    )
    return folder


# Its file says where things lie: bytes put together by hand, as its docstring says ---------------


def by_hand(bits: int = 4, run: int = 8) -> tuple[Draft, np.ndarray]:
    """Return a checkpoint of one linear, and its weights `[out, in]`."""
    out, inp = 6, 32
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (out, inp))
    zeros = rng.integers(0, 1 << bits, (out, inp // run))
    steps = rng.integers(1, 128, (inp // run, out)) / 1024.0  # 7 bits: exact in bfloat16
    each = 16 // bits
    words = np.zeros((out, inp // each), np.uint16)
    for place in range(each):
        words |= (codes[:, place::each] << (16 - bits * (place + 1))).astype(np.uint16)
    upper = (steps.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    tensors = {
        "a.nibbles": Stored.of(words.view(np.int16)),
        "a.steps": Stored("BF16", [inp // run, out], upper.tobytes()),
        "a.middle": Stored.of((zeros + 1).astype(np.uint8)),
    }
    block = {"quant_method": "invented", "revision": 1, "width": bits, "run": run}
    values = np.repeat(steps.T, run, 1) * (codes - np.repeat(zeros, run, 1))
    return Draft({"model_type": "llama", "quantization_config": block}, tensors), values


@pytest.mark.parametrize("bits", invented.WIDTHS)
def test_bytes_put_together_by_hand(bits: int, tmp_path: Path, qplug: Command) -> None:
    draft, values = by_hand(bits)
    source = draft.save(tmp_path / "source")
    assert qplug("convert", source, tmp_path / "dense", "--to", "dense", "--verify").code == 0
    stored = open_checkpoint(tmp_path / "dense").tensor("a.weight")
    np.testing.assert_array_equal(stored.numpy(), values.astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"width": 3}, "quantization_config.width"),
        ({"run": 0}, "quantization_config.run"),
        ({"run": 16}, "a.steps"),
        ({"revision": 2}, "quantization_config.revision"),
        ({"layers": {"a": 4}}, "quantization_config.layers.a"),
        ({"layers": {"a": {"width": "4"}}}, "quantization_config.layers.a.width"),
        ({"layers": {"a": {"run": 16}}}, "a.steps"),
        ({"plain": ["a"]}, "quantization_config.plain"),
    ],
)
def test_a_config_that_lies_is_refused(
    changes: dict[str, object], where: str, tmp_path: Path
) -> None:
    draft, _ = by_hand()
    draft.block.update(changes)
    with pytest.raises(QplugError) as caught:
        open_checkpoint(draft.save(tmp_path / "c")).scheme()
    assert caught.value.where == where


def test_a_zero_of_minus_one_is_refused(tmp_path: Path) -> None:
    draft, _ = by_hand()
    draft.tensors["a.middle"] = Stored.of(np.zeros((6, 4), np.uint8))
    with pytest.raises(QplugError) as caught:
        laws.surveyed(draft.save(tmp_path / "c"))
    assert (caught.value.where, caught.value.found) == ("a.middle", "zeros from -1 to -1")


# The laws follow --------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=seeds)
def test_one_linear(data: st.DataObject, seed: int) -> None:
    scheme = data.draw(laws.schemes(INVENTED))
    weight = laws.weight_of(scheme, INVENTED, seed)
    laws.round_trip(INVENTED, scheme, weight)
    laws.blocks_equal_whole(INVENTED, scheme, weight)
    laws.fast_equals_literal(INVENTED, scheme, weight)


@few
@given(data=st.data(), seed=seeds)
def test_read_of_write(data: st.DataObject, seed: int) -> None:
    with TemporaryDirectory() as tmp:
        folder = Path(tmp, "c")
        laws.reads_back(folder, INVENTED, laws.drawn_checkpoint(data, INVENTED, seed, folder))


@pytest.mark.parametrize("other", ["canonical", "compressed-tensors", "dense", "invented"])
@few
@given(data=st.data(), seed=seeds)
def test_there_and_back(other: str, data: st.DataObject, seed: int) -> None:
    """Formats that hold bfloat16 scales, in both directions."""
    target = formats.find(other)
    both = ((INVENTED, target), (target, INVENTED)) if target.read else ((INVENTED, target),)
    for source, there in both:
        with TemporaryDirectory() as tmp:
            laws.drawn_checkpoint(data, source, seed, Path(tmp, "a"), there)
            laws.goes_there_and_back(Path(tmp), source, there)


@pytest.mark.parametrize("other", FORMATS, ids=lambda f: f.name)
@settings(max_examples=2, deadline=None)
@given(data=st.data(), seed=seeds)
def test_a_plan_keeps_its_promise(other: Format, data: st.DataObject, seed: int) -> None:
    for source, target in ((INVENTED, other), (other, INVENTED)):
        if source.capacity is None:
            continue
        with TemporaryDirectory() as tmp:
            laws.drawn_checkpoint(data, source, seed, Path(tmp, "a"))
            laws.keeps_its_promise(Path(tmp), target, data.draw(laws.wishes(target)))


def test_every_damaged_tensor_is_found(mixed: Path, tmp_path: Path) -> None:
    count, passed = laws.unseen_damage(mixed, tmp_path)
    assert count == 4 * 8
    assert passed == []


def test_every_changed_config_key_is_found(mixed: Path, tmp_path: Path) -> None:
    count, passed = laws.unseen_config_changes(mixed, tmp_path, {"plain"}, {})
    assert count > 60
    assert passed == []


# And so does everything else --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq_v2", "awq_gemv_fast"])
def test_scales_that_bfloat16_rounds_are_said_to_be(name: str, tmp_path: Path) -> None:
    """The survey looks at float16 only: what it finds says nothing of bfloat16."""
    source = formats.find(name)
    assert source.capacity is not None
    scheme = source.adopt(Scheme(32, 64, 4, 32, kind=source.capacity.kind))
    weight = laws.weight_of(scheme, source, 1)
    laws.write(tmp_path / "a", source, dict.fromkeys(laws.MODULES, (scheme, weight)))
    _, found, model = laws.surveyed(tmp_path / "a")
    reason = make_plan(found, model, INVENTED).steps[0].reason
    assert "F16 scales rounded to BF16: at most 2^-9 of each scale" in reason
    assert laws.keeps_its_promise(tmp_path, INVENTED, Wishes()) is Verdict.ROUNDED
    _, found, model = laws.surveyed(tmp_path / "b")
    assert make_plan(found, model, formats.find("gptq_v2")).verdict is Verdict.EXACT


def test_formats_lists_it(qplug: Command) -> None:
    assert qplug("formats", "--json").json["invented"] == {
        "aliases": [],
        "title": INVENTED.title,
        "reads": True,
        "writes": True,
        "bits": [2, 4],
        "act_order": False,
        "ragged": False,
    }
    pairs = qplug("formats", "--matrix", "--json").json["pairs"]
    cells = {(one["from"], one["to"]): one["verdicts"] for one in pairs}
    assert "usual" in cells["invented", "gptq_v2"]["EXACT"]
    assert "usual" in cells["gptq_v2", "invented"]["ROUNDED"]
    for one in FORMATS:
        assert ("invented", one.name) in cells
        assert one.read is None or ("invented" in {to for of, to in cells if of == one.name})


def test_inspect_knows_it(mixed: Path, tmp_path: Path, qplug: Command) -> None:
    found = qplug("inspect", mixed, "--zeros", "--json").json
    assert found["format"] == "invented"
    assert found["schemes"] == {"4-bit asym g32": 1, "2-bit asym g16": 1}
    assert found["dense"] == ["model.embed_tokens", "lm_head"]
    assert sum(found["zeros"]["histogram"]["2"].values()) == 48 * 4
    said = qplug("inspect", "--config", mixed / "config.json", "--json")
    assert said.code == 0
    assert said.json["format"] == "invented"


def test_the_config_names_exceptions_and_dense_linears(mixed: Path) -> None:
    block = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert block == {
        "quant_method": "invented",
        "revision": 1,
        "width": 4,
        "run": 32,
        "layers": {DOWN: {"width": 2, "run": 16}},
        "plain": ["lm_head"],
    }


def test_the_command_line_takes_it(mixed: Path, tmp_path: Path, qplug: Command) -> None:
    for target in ("canonical", "gptq_v2"):
        there, back = tmp_path / target, tmp_path / f"{target}-back"
        assert qplug("convert", mixed, there, "--to", target, "--verify").code == 0
        assert qplug("convert", there, back, "--to", "invented-layout").code == 0
        assert qplug("verify", mixed, back, "--json").json["verdict"] == "EXACT"


def test_an_engine_is_served_from_it(tmp_path: Path, qplug: Command) -> None:
    """No engine knows the format, and `--for` finds one that is known."""
    scheme = Scheme(128, 128, 4, 32, sym=True, scale_dtype="BF16")
    weight = laws.weight_of(scheme, INVENTED, 1)
    laws.write(tmp_path / "a", INVENTED, dict.fromkeys(laws.MODULES, (scheme, weight)))
    made = qplug("convert", tmp_path / "a", tmp_path / "b", "--for", "vllm", "--json")
    assert made.code == 0
    assert made.json["plan"]["verdict"] == "EXACT"
    assert qplug("verify", tmp_path / "a", tmp_path / "b", "--json").json["verdict"] == "EXACT"


def test_quantizing_writes_it(tmp_path: Path, qplug: Command) -> None:
    source = dense().save(tmp_path / "dense")
    made = qplug(
        "quantize", source, tmp_path / "q", "--to", "invented", "--group-size", 32, "--json"
    )
    assert made.code == 0
    schemes = qplug("inspect", tmp_path / "q", "--json").json["schemes"]
    assert schemes == {"4-bit g32": 4}
