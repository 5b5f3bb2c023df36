"""What plans and headers need is importable, and usable, without torch."""

from __future__ import annotations

import subprocess
import sys

from builders import GOLDEN

MODULES = (
    "errors",
    "layout",
    "scheme",
    "format",
    "formats",
    "formats.awq",
    "formats.bnb",
    "formats.bnb_4bit",
    "formats.bnb_int8",
    "formats.bnb_state",
    "formats.canonical",
    "formats.dense",
    "formats.gptq",
    "formats.gptq_v2",
    "block",
    "bitstream",
    "zeros",
    "source",
    "shards",
    "checkpoint",
    "survey",
    "names",
    "patterns",
    "config_groups",
    "formats.compressed_tensors",
    "stacked",
    "plan",
    "writer",
    "version",
)
PROGRAM = """
import importlib, sys
found = []
for name in sys.argv[2:]:
    importlib.import_module(f"qplug_converters.{name}")
    found += [f"{name} imports {m}" for m in ("torch", "transformers") if m in sys.modules]
assert not found, found

from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.plan import make_plan
from qplug_converters.survey import survey

checkpoint = open_checkpoint(sys.argv[1])
found, model = checkpoint.scheme()
model = survey(checkpoint, found, model)
for target in formats.FORMATS:
    assert make_plan(found, model, target).steps
    if target.capacity is not None:
        target.write(make_plan(found, model, target).goal)
assert "torch" not in sys.modules
print(len(model.linears))
"""


def test_no_torch() -> None:
    """One interpreter for all: a module that loads torch is named by what it was first seen at."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(GOLDEN / "gptq-4b-sym-g32"), *MODULES],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7\n"
