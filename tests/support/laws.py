"""The laws of a layout, stated once; `test_laws.py` runs them over every format and many schemes.

A new format gets all of them without a new line here: schemes are drawn from its `capacity`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, replace
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from qplug_converters import codec
from qplug_converters.block import dense_modules
from qplug_converters.blocks import blocks_of, rows_of
from qplug_converters.checkpoint import Checkpoint, open_checkpoint
from qplug_converters.codec import TORCH_DTYPES, decode, encode
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.format import Format
from qplug_converters.formats import FORMATS
from qplug_converters.layout import TensorSpec
from qplug_converters.plan import Verdict, Wishes, make_plan
from qplug_converters.scheme import Kind, ModelScheme, Scheme
from qplug_converters.shards import read_header
from qplug_converters.survey import survey
from qplug_converters.verify import verify
from qplug_converters.weight import (
    AffineGrid,
    CodebookGrid,
    Grid,
    NestedAbsmax,
    OffsetGrid,
    QuantizedWeight,
    RowGrid,
)
from qplug_converters.writer import Writer, cut

MODULES = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


@st.composite
def schemes(draw: st.DrawFn, target: Format, also: Format | None = None) -> Scheme:
    """Draw a scheme that `target` can hold, small, with every freedom its capacity gives.

    With `also`, a scheme that this format can hold too.
    """
    both = [f.capacity for f in (target, also) if f is not None and f.capacity is not None]
    holds = both[0]
    bits = draw(st.sampled_from([b for b in holds.bits if all(b in h.bits for h in both)]))
    step_in = lcm(*(h.in_multiple(bits) for h in both))
    step_out = lcm(*(h.out_multiple(bits) for h in both))
    inp = step_in * draw(st.integers(1, max(1, 192 // step_in)))
    out = step_out * draw(st.integers(1, max(1, 96 // step_out)))
    if all(h.ragged for h in both):
        group = draw(st.integers(1, inp))
    else:
        group = draw(st.sampled_from([d for d in range(1, inp + 1) if inp % d == 0]))
    dtypes = [d for d in holds.scale_dtypes if all(d in h.scale_dtypes for h in both)]
    sizes = [set(h.group_sizes) for h in both if h.group_sizes]
    if holds.kind is Kind.CODEBOOK:  # blocks may span rows
        group = draw(st.sampled_from((32, 64, 128, 4096)))
    elif sizes:
        group = draw(st.sampled_from(sorted(set.intersection(*sizes))))
        inp = lcm(step_in, group) * draw(st.integers(1, 2))
    if holds.kind is Kind.ROWS:
        group = inp
    kind = holds.kind
    if also is None and holds.also:
        kind = draw(st.sampled_from((holds.kind, *holds.also)))
    scheme = Scheme(out, inp, bits, group, scale_dtype=draw(st.sampled_from(dtypes)), kind=kind)
    if kind is not holds.kind:
        scheme = _native(kind).adopt(_on(kind, scheme))
    orders = scheme.kind is Kind.AFFINE and all(h.act_order for h in both)
    act_order = orders and scheme.groups > 1 and draw(st.booleans())
    return target.adopt(replace(scheme, act_order=act_order, desc_act=act_order))


def _native(kind: Kind) -> Format:
    """Return a format whose own grid is of this kind."""
    return next(f for f in FORMATS if f.capacity is not None and f.capacity.kind is kind)


def _on(kind: Kind, scheme: Scheme) -> Scheme:
    """Return a scheme with the numbers that a grid of this kind has."""
    if kind is Kind.OFFSET:
        group = next(g for g in (64, 32, 16, 8, 4, 2, 1) if scheme.in_features % g == 0)
        return replace(scheme, bits=4, group_size=group, scale_dtype="F16")
    return replace(scheme, bits=8 if kind is Kind.ROWS else 4)


def weight_of(
    scheme: Scheme, target: Format, seed: int, also: Format | None = None
) -> QuantizedWeight:
    """Make a weight of a scheme: every code and zero that the formats can hold may occur."""
    both = [f.capacity for f in (target, also) if f is not None and f.capacity is not None]
    rng = torch.Generator().manual_seed(seed)
    out, inp, groups = scheme.out_features, scheme.in_features, scheme.groups
    if scheme.kind is not Kind.AFFINE:
        return _other_weight(scheme, rng)
    codes = torch.randint(0, 1 << scheme.bits, (out, inp), generator=rng, dtype=torch.uint8)
    low = max(holds.zeros(scheme.bits)[0] for holds in both)
    high = min(holds.zeros(scheme.bits)[1] for holds in both)
    zeros = torch.randint(low, high + 1, (out, groups), generator=rng).to(torch.int16)
    if scheme.sym:
        zeros.fill_(scheme.midpoint)
    scales = torch.randn(out, groups, generator=rng).clamp(-8, 8)
    scales = (scales.sign() * scales.abs().clamp(min=0.01)).to(TORCH_DTYPES[scheme.scale_dtype])
    g_idx = None
    if scheme.act_order:
        g_idx = (torch.arange(inp) // scheme.group_size)[torch.randperm(inp, generator=rng)]
        if torch.equal(g_idx, torch.arange(inp) // scheme.group_size):
            g_idx = g_idx.flip(0)
        g_idx = g_idx.to(torch.int32)
    return QuantizedWeight(codes, scheme.bits, AffineGrid(scales, zeros, scheme.group_size, g_idx))


def _other_weight(scheme: Scheme, rng: torch.Generator) -> QuantizedWeight:
    """Make a weight on a grid that is not affine."""
    out, inp, groups = scheme.out_features, scheme.in_features, scheme.groups
    codes = torch.randint(0, 1 << scheme.bits, (out, inp), generator=rng, dtype=torch.uint8)
    if scheme.kind is Kind.ROWS:
        grid: Grid = RowGrid(torch.rand(out, generator=rng) + 0.01)
    elif scheme.kind is Kind.OFFSET:
        scales = (torch.rand(out, groups, generator=rng) + 0.01).half()
        zeros = torch.randint(0, 16, (out, groups), generator=rng)
        grid = OffsetGrid(scales, -(scales.float() * zeros).half(), scheme.group_size)
    else:
        assert scheme.codebook is not None
        table = torch.frombuffer(bytearray(scheme.codebook.table), dtype=torch.float32)
        blocks = scheme.sizes["block"]
        grid = CodebookGrid(table, torch.rand(blocks, generator=rng) + 0.01, scheme.group_size)
    return QuantizedWeight(codes, scheme.bits, grid)


def same(one: QuantizedWeight, two: QuantizedWeight) -> bool:
    """Whether two weights are equal field by field, dtypes included."""
    return _equal(one, two)


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, QuantizedWeight | Grid | NestedAbsmax):
        return type(one) is type(two) and all(
            _equal(getattr(one, item.name), getattr(two, item.name)) for item in fields(one)
        )
    return bool(one == two)


def same_bytes(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: words may be stored as floats that are NaN."""
    flat = [t.reshape(-1).view(torch.uint8) for t in (one, two)]
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(*flat)


