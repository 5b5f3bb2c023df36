"""The pinned Triton that machine code is compiled with: an environment in build/triton36.

    python integration/sass/environment.py     make it unless it is there

Made as `integration/peers/peers.py` makes those of other tools: the pinned packages in front of
those of the environment that makes it, so that torch is there once. What the compiler writes
depends on its version; limits are stored for this one (the one of torch 2.11, on GPU machines
today), and with a looser band for the installed one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "triton36"
PYTHON = FOLDER / "bin" / "python"
REQUIREMENTS = ("triton==3.6.0", "numpy<2.4")  # its interpreter breaks with NumPy 2.4
SHARED = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
RECIPE = json.dumps([SHARED, sys.version, REQUIREMENTS])
STAMP = FOLDER / "made.json"


def absent() -> str | None:
    """Return why the environment cannot be used, or None."""
    if not STAMP.exists():
        return "triton 3.6 is not installed: run `make sass`"
    if STAMP.read_text() != RECIPE:
        return "build/triton36 is made otherwise than integration/sass says: run `make sass`"
    return None


def make() -> None:
    """Make the environment unless it is there."""
    if absent() is None:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", FOLDER], check=True)
    ask = [PYTHON, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    own = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    Path(own, "shared.pth").write_text("\n".join(SHARED) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", PYTHON, "install", "--progress-bar", "off")
    subprocess.run([*pip, *REQUIREMENTS], check=True, env=os.environ | {"PYTHONPATH": ""})
    STAMP.write_text(RECIPE)


if __name__ == "__main__":
    make()
