"""What qplug finds on this machine: versions, engines, registrations, kernels that would run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qplug_converters.weight import QuantizedWeight

PACKAGES = ("torch", "transformers", "safetensors", "triton", "huggingface-hub", "accelerate")
STOCK_BACKENDS = ("gptqmodel", "optimum", "autoawq", "bitsandbytes", "compressed-tensors")
PATIENCE = 180
"""Seconds that importing vLLM may take."""

_REGISTER = """
import json
import qplug.vllm as plugin

plugin.register()
failure = plugin.failure
text = None if failure is None else f"{type(failure).__name__}: {failure}"
print(json.dumps({"failure": text}))
"""


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


def examine(say: Callable[[str], None] | None = None) -> Examination:
    """Look at the environment this Python runs in; imports torch, starts no engine.

    `say` is told what takes seconds before it starts.
    """
    problems: list[str] = []
    versions = {"qplug": _version("qplug"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    others = {name: _version(name) for name in STOCK_BACKENDS}
    versions |= {name: found for name, found in others.items() if found != "not installed"}
    engines = {"vllm": _vllm(problems, say), "transformers": _transformers(problems)}
    machine, kernels = _kernels(problems)
    return Examination(versions, machine, engines, kernels, problems)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _vllm(problems: list[str], say: Callable[[str], None] | None) -> str:
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
    if say is not None:
        say("importing vLLM to see whether the plugin registers (seconds) …")
    if failure := registering():
        problems.append(f"registration with vLLM failed: {failure}")
        return f"{engine}, plugin failed"
    from .vllm.served import METHODS

    names = ", ".join(dict.fromkeys(METHODS.values()))
    return f"{engine}, plugin registered (--quantization {names})"


def registering() -> str:
    """Register the plugin with vLLM in a process of its own; return why it failed, or nothing.

    Importing vLLM takes threads, memory and signal handlers that this process does without.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _REGISTER],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing vLLM takes longer than {PATIENCE} s"
    try:
        found = json.loads(done.stdout.splitlines()[-1])["failure"]
    except (IndexError, KeyError, TypeError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return f"the process ended with code {done.returncode}: {last[0]}"
    return "" if found is None else str(found)


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


def _typical() -> dict[str, QuantizedWeight]:
    """Return a linear of every kind that checkpoints hold, 64 outputs by 256 inputs."""
    import torch

    from qplug_converters.formats.bnb_4bit import TABLES
    from qplug_converters.weight import AffineGrid, CodebookGrid, QuantizedWeight, RowGrid

    codes = torch.zeros(64, 256, dtype=torch.uint8)
    found = {}
    for bits in (4, 2, 3, 8):
        zeros = torch.full((64, 2), 1 << (bits - 1), dtype=torch.int16)
        grid = AffineGrid(torch.ones(64, 2, dtype=torch.float16), zeros, 128)
        found[f"{bits}-bit g128"] = QuantizedWeight(codes, bits, grid)
    for name, table in TABLES.items():
        values = torch.frombuffer(bytearray(table), dtype=torch.float32)
        book = CodebookGrid(values, torch.ones(256), 64)
        found[f"{name} b64"] = QuantizedWeight(codes, 4, book)
    return found | {"int8 rows": QuantizedWeight(codes, 8, RowGrid(torch.ones(64)))}


def _kernels(problems: list[str]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Choose a kernel for typical linears on this machine, `QPLUG_KERNEL` where it is set."""
    import torch

    from qplug_converters.errors import QplugError
    from qplug_kernels import KERNELS, Problem, choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    force = os.environ.get("QPLUG_KERNEL") or None
    machine = {"device": device}
    if force is not None:
        machine["QPLUG_KERNEL"] = force
    rows = []
    for label, weight in _typical().items():
        for dtype in (torch.bfloat16, torch.float16):
            problem = Problem.here(weight, dtype, device)
            try:
                choice = choose(problem, KERNELS, force)
            except QplugError as error:
                name, why = "none", str(error)
                if why not in problems:
                    problems.append(why)
            else:
                name = choice.kernel.name
                why = "QPLUG_KERNEL asks for it" if force else choice.reasons or choice.kernel.title
            row = {"weights": label, "activations": problem.dtype_name}
            rows.append({**row, "kernel": name, "why": why})
            machine |= {"arch": problem.arch, "features": ", ".join(sorted(problem.features))}
    return machine, rows
