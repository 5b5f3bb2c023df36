"""What qplug finds on this machine: versions, engines, registrations, kernels that would run."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "triton", "huggingface-hub", "accelerate")
STOCK_BACKENDS = ("gptqmodel", "optimum", "autoawq", "bitsandbytes", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Examination:
    """The findings; `problems` are sentences about what will not work."""

    versions: dict[str, str]
    machine: dict[str, str]
    engines: dict[str, str]
    kernels: list[dict[str, str]]
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return asdict(self)


def examine() -> Examination:
    """Look at the environment this Python runs in; imports torch, starts no engine."""
    problems: list[str] = []
    versions = {"qplug": _version("qplug"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    others = {name: _version(name) for name in STOCK_BACKENDS}
    versions |= {name: found for name, found in others.items() if found != "not installed"}
    engines = {"vllm": _vllm(problems), "transformers": _transformers(problems)}
    machine, kernels = _kernels()
    return Examination(versions, machine, engines, kernels, problems)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _vllm(problems: list[str]) -> str:
    """Say which distribution provides vLLM, and whether the plugin is there and registers."""
    provided = importlib.metadata.packages_distributions().get("vllm", [])
    real = [name for name in dict.fromkeys(provided) if name != "vllm" or len(set(provided)) == 1]
    if not real:
        return "not installed"
    engine = f"{real[0]} {_version(real[0])}"
    if real[0] != "vllm" and _version("vllm") == "not installed":
        problems.append(
            f"vLLM comes from {real[0]}, and the `vllm` command asks for a distribution named "
            "vllm: run python -m vllm.entrypoints.openai.api_server instead, or install the "
            "metadata of integration/vllm_metadata"
        )
    group = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(entry.name == "qplug" for entry in group):
        problems.append("the vLLM plugin is not registered: install qplug with pip")
        return f"{engine}, plugin not registered"
    return f"{engine}, plugin registered (--quantization qplug-awq, qplug-gptq)"


def _transformers(problems: list[str]) -> str:
    """Say whether quantized checkpoints load through qplug."""
    from . import _autoload

    if _version("transformers") == "not installed":
        return "not installed"
    import transformers.quantizers.auto  # the hook acts on this import

    assert transformers.quantizers.auto is not None
    if _autoload.error is not None:
        problems.append(f"registration with Transformers failed: {_autoload.error!r}")
    if _autoload.state != "registered":
        return _autoload.state
    from .transformers import METHODS, takes

    taken = [name for name in METHODS if takes(name)]
    stock = [name for name in METHODS if not takes(name)]
    text = f"registered; qplug loads {', '.join(taken) or 'nothing'}"
    return text + (f"; {', '.join(stock)} left to the stock backend" if stock else "")


def _kernels() -> tuple[dict[str, str], list[dict[str, str]]]:
    """Choose a kernel for typical linears on this machine."""
    import torch

    from qplug_converters.weight import AffineGrid, QuantizedWeight
    from qplug_kernels import KERNELS, Problem, choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = torch.zeros(64, 256, dtype=torch.uint8)
    rows = []
    machine = {"device": device}
    for bits, dtype in (
        (4, torch.bfloat16), (4, torch.float16), (4, torch.float32), (3, torch.bfloat16),
        (8, torch.bfloat16),
    ):  # fmt: skip
        zeros = torch.full((64, 2), 1 << (bits - 1), dtype=torch.int16)
        grid = AffineGrid(torch.ones(64, 2, dtype=torch.float16), zeros, 128)
        problem = Problem.here(QuantizedWeight(codes, bits, grid), dtype, device)
        choice = choose(problem, KERNELS)
        rows.append(
            {
                "weights": f"{bits}-bit g128",
                "activations": problem.dtype_name,
                "kernel": choice.kernel.name,
                "why": choice.reasons or choice.kernel.title,
            }
        )
        machine |= {"arch": problem.arch, "features": ", ".join(sorted(problem.features))}
    return machine, rows
