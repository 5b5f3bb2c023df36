"""Compile kernels for cards that are not there, and disassemble them.

    PYTHONPATH=integration:converters:kernels PYTHON -m sass.aot MODULE TARGET...

MODULE has `builds(arch)`; PYTHON is that of the environment whose Triton compiles. One line of JSON
a kernel and target goes to stdout: where the listing lies, registers, shared memory, or why it did
not compile, and what the build says of itself. Compiled once: listings lie in build/sass by
Triton's version and target, under a name that ends with a hash of the kernel's source (Triton's
own, which covers the functions it calls), arguments and options. Triton carries assembler and
disassembler; no driver is touched.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import linecache
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from .launches import Build, target_of

ROOT = Path(__file__).resolve().parents[2]
LISTINGS = ROOT / "build" / "sass"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MINOR = ".".join(triton.__version__.split(".")[:2])


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr}")
    return done.stdout


def _with_sources(listing: str) -> str:
    """Put the text of the source line after each place in the source."""
    files = {
        number: Path(folder or "", name)
        for number, folder, name in re.findall(r'\.file\s+(\d+)(?: "([^"]*)")? "([^"]*)"', listing)
    }

    def text(path: Path, line: int) -> str:
        lines = linecache.getlines(str(path))
        source = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        return f"//## {path.name}:{line}: {source}"

    listing = re.sub(
        r'^\s*//## File "([^"]*)", line (\d+).*$',
        lambda at: text(Path(at[1]), int(at[2])), listing, flags=re.MULTILINE,
    )  # fmt: skip
    return re.sub(
        r"^\s*\.loc\s+(\d+) (\d+) .*$",
        lambda at: text(files[at[1]], int(at[2])), listing, flags=re.MULTILINE,
    )  # fmt: skip


def _disassemble(compiled: Any) -> tuple[str, int]:
    """Return the listing and the registers of a thread."""
    if "amdgcn" in compiled.asm:
        listing: str = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", listing)  # of accumulation included
        assert registers is not None
        return listing, int(registers[1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(TOOLS / "cuobjdump", "-res-usage", cubin.name)
        registers = re.search(r"REG:(\d+)", usage)
        assert registers is not None
        return _run(TOOLS / "nvdisasm", "-c", "-g", cubin.name), int(registers[1])


def key_of(build: Build, arch: str) -> str:
    """Return a hash of all that decides the machine code."""
    parts = (
        build.kernel.cache_key, build.types, build.constants, build.hints, build.options, arch,
        triton.__version__, Path(__file__).read_bytes(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_one(build: Build, arch: str) -> dict[str, object]:
    """Compile and disassemble one kernel unless that is done."""
    folder = LISTINGS / MINOR / arch
    stem = f"{build.name.replace(' ', '-')}-{key_of(build, arch)}"
    listing, facts = folder / f"{stem}.sass", folder / f"{stem}.json"
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        compiled = triton.compile(build.source, target=target_of(arch), options=build.options)
        text, registers = _disassemble(compiled)
        listing.write_text(_with_sources(text))
        facts.write_text(json.dumps({"registers": registers, "shared": compiled.metadata.shared}))
    return {"listing": str(listing), **json.loads(facts.read_text())}


def _job(at: tuple[str, int]) -> dict[str, object]:
    arch, index = at
    build = BUILDS[arch][index]
    row = {"name": build.name, "arch": arch, "triton": triton.__version__}
    row |= {"warps": build.options["num_warps"], **build.facts}
    try:
        return row | compile_one(build, arch)
    except Exception as error:
        # A compiler that raises, whatever it raises, is a finding about this kernel.
        return row | {"error": f"{type(error).__name__}: {error}"}


BUILDS: dict[str, Sequence[Build]] = {}
"""By target; filled before the workers are forked, since kernels cannot be sent to them."""


def main() -> None:
    """Compile in as many processes as there are cores."""
    module = importlib.import_module(sys.argv[1])
    BUILDS.update({arch: module.builds(arch) for arch in sys.argv[2:]})
    jobs = [(arch, index) for arch, builds in BUILDS.items() for index in range(len(builds))]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
            for row in pool.imap_unordered(_job, jobs):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
