"""Pack a CUDA build of vLLM for a GPU machine without a network, in one archive below 60 MB.

    python integration/vllm/bring_vllm.py [--arch 90] [--python 3.12] [--into build/gpu-vllm]

Writes `vllm.tar.xz` into a folder that git ignores; `gpu_smoke.sh` unpacks and uses it there.
vLLM 0.26.0 is the one for torch 2.11.0 and CUDA 13. Taken along are its Python files, its library
of operations with the code for other cards zeroed (`integration/gpu/bring_peers.py` says how), and
the Python packages that its server imports. Left out:

- what a machine with torch and Transformers has (`THERE`);
- what text models do without (`NEEDLESS`): pictures, sound, video, FlashAttention (the server runs
  with `--attention-backend TRITON_ATTN`), FlashInfer, TileLang, mixtures of experts.

No archive made by this has run on a card yet.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from integration.gpu.bring_peers import Peer, download, platforms, thinned  # noqa: E402

INTO = ROOT / "build" / "gpu-vllm"
VLLM = Peer("vllm", "0.26.0", ("vllm/", "vllm-"))
LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
MOST = 60 << 20

THERE = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "huggingface-hub",
    "setuptools", "ninja", "filelock", "packaging", "regex", "pyyaml", "tqdm", "requests", "jinja2",
    "markupsafe", "sympy", "networkx", "fsspec", "typing-extensions", "einops", "psutil", "pillow",
    "sentencepiece", "protobuf", "urllib3", "certifi", "idna", "charset-normalizer",
)  # fmt: skip
NEEDLESS = (
    "torchaudio", "torchvision", "torchcodec", "pynvvideocodec", "flashinfer-python", "numba",
    "tilelang", "nvtx", "quack-kernels", "tokenspeed-mla", "humming-kernels", "fastsafetensors",
    "opencv-python-headless", "grpcio", "opentelemetry-exporter-otlp-proto-grpc",
)  # fmt: skip
UNREAD = (
    "vllm/vllm-rs", "vllm/third_party/fmha_sm100/", "vllm/third_party/deep_gemm/",
    "vllm/third_party/tml_fa4/", "pycountry/locales/", "mistral_common/data/",
)  # fmt: skip
"""What of the packages that travel is large and never read by the server of a small text model."""

FOREIGN = re.compile(r"^nvidia-|^cuda-")
LOOSE = ("compressed-tensors", "xgrammar", "apache-tvm-ffi")
"""Packages that ask for torch: fetched as they are, so that pip does not look for torch's needs."""


def name_of(requirement: str) -> str:
    """Return the normalized name of a requirement."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def wanted(metadata: str) -> tuple[list[str], list[str]]:
    """Return vLLM's requirements that are to travel: those for pip to complete, and loose ones."""
    lines = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    plain = [line.partition(";")[0].strip() for line in lines if "extra ==" not in line]
    kept = [
        line
        for line in plain
        if name_of(line) not in (*THERE, *NEEDLESS) and not FOREIGN.match(name_of(line))
    ]
    return (
        [line for line in kept if name_of(line) not in LOOSE] + ["loguru"],
        [line for line in kept if name_of(line) in LOOSE],
    )


def closure(requirements: Sequence[str], python: str, folder: Path) -> list[str]:
    """Return, pinned, what pip would install for requirements, less what is there or needless.

    Raises
    ------
    subprocess.CalledProcessError
        If pip finds no way.
    """
    report = folder / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", str(report), "--target", str(folder / "none"), *platforms(python)]
    subprocess.run([*command, *requirements], check=True)
    found = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    return [
        f"{one['name']}=={one['version']}"
        for one in found
        if name_of(one["name"]) not in (*THERE, *NEEDLESS)
    ]


def fetch(requirements: Sequence[str], python: str, folder: Path) -> None:
    """Fetch wheels without their needs.

    Raises
    ------
    subprocess.CalledProcessError
        If there is none of one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, *platforms(python), *requirements], check=True)


def files(wheel: Path, arch: int) -> Iterator[tuple[str, bytes]]:
    """Return what travels of a wheel, by its place."""
    ours = wheel.name.startswith("vllm-")
    with zipfile.ZipFile(wheel) as opened:
        for name in opened.namelist():
            if name.endswith(("/", ".pyi", ".cu", ".cuh", ".h", ".hpp", ".a")) or "/tests/" in name:
                continue
            if ours and name.startswith("vllm/") and name.endswith(".so") and name != LIBRARY:
                continue
            if name.startswith(UNREAD):
                continue
            data = opened.read(name)
            if name == LIBRARY:
                data, left = thinned(data, arch)
                print(f"  {name}: {left / 1e6:.1f} MB of code for sm_{arch}")
            yield re.sub(r"^[^/]+\.data/(pure|plat)lib/", "", name), data


def pack(into: Path, arch: int, python: str) -> Path:
    """Write the archive.

    Raises
    ------
    SystemExit
        If something cannot be had, or the archive is too large.
    """
    into.mkdir(parents=True, exist_ok=True)
    archive = into / "vllm.tar.xz"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            vllm = download(VLLM, folder, python)
            with zipfile.ZipFile(vllm) as wheel:
                [info] = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
                complete, loose = wanted(wheel.read(info).decode())
            fetch([*closure(complete, python, folder), *loose], python, folder)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"pip could not: {' '.join(map(str, error.cmd))[:300]}") from error
        # At preset 6 it took more than a quarter of an hour on a busy machine.
        with tarfile.open(archive, "w:xz", preset=3) as packed:
            for wheel in sorted(folder.glob("*.whl")):
                print(wheel.name, flush=True)
                for name, data in files(wheel, arch):
                    member = tarfile.TarInfo(f"site/{name}")
                    member.size, member.mode = len(data), 0o755
                    packed.addfile(member, BytesIO(data))
    size = archive.stat().st_size
    print(f"{archive}: {size / 1e6:.1f} MB")
    if size > MOST:
        raise SystemExit(f"{archive} is above {MOST >> 20} MB")
    return archive


def main() -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="e.g. 80, 90")
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--into", type=Path, default=INTO)
    options = parser.parse_args()
    pack(options.into, options.arch, options.python)


if __name__ == "__main__":
    main()
