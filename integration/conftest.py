"""What the tests with real engines share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
QPLUG = Path(sys.executable).with_name("qplug")


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """Return `with engine(folder, quantization=…) as found`: vLLM in this process."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from .vllm.engines import start

    return start


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of SmolLM2-135M by format, written by the `qplug` command.

    `source` is the unquantized model (`QPLUG_TEST_MODEL`, or what `make_dense.py` writes); `gptq`
    is made of it, and `awq` and `dense` (float32, exact) of `gptq`.
    """
    source = Path(os.environ.get("QPLUG_TEST_MODEL", ROOT / "build/models/smollm2-dense"))
    if not (source / "config.json").exists():
        pytest.skip(f"{source} is not there: run integration/demo/make_dense.py")
    if not QPLUG.exists():
        pytest.skip("the `qplug` command is not installed beside this Python")
    work = tmp_path_factory.mktemp("smollm2")
    made = {name: work / name for name in ("gptq", "awq", "dense")}
    commands = [
        ["quantize", source, made["gptq"], "--bits", "4", "--group-size", "64", "--asym"],
        ["convert", made["gptq"], made["awq"], "--to", "awq-layout", "--verify"],
        ["convert", made["gptq"], made["dense"], "--to", "dense", "--dtype", "float32"],
    ]
    commands[0] += ["--to", "gptq"]
    for command in commands:
        done = subprocess.run([QPLUG, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return {"source": source, **made}
