"""Columns in another order, with zeros between."""

from __future__ import annotations

import pytest
import torch

from qplug_kernels.gpu.gather import BLOCK, gather


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "places"), [(1, 64, 64), (3, 100, 2 * BLOCK + 5)])
def test_gather(tokens, inputs, places, dtype, device):
    x = torch.randn(tokens, inputs).to(device, dtype)
    order = torch.randint(-1, inputs, (places,), dtype=torch.int32, device=device)
    order[:3] = torch.tensor([-1, 0, inputs - 1])
    expected = torch.where(order >= 0, x[:, order.clamp(min=0).long()], 0)
    wide = torch.zeros(tokens, 2 * inputs, dtype=dtype, device=device)
    wide[:, ::2] = x
    for form in (x, wide[:, ::2], x.T.contiguous().T):
        assert torch.equal(gather(form, order), expected)
