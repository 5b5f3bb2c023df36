"""bitsandbytes: every storage, tables, mixed files, files saved after a forward, configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import numpy as np
import pytest
import torch
from builders import GOLDEN, Draft, Q, Stored
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.codec import decode
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.formats import bnb, bnb_4bit, bnb_int8
from qplug_converters.formats.bnb_state import BLOCKSIZES, spelled
from qplug_converters.plan import Verdict, Wishes, make_plan
from qplug_converters.scheme import Codebook, Kind, ModelScheme, Nesting, Scheme
from qplug_converters.verify import verify
from qplug_converters.weight import CodebookGrid, NestedAbsmax, QuantizedWeight

NF4, FP4, INT8 = bnb_4bit.NF4, bnb_4bit.FP4, bnb_int8.FORMAT
W = f"{Q}.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"


# Storage -----------------------------------------------------------------------------------------


@st.composite
def stored(draw: st.DrawFn) -> Scheme:
    """Draw any scheme that a 4-bit file may hold."""
    out, inp = draw(st.integers(1, 40)), draw(st.integers(1, 96))
    size = draw(st.sampled_from(BLOCKSIZES))
    transposed = draw(st.booleans())
    nesting = None
    if transposed:
        size = draw(st.sampled_from(BLOCKSIZES[:2]))
        inp = size * draw(st.integers(1, 3))
    elif draw(st.booleans()):
        table = torch.linspace(-1, 1, 256).numpy().tobytes()
        dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
        nesting = Nesting(draw(st.sampled_from(BLOCKSIZES)), 0.5306732654571533, table, dtype)
    name = draw(st.sampled_from(["nf4", "fp4"]))
    book = Codebook(
        name,
        bnb_4bit.TABLES[name],
        draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        draw(st.sampled_from(list(bnb_4bit.STORAGES.values()))),
        nesting,
        transposed,
        flat=draw(st.booleans()),
    )
    dtype = "BF16" if transposed else "F32"
    return Scheme(out, inp, 4, size, scale_dtype=dtype, kind=Kind.CODEBOOK, codebook=book)


def weight_of(scheme: Scheme, seed: int) -> QuantizedWeight:
    """Make a weight of such a scheme."""
    rng = torch.Generator().manual_seed(seed)
    book = scheme.codebook
    assert book is not None
    blocks, shape = scheme.sizes["block"], (scheme.out_features, scheme.in_features)
    codes = torch.randint(0, 16, shape, generator=rng, dtype=torch.uint8)
    table = torch.frombuffer(bytearray(book.table), dtype=torch.float32)
    absmax, nested = torch.rand(blocks, generator=rng) + 0.01, None
    if book.nesting is not None:
        nested = NestedAbsmax(
            torch.randint(0, 256, (blocks,), generator=rng, dtype=torch.uint8),
            torch.rand(scheme.sizes["nested"], generator=rng),
            torch.frombuffer(bytearray(book.nesting.table), dtype=torch.float32),
            book.nesting.offset,
            book.nesting.blocksize,
            getattr(torch, book.nesting.dtype),
        )
        absmax = nested.absmax()
    if book.transposed:
        absmax = absmax.bfloat16()
    return QuantizedWeight(codes, 4, CodebookGrid(table, absmax, scheme.group_size, nested))


@settings(max_examples=150, deadline=None)
@given(scheme=stored(), seed=st.integers(0, 99))
def test_every_storage(scheme: Scheme, seed: int) -> None:
    """Odd sizes, blocks that span rows or outnumber the weights, words of every dtype."""
    weight = weight_of(scheme, seed)
    laws.fast_equals_literal(NF4, scheme, weight)
    layout = NF4.layout(scheme)
    tensors = laws.encode(layout, weight)
    assert laws.specs_of(tensors) == layout.specs(scheme.sizes)
    again = decode(layout, scheme, tensors)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())
    laws.blocks_equal_whole(NF4, scheme, weight)


@settings(max_examples=40, deadline=None)
@given(scheme=stored(), seed=st.integers(0, 99))
def test_the_formula(scheme: Scheme, seed: int) -> None:
    """Code by code, in NumPy and float32: the rules of the docstring."""
    weight = weight_of(scheme, seed)
    tensors = laws.encode(NF4.layout(scheme), weight)
    raw = tensors["weight"].reshape(-1).view(torch.uint8).numpy()
    codes = np.stack([raw >> 4, raw & 15], 1).reshape(-1)[: scheme.numel]
    grid = weight.grid
    assert isinstance(grid, CodebookGrid)
    absmax = grid.absmax.float().numpy()
    flat = grid.table.numpy()[codes] * absmax[np.arange(scheme.numel) // scheme.group_size]
    assert np.array_equal(weight.dequantize().numpy().reshape(-1), flat)


def test_nested_absmax_is_rounded_twice() -> None:
    """To float32 after the product and again after the sum: no fused multiply-add."""
    one = NestedAbsmax(
        torch.tensor([0], dtype=torch.uint8),
        torch.tensor([1 + 2.0**-23]),
        torch.tensor([1 + 2.0**-23]),
        -1.0,
        256,
    )
    assert float(one.absmax()) == float(np.float32(1 + 2.0**-22) - np.float32(1))


def test_state_is_spelled_as_the_tool_does() -> None:
    with safe_open(GOLDEN / "bnb-nf4-dq" / "model.safetensors", "np") as file:
        raw = file.get_tensor(STATE).tobytes()
    _, _, model = laws.surveyed(GOLDEN / "bnb-nf4-dq")
    scheme = model.linears[Q]
    assert scheme.codebook is not None
    assert scheme.codebook.state == b""
    assert spelled(scheme) == raw


# What is read ------------------------------------------------------------------------------------


def edited(name: str, folder: Path, change: Callable[[Draft], object]) -> Path:
    """Copy a golden and change it."""
    draft = Draft.of(name)
    change(draft)
    return draft.save(folder)


def notes_of(folder: Path) -> str:
    _, model = open_checkpoint(folder).scheme()
    return "; ".join(model.notes)


def test_after_a_forward_files_are_told_and_repaired(tmp_path: Path) -> None:
    """Written anew as NF4 the file holds absmax as the tool reads it."""
    source = GOLDEN / "bnb-nf4-after-forward"
    assert "transposed and bfloat16" in notes_of(source)
    checkpoint, found, model = laws.surveyed(source)
    plan = make_plan(found, model, found)
    assert plan.verdict is Verdict.EXACT
    execute(plan, checkpoint, tmp_path / "c")
    assert verify(checkpoint, open_checkpoint(tmp_path / "c")).same
    there = open_checkpoint(tmp_path / "c")
    assert str(there.headers[f"{W}.absmax"]) == "F32[256]"
    assert "forward" not in notes_of(tmp_path / "c")
    assert "nested_dtype of" in notes_of(GOLDEN / "bnb-nf4-dq-after-forward")


def test_double_quantization_is_undone_exactly(tmp_path: Path) -> None:
    for name in ("bnb-nf4-dq", "bnb-nf4-dq-after-forward", "bnb-nf4-dq-storage-bf16"):
        checkpoint, found, model = laws.surveyed(GOLDEN / name)
        plan = make_plan(found, model, found, Wishes(group_size=32))
        assert plan.verdict is Verdict.EXACT
        execute(plan, checkpoint, tmp_path / name)
        there = open_checkpoint(tmp_path / name)
        assert verify(checkpoint, there).same
        assert str(there.headers[f"{W}.absmax"]) == "F32[512]"
        assert str(there.headers[W]) == "U8[8192, 1]"
        assert there.block is not None
        assert there.block["bnb_4bit_use_double_quant"] is False


def test_the_table_of_the_file_counts(tmp_path: Path) -> None:
    def stretch(draft: Draft) -> None:
        table = draft.tensors[f"{W}.quant_map"]
        draft.tensors[f"{W}.quant_map"] = Stored.of(table.array * np.float32(2))

    folder = edited("bnb-nf4", tmp_path / "c", stretch)
    assert "quant_map of" in notes_of(folder)
    checkpoint, found, model = laws.surveyed(folder)
    parts = found.layout(model.linears[Q])
    weight = decode(
        parts, model.linears[Q], {p.name: checkpoint.tensor(f"{Q}.{p.name}") for p in parts}
    )
    with safe_open(GOLDEN / "bnb-nf4" / "reference.safetensors", "pt") as reference:
        assert torch.equal(weight.dequantize(), 2 * reference.get_tensor(W))


def test_a_record_in_another_spelling_is_kept(tmp_path: Path) -> None:
    text = b'{"shape":[128,128],"dtype":"float16","blocksize":64,"quant_type":"nf4"}'
    folder = edited(
        "bnb-nf4",
        tmp_path / "c",
        lambda d: d.tensors.update({STATE: Stored.of(np.frombuffer(text, np.uint8))}),
    )
    checkpoint, found, model = laws.surveyed(folder)
    execute(make_plan(found, model, found), checkpoint, tmp_path / "same")
    assert bytes(open_checkpoint(tmp_path / "same").raw(STATE)) == text
    execute(make_plan(found, model, found, Wishes(group_size=32)), checkpoint, tmp_path / "anew")
    state = bytes(open_checkpoint(tmp_path / "anew").raw(STATE))
    assert json.loads(state) == {**json.loads(text), "blocksize": 32}
    assert state.startswith(b'{"quant_type": "nf4", "blocksize": 32')


def test_flat_words(tmp_path: Path) -> None:
    folder = edited("bnb-nf4", tmp_path / "c", lambda d: setattr(d.tensors[W], "shape", [8192]))
    assert verify(open_checkpoint(GOLDEN / "bnb-nf4"), open_checkpoint(folder)).same


def test_a_file_may_mix_nf4_fp4_and_dense(tmp_path: Path) -> None:
    """Each linear is what its record says; the config speaks of most of them."""
    up, down = laws.MODULES
    linears = {}
    for module, one in ((up, NF4), (down, FP4)):
        scheme = one.adopt(Scheme(8, 64, 4, 64, kind=Kind.CODEBOOK))
        linears[module] = (scheme, laws.weight_of(scheme, one, 1))
    gate = "model.layers.0.mlp.gate"
    rest = {f"{gate}.weight": torch.ones(4, 64), f"{gate}_proj.weight": torch.ones(4, 64)}
    checkpoint = laws.write(tmp_path / "c", NF4, linears, rest)
    found, model = checkpoint.scheme()
    assert found is NF4
    assert {m: s.codebook.name for m, s in model.linears.items() if s.codebook} == {
        up: "nf4",
        down: "fp4",
    }
    assert model.dense == (gate, f"{gate}_proj")
    assert "bnb_4bit_quant_type is 'nf4' in the config, and 'fp4' in" in "; ".join(model.notes)
    plan = make_plan(found, model, FP4)
    assert [step.verdict for step in plan.steps] == [Verdict.REQUANTIZED, Verdict.EXACT]


def test_without_a_config_the_records_decide(tmp_path: Path) -> None:
    for name, expected in (("bnb-nf4", NF4), ("bnb-fp4", FP4), ("bnb-int8", INT8)):
        folder = edited(name, tmp_path / name, lambda d: d.config.pop("quantization_config"))
        checkpoint = open_checkpoint(folder)
        found, model = checkpoint.scheme()
        assert found is expected
        assert "no quantization config" in model.notes[0]
        proof = verify(open_checkpoint(GOLDEN / name), checkpoint)
        assert {report.verdict for report in proof.linears} == {Verdict.EXACT}
        assert len(proof.linears) == 7


def test_weights_that_became_dense_are_a_contradiction(tmp_path: Path) -> None:
    """A merged fine-tune that kept the config of its base."""

    def merge(draft: Draft) -> None:
        draft.tensors = {W: Stored.of(np.ones((4, 4), np.float16))}

    for name in ("bnb-nf4", "bnb-fp4", "bnb-int8"):
        folder = edited(name, tmp_path / name, merge)
        with pytest.raises(QplugError, match="expected quantized linears") as caught:
            open_checkpoint(folder).scheme()
        assert caught.value.where == "the checkpoint's headers"
        assert "remove quantization_config" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "keys", "note"),
    [
        ("bnb-nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4' in the config"),
        ("bnb-nf4", {"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant is True"),
        ("bnb-nf4", {"bnb_4bit_quant_storage": "float32"}, "quant_storage is 'float32'"),
        ("bnb-nf4", {"llm_int8_skip_modules": ["q_proj"]}, "has 'q_proj', and"),
        ("bnb-nf4", {"llm_int8_skip_modules": ["model.layers.0"]}, "'model.layers.0', and"),
        ("bnb-int8", {"llm_int8_skip_modules": ["q_proj"]}, "has 'q_proj', and"),
        (
            "bnb-nf4",
            {
                k: v
                for k in ("", "_")
                for k, v in ((f"{k}load_in_4bit", 0), (f"{k}load_in_8bit", 1))
            },
            "the config says 8 bits, and the tensors are 4-bit",
        ),
    ],
)
def test_where_config_and_file_differ(
    name: str, keys: dict[str, Any], note: str, tmp_path: Path
) -> None:
    keys = {k: bool(v) if isinstance(v, int) else v for k, v in keys.items()}
    folder = edited(name, tmp_path / "c", lambda d: d.set(**keys))
    assert note in notes_of(folder)


@pytest.mark.parametrize("skipped", [None, ["lm_head"], []])
def test_a_skip_list_may_be_null(skipped: list[str] | None, tmp_path: Path) -> None:
    folder = edited("bnb-nf4", tmp_path / "c", lambda d: d.set(llm_int8_skip_modules=skipped))
    checkpoint = open_checkpoint(folder)
    claim = NF4.parse(checkpoint.block) if NF4.parse else None
    assert claim is not None
    assert claim.lm_head is (None if skipped == [] else False)
    assert "llm_int8" not in notes_of(folder)


def test_old_int8_files_have_no_weight_format(tmp_path: Path) -> None:
    def drop(draft: Draft) -> None:
        for name in [n for n in draft.tensors if n.endswith("weight_format")]:
            del draft.tensors[name]

    folder = edited("bnb-int8", tmp_path / "c", drop)
    checkpoint, found, model = laws.surveyed(folder)
    assert verify(open_checkpoint(GOLDEN / "bnb-int8"), checkpoint).same
    plan = make_plan(found, model, found)
    assert plan.verdict is Verdict.COPIED
    execute(plan, checkpoint, tmp_path / "same")
    assert open_checkpoint(tmp_path / "same").headers == checkpoint.headers


# Configs -----------------------------------------------------------------------------------------


def test_what_is_written_is_what_transformers_writes(tmp_path: Path) -> None:
    """The tool's own keys and values, but for null."""
    for name in ("bnb-nf4", "bnb-nf4-dq-storage-bf16", "bnb-fp4", "bnb-int8"):
        checkpoint, found, model = laws.surveyed(GOLDEN / name)
        written = found.write(model).block
        assert written == {**(checkpoint.block or {}), "llm_int8_skip_modules": ["lm_head"]}
        assert list(written) == sorted(written)


def test_the_skip_list_hits_no_quantized_linear() -> None:
    """Transformers matches entries as regular expressions from the start of a path."""
    scheme = NF4.adopt(Scheme(8, 64, 4, 64, kind=Kind.CODEBOOK))
    gate = "model.layers.0.mlp.gate"
    model = ModelScheme(
        "bnb-nf4",
        {f"{gate}_proj": scheme, "lm_head": scheme},
        (gate, "model.layers.1.mlp.router", "model.embed_tokens"),
    )
    listed = bnb.skip_list(model)
    assert listed == [r"model\.layers\.0\.mlp\.gate$", "model.layers.1.mlp.router"]
    assert NF4.parse is not None
    skip = NF4.parse({"llm_int8_skip_modules": listed}).skip
    assert skip(f"{gate}_proj") is None
    assert skip(gate) == listed[0]


def test_the_compute_dtype_of_the_source_stays() -> None:
    _, _, model = laws.surveyed(GOLDEN / "bnb-nf4")
    assert (NF4.write(model).block or {})["bnb_4bit_compute_dtype"] == "bfloat16"
    other = replace(model, block={})
    assert (NF4.write(other).block or {})["bnb_4bit_compute_dtype"] == "float16"
