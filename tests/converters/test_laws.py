"""Every law of `laws.py` over every format and over schemes drawn from its capacity."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import laws
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.format import Format
from qplug_converters.formats import FORMATS
from qplug_converters.plan import Verdict
from qplug_converters.scheme import Kind

STORED = [f for f in FORMATS if f.capacity is not None]
formats_by_name = {f.name: f for f in FORMATS}
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


@formats
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=seeds)
def test_read_of_write(target: Format, data: st.DataObject, seed: int) -> None:
    with TemporaryDirectory() as tmp:
        laws.reads_back(
            Path(tmp, "c"), target, laws.drawn_checkpoint(data, target, seed, Path(tmp, "c"))
        )


def alike(one: Format, two: Format) -> bool:
    """Whether some scheme fits both."""
    if one.capacity is None or two.capacity is None:
        return True
    if one.capacity.kind is Kind.CODEBOOK:
        return one.adopt(laws.Scheme(32, 64, 4, 64)) == two.adopt(laws.Scheme(32, 64, 4, 64))
    return (
        one.capacity.kind is two.capacity.kind
        and bool(set(one.capacity.bits) & set(two.capacity.bits))
        and bool(set(one.capacity.scale_dtypes) & set(two.capacity.scale_dtypes))
    )


PAIRS = [(a, b) for a in STORED for b in FORMATS]


@pytest.mark.parametrize(
    ("source", "target"),
    [pair for pair in PAIRS if alike(*pair)],
    ids=lambda f: f.name,
)
@settings(max_examples=4, deadline=None)
@given(data=st.data(), seed=seeds)
def test_what_both_can_hold_goes_there_and_back(
    source: Format, target: Format, data: st.DataObject, seed: int
) -> None:
    """A scheme inside both capacities is COPIED or EXACT, there and back again."""
    with TemporaryDirectory() as tmp:
        laws.drawn_checkpoint(data, source, seed, Path(tmp, "a"), target)
        laws.goes_there_and_back(Path(tmp), source, target)


OUTCOMES: Counter[Verdict] = Counter()


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda f: f.name)
@settings(max_examples=4, deadline=None)
@given(data=st.data(), seed=seeds)
def test_a_plan_keeps_its_promise(
    source: Format, target: Format, data: st.DataObject, seed: int
) -> None:
    """Whatever is asked: what is promised is proven, and what is refused has its reason."""
    with TemporaryDirectory() as tmp:
        laws.drawn_checkpoint(data, source, seed, Path(tmp, "a"))
        OUTCOMES[laws.keeps_its_promise(Path(tmp), target, data.draw(laws.wishes(target)))] += 1


def test_plans_of_every_kind_were_drawn() -> None:
    """The law above would be empty if every draw were refused."""
    if sum(OUTCOMES.values()) < 100:
        pytest.skip("runs after test_a_plan_keeps_its_promise")
    assert min(OUTCOMES[v] for v in (Verdict.EXACT, Verdict.ROUNDED, Verdict.REQUANTIZED)) > 5


# Mutations: each single change of a checkpoint is found by `check` or by `verify` ----------------


@pytest.fixture(scope="module", params=STORED, ids=lambda f: f.name)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target: Format = request.param
    folder = tmp_path_factory.mktemp(target.name) / "c"
    holds = target.capacity
    scheme = target.adopt(laws.Scheme(32, 64, 4, 32, act_order=holds.act_order, kind=holds.kind))
    weight = laws.weight_of(scheme, target, 5)
    laws.write(folder, target, dict.fromkeys(laws.MODULES, (scheme, weight)))
    return folder


def test_every_damaged_tensor_is_found(written: Path, tmp_path: Path) -> None:
    count, passed = laws.unseen_damage(written, tmp_path)
    assert count >= 24
    assert passed == []


@pytest.mark.parametrize("seed", range(8))
def test_every_flipped_bit_is_found(written: Path, tmp_path: Path, seed: int) -> None:
    original = open_checkpoint(written)
    for number, name in enumerate(original.headers):
        copy = tmp_path / str(number)
        laws.mutate_tensor(written, copy, name, "bit", seed)
        assert laws.found(original, copy) is not None, name


HARMLESS = {
    # decides the zero rule where a zero is 2^bits - 1
    ("gptq", "meta"), ("gptq_v2", "meta"), ("gptq_p", "meta"),
    # tensors say what is quantized; entries that lie: below
    ("awq", "modules_to_not_convert"), ("awq_gemv", "modules_to_not_convert"),
    ("awq_gemv_fast", "modules_to_not_convert"), ("llm_awq", "modules_to_not_convert"),
    ("autoround", "block_name_to_quantize"), ("autoround_gptq", "block_name_to_quantize"),
    ("autoround_awq", "block_name_to_quantize"),
    ("compressed-tensors", "ignore"),  # the same: test_compressed_tensors.py
    ("compressed-tensors", "global_compression_ratio"),  # for the reader's information
    ("compressed-tensors", "version"),  # decides the packing only where shapes cannot
    *((f"bnb-{kind}", key) for kind in ("nf4", "fp4", "int8") for key in (
        "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_threshold",
        "bnb_4bit_compute_dtype",  # of the run
        "llm_int8_skip_modules",  # the same as `ignore`: test_bnb.py
    )),
    *(("bnb-int8", f"bnb_4bit_{k}") for k in ("quant_type", "quant_storage", "use_double_quant")),
}  # fmt: skip
DEFAULTS = {"sym": None, "desc_act": False, "lm_head": False, "pack_dtype": "int32",
            "checkpoint_format": None, "format": None, "zero_point": True, "version": "gemm",
            "group_size": None, "sparsity_config": {}, "transform_config": {},
            "quantization_status": "compressed", "bnb_4bit_quant_type": None,
            "bnb_4bit_quant_storage": "uint8", "bnb_4bit_use_double_quant": False,
            "load_in_4bit": None, "_load_in_4bit": None, "load_in_8bit": None,
            "_load_in_8bit": None, "data_type": "int",
            "packing_format": "auto_round:auto_gptq"}  # fmt: skip
"""What readers take where a key is missing: dropping a key that says so changes nothing."""


def test_every_changed_config_key_is_found(written: Path, tmp_path: Path) -> None:
    name = open_checkpoint(written).detect().name
    harmless = {key for form, key in HARMLESS if form == name}
    count, passed = laws.unseen_config_changes(written, tmp_path, harmless, DEFAULTS)
    assert count > 25
    assert passed == []


@pytest.mark.parametrize("entry", ["up_proj", "model.layers.0", "mlp"])
def test_a_skip_list_that_names_a_quantized_linear_is_found(entry: str, tmp_path: Path) -> None:
    target = formats_by_name["awq"]
    scheme = target.adopt(laws.Scheme(32, 64, 4, 32))
    weight = laws.weight_of(scheme, target, 5)
    original = laws.write(tmp_path / "c", target, dict.fromkeys(laws.MODULES, (scheme, weight)))
    laws.mutate_config(tmp_path / "c", tmp_path / "d", "modules_to_not_convert", [entry])
    assert laws.found(original, tmp_path / "d") is not None
