"""What the tests with other tools share.

A tool whose environment is absent skips its tests; `make peers` makes them all. With
QPLUG_REQUIRE_PEERS=1, as it sets it, an absent tool fails instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from .peers import Asked, absent

ROOT = Path(__file__).resolve().parents[2]
Read = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of checkpoints written by real tools; read-only."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def tool() -> Iterator[Callable[[str], Asked]]:
    """Return a function that gives a tool by name; each is started once."""
    with ExitStack() as started:
        running: dict[str, Asked] = {}

        def start(name: str) -> Asked:
            reason = absent(name)
            if reason and os.environ.get("QPLUG_REQUIRE_PEERS") == "1":
                pytest.fail(f"QPLUG_REQUIRE_PEERS=1: {reason}")
            if reason:
                pytest.skip(reason)
            if name not in running:
                running[name] = started.enter_context(Asked(name))
            return running[name]

        yield start


@pytest.fixture
def read(tool: Callable[[str], Asked], tmp_path: Path) -> Read:
    """Return `read(name, folder)`: the linears' weights [out, in] that a tool reads, by name."""

    def weights(name: str, folder: Path, function: str = "read") -> dict[str, Tensor]:
        out = tmp_path / f"by {name}.safetensors"
        tool(name)(function, folder, out)
        found = load_file(out)
        assert found, f"{name} found no quantized linear"
        return found

    return weights


@pytest.fixture
def qplug(tmp_path: Path) -> Callable[..., Path]:
    """Return `qplug(source, to, options...)`: the folder that `qplug convert` writes."""
    from qplug.cli import main

    def convert(source: Path, to: str, *options: str) -> Path:
        target = tmp_path / f"{source.name} to {to}"
        with pytest.raises(SystemExit) as ended:
            main(["convert", str(source), str(target), "--to", to, *options])
        assert ended.value.code == 0
        return target

    return convert


@pytest.fixture
def dense(qplug: Callable[..., Path]) -> Callable[[Path], dict[str, Tensor]]:
    """Return `dense(folder)`: all weights as qplug reads them, in float32."""

    def weights(folder: Path) -> dict[str, Tensor]:
        return load_file(qplug(folder, "dense", "--dtype", "float32") / "model.safetensors")

    return weights
