"""The table of engines against stock Transformers, without qplug: what it does not look at.

Its quantizers need packages that are not here; what it does before it asks for them is tried.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qplug.engines import TRANSFORMERS, Outcome, judge_at, of_checkpoint
from qplug_converters.checkpoint import open_checkpoint

pytestmark = pytest.mark.engine

GOLDEN = "gptq-4b-sym-g32"
LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
linear = model.model.layers[0].self_attn.q_proj
print(type(linear).__name__, round(float(linear.weight.std()), 2))
"""
RANDOM = "Linear 0.02"
"""An ordinary linear with what Transformers initializes it with."""


def side_file(config: dict[str, Any], folder: Path) -> None:
    block = config.pop("quantization_config")
    (folder / "quantize_config.json").write_text(json.dumps(block))


def upper_case(config: dict[str, Any], folder: Path) -> None:
    config["quantization_config"]["quant_method"] = "GPTQ"


def no_method(config: dict[str, Any], folder: Path) -> None:
    for key in ("quant_method", "method"):
        config["quantization_config"].pop(key)


def as_it_is(config: dict[str, Any], folder: Path) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (side_file, RANDOM),
        (upper_case, RANDOM),
        (no_method, "has no `quant_method` attribute"),
        (as_it_is, "requires optimum"),
    ],
)
def test_what_it_looks_at(
    change: Callable[[dict[str, Any], Path], None], told: str, golden: Path, tmp_path: Path
) -> None:
    shutil.copy(golden / GOLDEN / "model.safetensors", tmp_path)
    config = json.loads((golden / GOLDEN / "config.json").read_text())
    change(config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path],
        env={**os.environ, "QPLUG_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told in done.stdout + done.stderr

    checkpoint = open_checkpoint(tmp_path)
    answer = judge_at(TRANSFORMERS, of_checkpoint(checkpoint, checkpoint.scheme()[1]))
    assert answer is not None
    if told == RANDOM:
        assert (done.returncode, answer.outcome) == (0, Outcome.WRONG)
    else:
        assert done.returncode != 0
    if change is as_it_is:
        assert answer.command.endswith("# pip install optimum gptqmodel")
    elif change is no_method:
        assert answer.outcome is Outcome.REFUSED
