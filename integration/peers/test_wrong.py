"""Where a tool reads a checkpoint wrongly, or not at all, and qplug reads it right.

Each case is why that reader is no oracle there. One that passes no longer says that the tool was
repaired: then its case goes to `test_read.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import Draft
from safetensors.torch import load_file
from torch import Tensor

from ..vllm.tiny import LINEARS, Shape, Tiny
from .cases import assert_same, by_role, different, label, pairs, reference
from .peers import Asked, Unusable

pytestmark = pytest.mark.peer

Dense = Callable[[Path], dict[str, Tensor]]
Read = Callable[..., dict[str, Tensor]]

MISREAD = {
    # 3-bit zeros as GPTQModel <= 6.0.3 stored them: 7.7 takes them for its own.
    ("gptqmodel", "read"): ("gptq-3b-sym-g128-by-5.8.0",),
    # Its dequantizer of files knows neither AutoAWQ's order of columns ...
    ("gptqmodel", "dequantize_file"): (
        "awq-gemm-g128",
        "awq-gemm-g32-bias",
        # ... nor the borrow of a zero point of 0, which its own layers undo.
        "gptq-4b-asym-g64",
        "gptq-2b-asym-g32",
    ),
    # Saved after a forward on a CPU: absmax transposed and rounded, and read as if it were not.
    ("bitsandbytes", "read"): ("bnb-nf4-after-forward",),
    # 3 bits as compressed-tensors < 0.18 packed them.
    ("compressed-tensors", "read"): ("ct-int3-asym-g128-fields",),
}
"""By tool and function: silently other weights."""
REFUSED = {
    # AutoGPTQ wrote `is_marlin_format: false` into every checkpoint.
    ("gptqmodel", "read", "is_marlin_format"): ("autogptq-3b-sym-g64", "autogptq-4b-asym-g128"),
    # `dynamic`: modules of other bits than the rest.
    ("gptqmodel", "dequantize_file", "must match the size"): ("gptq-dynamic-mixed",),
    # compressed-tensors >= 0.19 has no code for act order.
    ("compressed-tensors", "read", "does not match expected"): ("ct-int4-asym-g64-gidx",),
    # Transformers 5.23 expects the zero points of asymmetric files unpacked unless told to
    # dequantize.
    ("compressed-tensors", "load_packed", "ignore_mismatched_sizes"): (
        "ct-int4-asym-channel",
        "ct-int4-asym-g64",
    ),
}
"""By tool, function and what the error says."""


@pytest.mark.parametrize(("how", "source"), pairs(MISREAD), ids=label)
def test_misread(how: tuple[str, str], source: str, read: Read, dense: Dense, golden: Path) -> None:
    name, function = how
    expected = reference(golden / source)
    assert different(read(name, golden / source, function), expected)
    ours = dense(golden / source)
    assert_same({name: ours[name] for name in expected}, expected)


@pytest.mark.parametrize(("how", "source"), pairs(REFUSED), ids=label)
def test_refused(
    how: tuple[str, str, str], source: str, read: Read, dense: Dense, golden: Path
) -> None:
    name, function, why = how
    with pytest.raises(Unusable, match=why):
        read(name, golden / source, function)
    expected = reference(golden / source)
    ours = dense(golden / source)
    assert_same({name: ours[name] for name in expected}, expected)


def test_gptqmodel_leaves_experts_of_other_names_unread(
    read: Read, dense: Dense, qplug: Callable[..., Path], golden: Path
) -> None:
    """Mixtral in AWQ under the names of AutoAWQ and vLLM: random experts, and a line in its log."""
    folder = qplug(golden / "gptq-moe-mixtral-4b-g64", "awq")
    expected = reference(golden / "gptq-moe-mixtral-4b-g64")
    far = different(read("gptqmodel", folder), expected)
    assert list(far) == [name for name in expected if ".experts." in name]
    ours = by_role(dense(folder))
    assert_same({name: ours[name] for name in expected}, expected)


def test_gptqmodel_refuses_asymmetric_v1_but_its_own(
    read: Read, dense: Dense, golden: Path
) -> None:
    """GPTQ v1, asymmetric, without its name in `meta`; what qplug writes names it."""
    folder = golden / "autogptq-4b-asym-g128"
    with pytest.raises(Unusable):
        read("gptqmodel", folder)
    ours, expected = dense(folder), reference(folder)
    assert_same({name: ours[name] for name in expected}, expected)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        # Two keys in AutoAWQ's own names are not read: 128 instead of 32 inputs a group.
        ({"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "gemm"}, None),
        ({"bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}, "Unsupported"),
    ],
    ids=["aliases", "capitals"],
)
def test_compressed_tensors_takes_awq_configs_at_their_letter(
    keys: dict[str, object],
    why: str | None,
    tool: Callable[[str], Asked],
    dense: Dense,
    golden: Path,
    tmp_path: Path,
) -> None:
    draft = Draft.of("awq-gemm-g32-bias")
    draft.block.clear()
    draft.block.update(quant_method="awq", **keys)
    folder, expected = draft.save(tmp_path / "awq"), reference(golden / "awq-gemm-g32-bias")
    if why is None:
        tool("compressed-tensors")("from_awq", folder, tmp_path / "ct")
        config = json.loads((tmp_path / "ct" / "config.json").read_text())
        (group,) = config["quantization_config"]["config_groups"].values()
        assert group["weights"]["group_size"] == 128
    else:
        with pytest.raises(Unusable, match=why):
            tool("compressed-tensors")("from_awq", folder, tmp_path / "ct")
    ours = dense(folder)
    assert_same({name: ours[name] for name in expected}, expected)


def test_bitsandbytes_misreads_blocks_that_cross_rows(
    tool: Callable[[str], Asked], read: Read, dense: Dense, tmp_path: Path
) -> None:
    """96 inputs in blocks of 64: its CPU dequantization goes wrong, its file does not."""
    shape = Shape(layers=1, hidden=96, inter=96, heads=3, kv_heads=3)
    source = Tiny("dense", shape=shape, quantizes=lambda module: False).write(tmp_path / "dense")
    original = load_file(source / "model.safetensors")
    tool("bitsandbytes")("quantize", source, tmp_path / "nf4")
    theirs, ours = read("bitsandbytes", tmp_path / "nf4"), dense(tmp_path / "nf4")
    assert {name.split(".")[-2] for name in theirs} == set(LINEARS)
    for name, weight in theirs.items():
        # Half of NF4's widest gap, of the largest weight.
        bound = 0.16 * original[name].abs().max()
        assert (ours[name] - original[name].float()).abs().max() <= bound
        assert (weight - original[name].float()).abs().max() > 2 * bound
