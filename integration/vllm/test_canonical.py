"""Stock vLLM stops at a canonical checkpoint instead of inventing weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.execute import execute
from qplug_converters.plan import make_plan
from qplug_converters.survey import survey

from .engines import environment

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "gptq-4b-sym-g32"
LOAD = """
import sys, vllm
vllm.LLM(sys.argv[1], enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
print("LOADED")
"""


@pytest.mark.engine
@pytest.mark.parametrize("plugins", ["", "qplug"], ids=["stock", "with qplug"])
def test_canonical_is_refused(plugins: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    checkpoint = open_checkpoint(GOLDEN)
    found, model = checkpoint.scheme()
    plan = make_plan(found, survey(checkpoint, found, model), formats.find("canonical"))
    execute(plan, checkpoint, tmp_path / "c")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "c"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, **environment(), "VLLM_PLUGINS": plugins},
    )
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    assert "Unknown quantization method: qplug" in done.stdout + done.stderr
