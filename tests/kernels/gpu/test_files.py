"""Files that bitsandbytes wrote, multiplied on a GPU as it would decode them."""

from __future__ import annotations

from dataclasses import replace

import laws
import pytest
import torch
from builders import GOLDEN
from safetensors import safe_open

from qplug_converters.codec import decode
from qplug_kernels import Problem, choose
from qplug_kernels.gpu import nibbles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kernel", "table"),
    [
        ("bnb-nf4", "triton_codebook", 0),
        ("bnb-nf4-dq", "triton_codebook", 0),
        ("bnb-fp4", "triton_codebook", 1),
        ("bnb-int8", "triton_rows", None),
    ],
)
def test_linears_of_a_file(name, kernel, table, dtype, device):
    checkpoint, found, model = laws.surveyed(GOLDEN / name)
    with safe_open(GOLDEN / name / "reference.safetensors", "pt") as reference:
        for module, scheme in model.linears.items():
            parts = found.layout(scheme)
            stored = {p.name: checkpoint.tensor(f"{module}.{p.name}") for p in parts}
            weight = decode(parts, scheme, stored).to(device)
            problem = Problem.here(weight, dtype, device)
            on_card = replace(problem, device="cuda", arch="sm_90", triton_version=(3, 6))
            chosen = choose(on_card).kernel
            assert chosen.name == kernel
            operands = list(chosen.prepare(weight, problem).values())
            if table is not None:
                assert nibbles.Form.of(operands).table == table
            x = torch.randn(3, weight.in_features).to(device, dtype)
            meant = reference.get_tensor(f"{module}.weight").double().to(device)
            expected = x.double() @ meant.T
            error = (chosen.run(x, operands, None).double() - expected).norm() / expected.norm()
            assert error < (1e-3 if dtype == torch.float16 else 1e-2)
