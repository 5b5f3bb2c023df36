"""GPUs written by hand: which kernel a linear gets on one, asked through an engine's own calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qplug_kernels import Problem, choose, linear
from qplug_kernels.problem import Choice

ARCHS = ("sm_75", "sm_80", "sm_90", "sm_120", "gfx942")

GPU_KERNELS = {
    "autoround-awq-asym-g128": "triton_affine",
    "autoround-native-2b-asym-g32": "triton_affine",
    "awq-gemm-g32-bias": "triton_affine",
    "awq-gemv-g64": "triton_affine",
    "awq-gemv_fast-g64": "triton_affine",
    "bnb-fp4": "triton_codebook",
    "bnb-int8": "triton_rows",
    "bnb-nf4-dq": "triton_codebook",
    "ct-int3-asym-g128-fields": "triton_affine",
    "ct-int8-sym-channel": "triton_affine",
    "gptq-4b-sym-g64-actorder": "triton_affine",
    "gptq_p-3b-sym-g128": "triton_affine",
}
"""Golden checkpoint -> the kernel of a GPU whose tensor cores Triton uses."""

WITHOUT_TENSOR_CORES = {"triton_affine": "triton_cuda_cores", "dense": "dense"}
"""The same on sm_75; other kernels need tensor cores, and the weight is decoded."""


def expected(name: str, arch: str) -> str:
    """Return the kernel for the linears of a golden checkpoint."""
    kernel = GPU_KERNELS[name]
    return WITHOUT_TENSOR_CORES.get(kernel, "dense") if arch == "sm_75" else kernel


def put_in(monkeypatch: pytest.MonkeyPatch, arch: str) -> list[str]:
    """Let every choice see a GPU of this kind; return the list that the chosen names go to.

    What is prepared is what a CPU runs: there is no GPU here.
    """
    chosen: list[str] = []

    def see(problem: Problem, **kwargs: Any) -> Choice:
        on_card = replace(
            problem,
            device="cuda",
            arch=arch,
            features=frozenset(),
            triton_version=(3, 6),
            dtype=torch.float16,
        )
        chosen.append(choose(on_card).kernel.name)
        return choose(problem, force="dense")

    monkeypatch.setattr(linear, "choose", see)
    return chosen
