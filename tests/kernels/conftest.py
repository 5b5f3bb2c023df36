"""Weights drawn at random, and one kernel at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_kernels import linear


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel forced from outside, nothing said yet."""
    monkeypatch.delenv("QPLUG_KERNEL", raising=False)
    linear._say.cache_clear()
    torch.manual_seed(0)
    yield
    linear._say.cache_clear()


@pytest.fixture
def random_weight() -> Callable[..., QuantizedWeight]:
    """Return a function that draws a weight: codes, float16 scales, zeros from 0 to 2^bits."""

    def draw(
        out_features: int,
        in_features: int,
        group_size: int,
        bits: int = 4,
        act_order: bool = False,
        highest_zero: int | None = None,
        scale_dtype: torch.dtype = torch.float16,
    ) -> QuantizedWeight:
        groups = -(-in_features // group_size)
        g_idx = None
        if act_order:
            g_idx = torch.arange(in_features, dtype=torch.int32) // group_size
            g_idx = g_idx[torch.randperm(in_features)]
        top = 1 << bits if highest_zero is None else highest_zero
        return QuantizedWeight(
            torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8),
            bits,
            AffineGrid(
                (torch.rand(out_features, groups) * 0.02 + 1e-3).to(scale_dtype),
                torch.randint(0, top + 1, (out_features, groups), dtype=torch.int16),
                group_size,
                g_idx,
            ),
        )

    return draw
