"""What qplug writes, read by the tools it is written for; their weights are compared bit by bit.

First the method: each tool reads the checkpoints that it or its kin wrote (`tests/golden`) and gets
their reference. Then what `qplug convert` made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import Draft
from safetensors.torch import load_file
from torch import Tensor

from .cases import assert_same, different, label, pairs, reference
from .peers import Asked

pytestmark = pytest.mark.peer

Read = Callable[..., dict[str, Tensor]]
Convert = Callable[..., Path]
Dense = Callable[[Path], dict[str, Tensor]]

GOLDENS = {
    "gptqmodel": (
        "gptq-2b-asym-g32",
        "gptq-3b-asym-g128",
        "gptq-4b-asym-g64",
        "gptq-4b-sym-channel",
        "gptq-4b-sym-g128",
        "gptq-4b-sym-g32",
        "gptq-4b-sym-g64-actorder",
        "gptq-8b-sym-g128",
        "gptq-dynamic-mixed",
        "gptq-moe-mixtral-4b-g64",
        "gptq_p-3b-sym-g128",
        "gptq_v2-4b-asym-g64",
        "awq-gemm-g128",
        "awq-gemm-g32-bias",
    ),
    "autoawq": (
        "awq-gemm-g128",
        "awq-gemm-g32-bias",
        "awq-gemv-g64",
        "awq-gemv_fast-g64",
        "autoround-autoawq-sym-g64",
    ),
    "bitsandbytes": (
        "bnb-fp4",
        "bnb-int8",
        "bnb-nf4",
        "bnb-nf4-dq",
        "bnb-nf4-dq-after-forward",
        "bnb-nf4-dq-storage-bf16",
    ),
    "compressed-tensors": (
        "ct-int3-sym-g128",
        "ct-int4-asym-channel",
        "ct-int4-asym-g64",
        "ct-int4-sym-g128-kv-fp8",
        "ct-int8-sym-channel",
    ),
    "auto-round": (
        "autoround-awq-asym-g128",
        "autoround-gptq-sym-g128",
        "autoround-mixed-extra",
        "autoround-native-2b-asym-g32",
    ),
}
"""By tool, what it reads right."""
WRITTEN = {
    ("gptqmodel", "gptq"): (
        "gptq-2b-asym-g32 --bits 8",
        "gptq-3b-sym-g128-by-5.8.0 --bits 4",
        "gptq-4b-sym-g64-actorder",
        "gptq-dynamic-mixed --group-size 32",
        "gptq-moe-mixtral-4b-g64 --group-size 32",
        "gptq_p-3b-sym-g128",
        "gptq_v2-4b-asym-g64 --bits 8",
        "autogptq-3b-sym-g64 --bits 4",
        "autogptq-4b-asym-g128 --bits 8",
        "autogptq-4b-sym-ragged-g96 --group-size 32",
        "awq-gemm-g128 --bits 8",
        "awq-gemm-g32-bias --bits 8",
        "awq-gemv-g64 --bits 8",
        "autoround-autoawq-sym-g64",
        "autoround-gptq-sym-g128",
        "autoround-mixed-extra",
        "ct-int3-sym-g128",
        "ct-int4-sym-g128-kv-fp8",
        "ct-int8-sym-channel",
    ),
    ("gptqmodel", "gptq_v2"): (
        "gptq-2b-asym-g32",
        "gptq-3b-sym-g128-by-5.8.0",
        "gptq-4b-asym-g64",
        "gptq-4b-sym-g64-actorder",
        "autogptq-3b-sym-g64",
        "autogptq-4b-asym-g128 --bits 8",
        "awq-gemm-g32-bias",
        "autoround-awq-asym-g128",
        "autoround-native-2b-asym-g32",
        "ct-int3-asym-g128-fields",
        "ct-int4-asym-g64",
        "ct-int4-asym-g64-gidx",
    ),
    ("gptqmodel", "gptq_p"): (
        "gptq-2b-asym-g32",
        "gptq-3b-asym-g128",
        "autogptq-3b-sym-g64",
        "ct-int3-asym-g128-fields",
    ),
    ("autoawq", "awq"): (
        "gptq-2b-asym-g32",
        "gptq-3b-sym-g128-by-5.8.0",
        "gptq-4b-asym-g64",
        "gptq-4b-sym-channel",
        "gptq-moe-mixtral-4b-g64",
        "gptq_v2-4b-asym-g64",
        "autogptq-4b-sym-ragged-g96 --group-size 32",
        "gptq-4b-sym-g128 --tp 4",
        "awq-gemm-g32-bias",
        "awq-gemv-g64",
        "autoround-autoawq-sym-g64",
        "autoround-gptq-sym-g128",
        "autoround-native-2b-asym-g32",
        "ct-int3-asym-g128-fields",
        "ct-int4-asym-channel",
        "ct-int4-sym-g128-kv-fp8",
    ),
    ("gptqmodel", "awq"): ("gptq-4b-asym-g64", "ct-int4-asym-g64"),
    ("autoawq", "awq_gemv"): (
        "gptq-3b-asym-g128",
        "gptq-4b-asym-g64",
        "awq-gemm-g128",
        "awq-gemm-g32-bias",
        "autoround-awq-asym-g128",
        "ct-int4-asym-g64",
    ),
    ("autoawq", "awq_gemv_fast"): (
        "gptq-4b-sym-g128",
        "autoround-autoawq-sym-g64",
        "autoround-gptq-sym-g128",
        "ct-int4-sym-g128-kv-fp8",
    ),
    ("compressed-tensors", "compressed-tensors"): (
        "gptq-2b-asym-g32",
        "gptq-3b-asym-g128",
        "gptq-4b-asym-g64",
        "gptq-4b-sym-channel",
        "gptq-8b-sym-g128",
        "gptq-dynamic-mixed",
        "gptq-moe-mixtral-4b-g64",
        "gptq_v2-4b-asym-g64",
        "autogptq-3b-sym-g64",
        "awq-gemm-g128",
        "awq-gemm-g32-bias",
        "awq-gemv-g64",
        "autoround-awq-asym-g128",
        "autoround-gptq-sym-g128",
        "autoround-mixed-extra",
        "autoround-native-2b-asym-g32",
        "ct-int3-asym-g128-fields",
        "ct-int4-asym-channel",
    ),
    ("auto-round", "autoround"): (
        "gptq-2b-asym-g32",
        "gptq-3b-asym-g128",
        "gptq-8b-sym-g128",
        "awq-gemm-g32-bias",
        "autoround-awq-asym-g128",
        "ct-int4-asym-g64",
    ),
    ("auto-round", "autoround_gptq"): (
        "gptq-4b-sym-channel",
        "gptq-dynamic-mixed",
        "autoround-autoawq-sym-g64",
        "ct-int3-sym-g128",
    ),
    ("auto-round", "autoround_awq"): (
        "gptq-4b-asym-g64",
        "autoround-gptq-sym-g128",
        "ct-int4-asym-channel",
    ),
    ("bitsandbytes", "bnb-nf4"): (
        "bnb-nf4",
        "bnb-nf4-dq",
        "bnb-nf4-dq-storage-bf16",
        "bnb-nf4-after-forward",
        "bnb-nf4-dq-after-forward",
    ),
}
"""By tool and format, what is converted without loss, with options."""
ROUNDED = {
    # The zero points of GEMV_FAST are float16 products.
    ("autoawq", "awq_gemv_fast"): ("gptq-4b-asym-g64", "awq-gemm-g32-bias", "ct-int4-asym-g64"),
    ("gptqmodel", "gptq"): ("bnb-int8",),
    ("compressed-tensors", "compressed-tensors"): ("bnb-int8",),
}
"""By tool and format, what is converted within a bound."""
REQUANTIZED = {
    ("gptqmodel", "gptq_v2"): ("bnb-nf4-dq",),
    ("autoawq", "awq"): ("gptq-4b-sym-g64-actorder", "gptq-8b-sym-g128", "bnb-nf4"),
    ("compressed-tensors", "compressed-tensors"): ("ct-int4-asym-g64-gidx", "bnb-fp4"),
    ("bitsandbytes", "bnb-nf4"): ("gptq-4b-asym-g64", "bnb-fp4"),
    ("bitsandbytes", "bnb-fp4"): ("awq-gemm-g32-bias",),
    ("bitsandbytes", "bnb-int8"): ("gptq-8b-sym-g128", "ct-int8-sym-channel"),
}
"""By tool and format, what gets new codes."""


@pytest.mark.parametrize(("name", "source"), pairs(GOLDENS), ids=label)
def test_golden(name: str, source: str, read: Read, golden: Path) -> None:
    assert_same(read(name, golden / source), reference(golden / source))


@pytest.mark.parametrize(("how", "source"), pairs(WRITTEN), ids=label)
def test_written(
    how: tuple[str, str], source: str, read: Read, qplug: Convert, golden: Path
) -> None:
    (name, to), (source, *options) = how, source.split()
    found = read(name, qplug(golden / source, to, *options))
    assert_same(found, reference(golden / source))


@pytest.mark.parametrize(("how", "source"), pairs(ROUNDED), ids=label)
def test_rounded(
    how: tuple[str, str], source: str, read: Read, qplug: Convert, dense: Dense, golden: Path
) -> None:
    """The tool reads what qplug reads, and that is near what it was made of."""
    name, to = how
    folder = qplug(golden / source, to)
    found, ours, expected = read(name, folder), dense(folder), reference(golden / source)
    assert_same(found, {name: ours[name] for name in expected})
    assert different(found, expected)
    for name, weight in found.items():
        # Half a unit in the last place of float16, of a zero point of 15 steps.
        assert (weight - expected[name]).abs().max() <= 2**-11 * expected[name].abs().max() * 2


@pytest.mark.parametrize(("how", "source"), pairs(REQUANTIZED), ids=label)
def test_requantized(
    how: tuple[str, str], source: str, read: Read, qplug: Convert, dense: Dense, golden: Path
) -> None:
    name, to = how
    folder = qplug(golden / source, to, "--allow", "requantized")
    found, ours, expected = read(name, folder), dense(folder), reference(golden / source)
    assert_same(found, {name: ours[name] for name in expected})
    assert different(found, expected)


@pytest.mark.parametrize(
    "source", ["gptq-4b-asym-g64", "gptq-8b-sym-g128", "awq-gemm-g32-bias", "autogptq-3b-sym-g64"]
)
def test_loaded_by_transformers(source: str, read: Read, qplug: Convert, golden: Path) -> None:
    """Transformers decompresses in the dtype of the scales: one rounding to float16."""
    found = read("compressed-tensors", qplug(golden / source, "compressed-tensors"), "load")
    expected = reference(golden / source)
    assert_same(found, {name: weight.half().float() for name, weight in expected.items()})


@pytest.mark.parametrize("source", ["awq-gemm-g128", "awq-gemm-g32-bias"])
def test_compressed_tensors_converts_awq_to_the_same_bytes(
    source: str,
    tool: Callable[[str], Asked],
    qplug: Convert,
    tmp_path: Path,
) -> None:
    folder = Draft.of(source).save(tmp_path / "awq")
    tool("compressed-tensors")("from_awq", folder, tmp_path / "theirs")
    theirs, ours = (
        load_file(made / "model.safetensors")
        for made in (tmp_path / "theirs", qplug(folder, "compressed-tensors"))
    )
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