def specs_of(stored: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return dtype and shape of tensors in safetensors' terms."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    return {n: TensorSpec(names[t.dtype], tuple(t.shape)) for n, t in stored.items()}


# The laws of one linear -------------------------------------------------------------------------


def round_trip(target: Format, scheme: Scheme, weight: QuantizedWeight) -> None:
    """decode(encode(w)) = w, and the stored tensors have the predicted names, dtypes, shapes."""
    layout = target.layout(scheme)
    stored = encode(layout, weight)
    assert specs_of(stored) == layout.specs(scheme.sizes)
    assert layout.check("m", scheme.sizes, specs_of(stored)) == []
    assert same(decode(layout, scheme, stored), weight)


def blocks_equal_whole(target: Format, scheme: Scheme, weight: QuantizedWeight) -> None:
    """Encoding and decoding by blocks of rows gives what the whole gives."""
    layout = target.layout(scheme)
    whole = encode(layout, weight)
    parts = {n: torch.full_like(t, 1) for n, t in whole.items()}
    for start, stop in blocks_of(scheme, layout, most=scheme.in_features):
        out = {p.name: rows_of(p, parts[p.name], scheme.sizes, start, stop) for p in layout}
        encode(layout, weight.rows(start, stop), out)
        block = replace(scheme, out_features=stop - start)
        mine = {p.name: rows_of(p, whole[p.name], scheme.sizes, start, stop) for p in layout}
        got = decode(layout, block, mine, start)
        assert same(got, weight.rows(start, stop))
    assert all(same_bytes(parts[n], whole[n]) for n in whole)


def fast_equals_literal(target: Format, scheme: Scheme, weight: QuantizedWeight) -> None:
    """The whole-word routes equal the patterns executed as they are written."""
    for part in target.layout(scheme):
        if part.packing is None:
            continue
        values = codec._held(weight, part.holds)
        literal = codec._literal_pack(part, values)
        fast = codec.pack_part(part, values)
        assert same_bytes(fast, literal)
        assert torch.equal(
            codec.unpack_part(part, fast, scheme.sizes),
            codec._literal_unpack(part, literal, scheme.sizes),
        )


# Whole checkpoints ------------------------------------------------------------------------------


def write(
    folder: Path,
    target: Format,
    linears: Mapping[str, tuple[Scheme, QuantizedWeight]],
    rest: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard: int = 1 << 30,
) -> Checkpoint:
    """Write a checkpoint folder of quantized linears and other tensors, and open it."""
    if rest is None:
        rest = {
            "model.norm.weight": torch.ones(8),
            "model.layers.0.self_attn.k_scale": torch.ones(1),
        }
    tensors = {
        f"{module}.{name}": tensor
        for module, (scheme, weight) in linears.items()
        for name, tensor in encode(target.layout(scheme), weight).items()
    } | dict(rest)
    model = ModelScheme(
        target.name, {m: s for m, (s, _) in linears.items()}, dense_modules(specs_of(rest))
    )
    written = target.write(model)
    shards = cut(({name: spec} for name, spec in specs_of(tensors).items()), max_shard)
    with Writer(folder, shards, target.shard_stem) as writer:
        for shard in writer.shards:
            with shard:
                for name in shard.specs:
                    shard.put(name, tensors[name])
        for name, block in written.side_files.items():
            writer.json(name, block)
        block = {"quantization_config": dict(written.block)} if written.block else {}
        writer.json("config.json", {"model_type": "llama", **(config or {}), **block})
        writer.commit()
    return open_checkpoint(folder)


def surveyed(folder: Path) -> tuple[Checkpoint, Format, ModelScheme]:
    """Open a folder, read what is quantized in it, and survey its zeros."""
    checkpoint = open_checkpoint(folder)
    found, model = checkpoint.scheme()
    return checkpoint, found, survey(checkpoint, found, model)


def drawn_checkpoint(
    data: st.DataObject, target: Format, seed: int, folder: Path, also: Format | None = None
) -> dict[str, Scheme]:
    """Draw two linears that one config of the format can describe, and write them."""
    assert target.capacity is not None
    first = data.draw(schemes(target, also))
    second = first if target.capacity.uniform else data.draw(schemes(target, also))
    linears = {}
    for module, scheme in zip(MODULES, (first, second), strict=True):
        linears[module] = (scheme, weight_of(scheme, target, seed, also))
    write(folder, target, linears, max_shard=data.draw(st.sampled_from([1 << 10, 1 << 30])))
    return {module: scheme for module, (scheme, _) in linears.items()}


def reads_back(folder: Path, target: Format, meant: Mapping[str, Scheme]) -> None:
    """What was written is detected, read as it was meant, and equal to itself."""
    checkpoint = open_checkpoint(folder)
    found, model = checkpoint.scheme()
    assert found is target
    for module, scheme in meant.items():
        got = model.linears[module]
        # not desc_act, one flag for the model: what was drawn is the fact per linear
        for field in ("out_features", "in_features", "bits", "act_order", "scale_dtype"):
            assert getattr(got, field) == getattr(scheme, field), field
        assert got.groups == scheme.groups
        most = 4096 if scheme.kind is Kind.CODEBOOK else scheme.in_features
        assert got.group_size == min(scheme.group_size, most)
    sizes_are_predicted(checkpoint, target, model)
    assert verify(checkpoint, open_checkpoint(folder)).same


def goes_there_and_back(folder: Path, source: Format, target: Format) -> None:
    """What lies in `a` and fits both formats is COPIED or EXACT, and so is its way back."""
    checkpoint, found, model = surveyed(folder / "a")
    plan = make_plan(found, model, target)
    assert plan.verdict is (Verdict.COPIED if source is target else Verdict.EXACT)
    execute(plan, checkpoint, folder / "b")
    proof = verify(checkpoint, open_checkpoint(folder / "b"))
    assert proof.same, proof
    if target.read is None:
        return
    there, found, model = surveyed(folder / "b")
    back = make_plan(found, model, source)
    assert back.verdict <= Verdict.EXACT
    execute(back, there, folder / "c")
    assert verify(checkpoint, open_checkpoint(folder / "c")).same


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


def keeps_its_promise(folder: Path, target: Format, wished: Wishes) -> Verdict:
    """What is promised of the checkpoint in `a` is proven; what is refused has its reason."""
    checkpoint, found, model = surveyed(folder / "a")
    plan = make_plan(found, model, target, wished)
    if plan.verdict is Verdict.IMPOSSIBLE:
        with pytest.raises(QplugError) as caught:
            plan.refuse_above(Verdict.REQUANTIZED)
        assert caught.value.found
        assert caught.value.fix
        return plan.verdict
    execute(plan, checkpoint, folder / "b")
    proof = verify(checkpoint, open_checkpoint(folder / "b"))
    assert proof.verdict <= max(plan.verdict, Verdict.EXACT), proof
    problems = [*proof.problems]
    if plan.verdict is Verdict.REQUANTIZED:  # few groups may have midpoints by chance
        problems = [p for p in problems if "every zero is the midpoint" not in p]
    assert problems == []
    return plan.verdict


def sizes_are_predicted(checkpoint: Checkpoint, target: Format, model: ModelScheme) -> None:
    """The bytes a layout predicts are the bytes in the file."""
    for module, scheme in model.linears.items():
        for name, spec in target.layout(scheme).specs(scheme.sizes).items():
            location = checkpoint.locations[f"{module}.{name}"]
            assert location.spec == spec
            assert location.spec.nbytes == len(checkpoint.raw(f"{module}.{name}"))


# Mutations --------------------------------------------------------------------------------------


def found(original: Checkpoint, mutated: Path) -> str | None:
    """Return how a mutated copy is found out, or `None` if it passes for the original."""
    try:
        proof = verify(original, open_checkpoint(mutated))
    except QplugError as error:
        return f"check: {error}"
    return None if proof.same else "verify"


def tensor_mutations(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (tensor, kind, seed) for every stored tensor and every kind of damage."""
    for shard in sorted(folder.glob("*.safetensors")):
        for name in read_header(shard):
            for kind in ("bit", "drop", "dtype", "shape"):
                yield name, kind, len(name)


def mutate_tensor(source: Path, target: Path, name: str, kind: str, seed: int) -> None:
    """Copy a folder and damage one tensor in it."""
    shutil.copytree(source, target)
    shard = next(s for s in sorted(target.glob("*.safetensors")) if name in read_header(s))
    raw = bytearray(shard.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header[name]["data_offsets"]
    body = raw[8 + length :]
    entry = header[name]
    if kind == "bit":
        at = begin + int(np.random.default_rng(seed).integers(end - begin))
        body[at] ^= 0x10
    elif kind == "drop":
        del header[name], body[begin:end]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [o - (end - begin) for o in other["data_offsets"]]
    elif kind == "dtype":
        twins = {"I32": "F32", "F32": "I32", "F16": "BF16", "BF16": "F16", "I16": "F16", "U8": "I8"}
        twins |= {"I64": "F64", "I8": "U8"}
        entry["dtype"] = twins[entry["dtype"]]
    else:
        entry["shape"] = [1, *entry["shape"]]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))


def mutate_config(source: Path, target: Path, key: str, value: Any) -> None:
    """Copy a folder and change one key of its quantization config, in every file that has it."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"][key] = value
    (target / "config.json").write_text(json.dumps(config))
    side = target / "quantize_config.json"
    if side.exists():
        side.write_text(json.dumps(config["quantization_config"]))


def unseen_damage(folder: Path, copies: Path) -> tuple[int, list[tuple[str, str]]]:
    """Damage each tensor in every way; return how many copies, and which pass for the original."""
    original = open_checkpoint(folder)
    passed, count = [], 0
    for count, (name, kind, seed) in enumerate(tensor_mutations(folder), 1):
        copy = copies / str(count)
        mutate_tensor(folder, copy, name, kind, seed)
        if found(original, copy) is None:
            passed.append((name, kind))
    return count, passed


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


def unseen_config_changes(
    folder: Path, copies: Path, harmless: Collection[str], defaults: Mapping[str, Any]
) -> tuple[int, list[tuple[str, Any]]]:
    """Change each key of the config; return how many copies, and which pass for the original.

    `harmless` keys are left alone; a key is not dropped where it states one of the `defaults`.
    """
    original = open_checkpoint(folder)
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    passed, count = [], 0
    for key in [key for key in block if key not in harmless]:
        for value in OTHERS:
            same = type(block[key]) is type(value) and block[key] == value
            dropped = value is None and defaults.get(key, ...) in (block[key], None)
            if same or dropped:
                continue
            count += 1
            copy = copies / f"{key}{count}"
            mutate_config(folder, copy, key, value)
            if found(original, copy) is None:
                passed.append((key, value))
    return count, passed
