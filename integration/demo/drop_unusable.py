"""Uninstall torchvision, torchaudio and torchcodec where they cannot be imported.

They come along with vLLM. Built for a CUDA torch they die beside a CPU torch, and Transformers then
reports that it cannot import its own model classes. Text models run without the three.

Usage: VENV/bin/python drop_unusable.py
"""

import subprocess
import sys
from importlib import metadata

NAMES = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    for name in NAMES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        attempt = [sys.executable, "-c", f"import {name}"]
        if subprocess.run(attempt, capture_output=True, check=False).returncode == 0:
            continue
        command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", name]
        subprocess.run(command, check=True)
        print(f"removed {name} {version}: it cannot be imported beside this torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
