"""Peak anonymous memory of a conversion, whatever the size of a linear and the number of cores.

One linear of 2^30 codes, twenty-four of 2^25 with as many threads as a machine of 16 cores has, and
a checkpoint of more than 8 GB with the linears of a 70B model.

Anonymous memory (`RssAnon`) is what a process asks for itself; pages of the memory-mapped source
and output are the page cache's and go when somebody needs them.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

QPLUG = str(Path(sys.executable).with_name("qplug"))
GIB = 1 << 30
SIDE = 1 << 15
"""in_features and out_features: 2^30 codes, 512 MiB at 4 bits."""
MANY = 24
THREADS = 16


def peak_anonymous(command: list[str]) -> int:
    """Run a command and return the highest RssAnon seen, in bytes, sampled every 5 ms."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        found = [line for line in lines if line.startswith("RssAnon")]
        peak = max(peak, int(found[0].split()[1]) << 10 if found else 0)
        time.sleep(0.005)
    assert process.wait() == 0
    return peak


def write(folder: Path, linears: int, inp: int, out: int) -> Path:
    """Write a GPTQ v1 checkpoint: every word 0x13579BDF, zeros of 7, scales of 1/8."""
    folder.mkdir()
    groups = inp // 128
    parts = {"scales": ("F16", [groups, out], b"\x00\x30"),
             "g_idx": ("I32", [inp], None),
             "qzeros": ("I32", [groups, out // 8], b"\x66\x66\x66\x66"),
             "qweight": ("I32", [inp // 8, out], b"\xdf\x9b\x57\x13")}  # fmt: skip
    header, words, at = {}, [], 0
    for layer in range(linears):
        for name, (dtype, shape, word) in parts.items():
            size = math.prod(shape) * (2 if dtype == "F16" else 4)
            header[f"model.layers.{layer}.mlp.up_proj.{name}"] = {
                "dtype": dtype, "shape": shape, "data_offsets": [at, at + size],
            }  # fmt: skip
            words.append(word)
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, word in zip(header.values(), words, strict=True):
            begin, end = entry["data_offsets"]
            if word is None:
                file.write(b"".join((k // 128).to_bytes(4, "little") for k in range(inp)))
                continue
            left = end - begin
            while left:
                step = min(left, 1 << 24)
                file.write(word * (step // len(word)))
                left -= step
    block = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": False}
    config = {"model_type": "llama", "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of one linear."""
    return write(tmp_path_factory.mktemp("huge") / "gptq", 1, SIDE, SIDE)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of several linears, of two blocks of rows each."""
    return write(tmp_path_factory.mktemp("many") / "gptq", MANY, 1 << 12, 1 << 13)


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [
        ["--to", "awq"],
        ["--to", "canonical"],
        pytest.param(["--to", "gptq", "--bits", "8", "--sym"], marks=pytest.mark.slow),
        pytest.param(["--to", "dense", "--dtype", "bfloat16"], marks=pytest.mark.slow),
    ],
    ids=lambda o: o[1],
)
def test_a_row_block_bounds_memory(
    huge: Path, tmp_path: Path, options: list[str], report: Callable[[str], None]
) -> None:
    base = peak_anonymous([sys.executable, "-c", "import torch"])
    peak = peak_anonymous([QPLUG, "convert", str(huge), str(tmp_path / "out"), *options])
    said = f"convert {' '.join(options)}, 2^30 codes"
    report(f"{said}: {(peak - base) / GIB:.2f} GiB above import torch")
    assert peak - base <= GIB


COMMAND = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from qplug.cli import main
main(sys.argv[2:])
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [["--to", "gptq", "--bits", "8", "--sym"], ["--to", "dense", "--dtype", "bfloat16"]],
    ids=lambda o: o[1],
)
def test_many_cores(
    many: Path, tmp_path: Path, options: list[str], report: Callable[[str], None]
) -> None:
    base = peak_anonymous([sys.executable, "-c", "import torch"])
    command = [sys.executable, "-c", COMMAND, str(THREADS), "convert", str(many)]
    peak = peak_anonymous([*command, str(tmp_path / "out"), *options])
    said = f"convert {' '.join(options)}, {MANY} linears, {THREADS} threads"
    report(f"{said}: {(peak - base) / GIB:.2f} GiB above import torch")
    assert peak - base <= GIB


@pytest.mark.engine
@pytest.mark.slow
def test_eight_gigabytes(tmp_path: Path, report: Callable[[str], None]) -> None:
    source = write(tmp_path / "gptq", 72, 1 << 13, 28672)
    size = (source / "model.safetensors").stat().st_size
    assert size > 8 << 30
    base = peak_anonymous([sys.executable, "-c", "import torch"])
    start = time.perf_counter()
    peak = peak_anonymous([QPLUG, "convert", str(source), str(tmp_path / "awq"), "--to", "awq"])
    seconds = time.perf_counter() - start
    report(
        f"convert --to awq, {size / 1e9:.1f} GB: {(peak - base) / GIB:.2f} GiB above import torch, "
        f"{seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s"
    )
    assert peak - base <= GIB
    checked = subprocess.run(
        [QPLUG, "verify", tmp_path / "awq", "--json"], capture_output=True, check=False
    )
    assert json.loads(checked.stdout)["problems"] == []


@pytest.mark.engine
@pytest.mark.slow
def test_verifying_is_bounded_too(
    huge: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    base = peak_anonymous([sys.executable, "-c", "import torch"])
    subprocess.run([QPLUG, "convert", huge, tmp_path / "awq", "--to", "awq"], check=True)
    peak = peak_anonymous([QPLUG, "verify", str(huge), str(tmp_path / "awq")])
    report(f"verify, 2^30 codes: {(peak - base) / GIB:.2f} GiB above import torch")
    assert peak - base <= GIB
