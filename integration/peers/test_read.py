"""What qplug writes, read by the tools it is written for; their weights are compared bit by bit.

First the method: each tool reads the checkpoints that it or its kin wrote (`tests/golden`) and gets
their reference. Then what `qplug convert` made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from .cases import assert_same, label, pairs, reference

pytestmark = pytest.mark.peer

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
        "gptq_v2-4b-asym-g64",
        "awq-gemm-g128",
        "awq-gemm-g32-bias",
    ),
    "autoawq": (
        "awq-gemm-g128",
        "awq-gemm-g32-bias",
        "autoround-autoawq-sym-g64",
    ),
}
"""By tool, what it reads right."""
WRITTEN = {
    ("gptqmodel", "gptq"): (
        "gptq-2b-asym-g32 --bits 8",
        "gptq-3b-asym-g128",
        "gptq-3b-sym-g128-by-5.8.0 --bits 4",
        "gptq-4b-asym-g64",
        "gptq-4b-sym-g64-actorder",
        "gptq-8b-sym-g128",
        "gptq-dynamic-mixed",
        "gptq-moe-mixtral-4b-g64",
        "gptq_v2-4b-asym-g64 --bits 8",
        "autogptq-3b-sym-g64 --bits 4",
        "autogptq-4b-sym-ragged-g96 --group-size 32",
        "awq-gemm-g128 --bits 8",
        "awq-gemm-g32-bias --bits 8",
        "autoround-autoawq-sym-g64",
    ),
    ("gptqmodel", "gptq_v2"): (
        "gptq-2b-asym-g32",
        "gptq-3b-sym-g128-by-5.8.0",
        "gptq-4b-asym-g64",
        "gptq-4b-sym-g64-actorder",
        "autogptq-3b-sym-g64",
        "awq-gemm-g32-bias",
    ),
    ("autoawq", "awq"): (
        "gptq-2b-asym-g32",
        "gptq-3b-sym-g128-by-5.8.0",
        "gptq-4b-asym-g64",
        "gptq-4b-sym-channel",
        "gptq-4b-sym-g128",
        "gptq_v2-4b-asym-g64",
        "autogptq-3b-sym-g64",
        "awq-gemm-g32-bias",
        "autoround-autoawq-sym-g64",
    ),
}
"""By tool and format, what is converted, with options."""


@pytest.mark.parametrize(("name", "source"), pairs(GOLDENS), ids=label)
def test_golden(
    name: str, source: str, read: Callable[..., dict[str, Tensor]], golden: Path
) -> None:
    assert_same(read(name, golden / source), reference(golden / source))


@pytest.mark.parametrize(("how", "source"), pairs(WRITTEN), ids=label)
def test_written(
    how: tuple[str, str],
    source: str,
    read: Callable[..., dict[str, Tensor]],
    qplug: Callable[..., Path],
    golden: Path,
) -> None:
    (name, to), (source, *options) = how, source.split()
    found = read(name, qplug(golden / source, to, *options))
    assert_same(found, reference(golden / source))
