"""Every law of `laws.py` over every format and over schemes drawn from its capacity."""

from __future__ import annotations

import json
from collections import Counter
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
from qplug_converters.plan import Verdict, Wishes, make_plan
from qplug_converters.scheme import Kind
from qplug_converters.verify import verify

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


def drawn_checkpoint(
    data: st.DataObject, target: Format, seed: int, folder: Path, also: Format | None = None
) -> dict[str, laws.Scheme]:
    """Draw two linears that one config of the format can describe, and write them."""
    assert target.capacity is not None
    first = data.draw(laws.schemes(target, also))
    second = first if target.capacity.uniform else data.draw(laws.schemes(target, also))
    linears = {}
    for module, scheme in zip(laws.MODULES, (first, second), strict=True):
        linears[module] = (scheme, laws.weight_of(scheme, target, seed, also))
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
            most = 4096 if scheme.kind is Kind.CODEBOOK else scheme.in_features
            assert got.group_size == min(scheme.group_size, most)
        laws.sizes_are_predicted(checkpoint, target, model)
        assert verify(checkpoint, open_checkpoint(Path(tmp, "c"))).same


def alike(one: Format, two: Format) -> bool:
    """Whether some scheme fits both."""
    if one.capacity is None or two.capacity is None:
        return True
    if one.capacity.kind is Kind.CODEBOOK:
        return one.adopt(laws.Scheme(32, 64, 4, 64)) == two.adopt(laws.Scheme(32, 64, 4, 64))
    return one.capacity.kind is two.capacity.kind and bool(
        set(one.capacity.bits) & set(two.capacity.bits)
    )


PAIRS = [(a, b) for a in STORED for b in FORMATS]


@pytest.mark.parametrize(
    ("source", "target"),
    [pair for pair in PAIRS if alike(*pair)],
    ids=lambda f: f.name,
)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), seed=seeds)
def test_what_both_can_hold_goes_there_and_back(
    source: Format, target: Format, data: st.DataObject, seed: int
) -> None:
    """A scheme inside both capacities is COPIED or EXACT, there and back again."""
    with TemporaryDirectory() as tmp:
        drawn_checkpoint(data, source, seed, Path(tmp, "a"), target)
        checkpoint, found, model = laws.surveyed(Path(tmp, "a"))
        plan = make_plan(found, model, target)
        assert plan.verdict is (Verdict.COPIED if source is target else Verdict.EXACT)
        execute(plan, checkpoint, Path(tmp, "b"))
        proof = verify(checkpoint, open_checkpoint(Path(tmp, "b")))
        assert proof.same, proof
        if target.read is None:
            return
        there, found, model = laws.surveyed(Path(tmp, "b"))
        back = make_plan(found, model, source)
        assert back.verdict <= Verdict.EXACT
        execute(back, there, Path(tmp, "c"))
        assert verify(checkpoint, open_checkpoint(Path(tmp, "c"))).same


@st.composite
def wishes(draw: st.DrawFn, target: Format) -> Wishes:
    """Draw what a user may ask of a target."""
    if target.capacity is None:
        return Wishes(dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])))
    return Wishes(
        bits=draw(st.none() | st.sampled_from(target.capacity.bits)),
        group_size=draw(st.none() | st.sampled_from([-1, 8, 16, 32])),
        sym=draw(st.booleans()),
    )


OUTCOMES: Counter[Verdict] = Counter()


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda f: f.name)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), seed=seeds)
def test_a_plan_keeps_its_promise(
    source: Format, target: Format, data: st.DataObject, seed: int
) -> None:
    """Whatever is asked: what is promised is proven, and what is refused has its reason."""
    with TemporaryDirectory() as tmp:
        drawn_checkpoint(data, source, seed, Path(tmp, "a"))
        checkpoint, found, model = laws.surveyed(Path(tmp, "a"))
        plan = make_plan(found, model, target, data.draw(wishes(target)))
        OUTCOMES[plan.verdict] += 1
        if plan.verdict is Verdict.IMPOSSIBLE:
            with pytest.raises(QplugError) as caught:
                plan.refuse_above(Verdict.REQUANTIZED)
            assert caught.value.found
            assert caught.value.fix
            return
        execute(plan, checkpoint, Path(tmp, "b"))
        proof = verify(checkpoint, open_checkpoint(Path(tmp, "b")))
        assert proof.verdict <= max(plan.verdict, Verdict.EXACT), proof
        problems = [*proof.problems]
        if plan.verdict is Verdict.REQUANTIZED:  # few groups may have midpoints by chance
            problems = [p for p in problems if "every zero is the midpoint" not in p]
        assert problems == []


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


OTHERS = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    4,
    8,
    16,
    64,
    96,
    "4",
    "false",
    "gptq",
    "awq",
    "v9",
    [],
    {},
)
"""Values that a key may be changed to; `None` stands for dropping it, too."""

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
    original = open_checkpoint(written)
    name = original.detect().name
    block = json.loads((written / "config.json").read_text())["quantization_config"]
    passed, count = [], 0
    for key in block:
        if (name, key) in HARMLESS:
            continue
        for number, value in enumerate(OTHERS):
            same = type(block[key]) is type(value) and block[key] == value
            dropped = value is None and DEFAULTS.get(key, ...) in (block[key], None)
            if same or dropped:
                continue
            copy = tmp_path / f"{key}{number}"
            laws.mutate_config(written, copy, key, value)
            count += 1
            if laws.found(original, copy) is None:
                passed.append((key, value))
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
