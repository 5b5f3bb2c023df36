"""Peak anonymous memory of a conversion, whatever the size of a linear: one of 2^30 codes.

Anonymous memory (`RssAnon`) is what a process asks for itself; pages of the memory-mapped source
and output are the page cache's and go when somebody needs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

GIB = 1 << 30
SIDE = 1 << 15
"""in_features and out_features: 2^30 codes, 512 MiB at 4 bits."""


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


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ v1 checkpoint of one linear: every word 0x13579BDF, zeros of 7, scales of 1/8."""
    folder = tmp_path_factory.mktemp("huge") / "gptq"
    folder.mkdir()
    groups = SIDE // 128
    sizes = {"scales": ("F16", [groups, SIDE], b"\x00\x30"),
             "g_idx": ("I32", [SIDE], None),
             "qzeros": ("I32", [groups, SIDE // 8], b"\x66\x66\x66\x66"),
             "qweight": ("I32", [SIDE // 8, SIDE], b"\xdf\x9b\x57\x13")}  # fmt: skip
    header, at = {}, 0
    for name, (dtype, shape, _) in sizes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        size = count * (2 if dtype == "F16" else 4)
        header[f"model.layers.0.mlp.up_proj.{name}"] = {
            "dtype": dtype, "shape": shape, "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, (_, _, word) in zip(header.values(), sizes.values(), strict=True):
            begin, end = entry["data_offsets"]
            if word is None:
                file.write(b"".join((k // 128).to_bytes(4, "little") for k in range(SIDE)))
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


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [
        ["--to", "awq"],
        pytest.param(["--to", "canonical"], marks=pytest.mark.slow),
        pytest.param(["--to", "gptq", "--bits", "8", "--sym"], marks=pytest.mark.slow),
        pytest.param(["--to", "dense", "--dtype", "bfloat16"], marks=pytest.mark.slow),
    ],
    ids=lambda o: o[1],
)
def test_a_row_block_bounds_memory(huge: Path, tmp_path: Path, options: list[str]) -> None:
    base = peak_anonymous([sys.executable, "-c", "import torch"])
    qplug = str(Path(sys.executable).with_name("qplug"))
    peak = peak_anonymous([qplug, "convert", str(huge), str(tmp_path / "out"), *options])
    print(f"{' '.join(options)}: {(peak - base) / GIB:.2f} GiB above import torch")
    assert peak - base <= GIB


@pytest.mark.engine
@pytest.mark.slow
def test_verifying_is_bounded_too(huge: Path, tmp_path: Path) -> None:
    base = peak_anonymous([sys.executable, "-c", "import torch"])
    qplug = str(Path(sys.executable).with_name("qplug"))
    subprocess.run([qplug, "convert", huge, tmp_path / "awq", "--to", "awq"], check=True)
    peak = peak_anonymous([qplug, "verify", str(huge), str(tmp_path / "awq")])
    print(f"verify: {(peak - base) / GIB:.2f} GiB above import torch")
    assert peak - base <= GIB
