"""Pack other libraries for a GPU machine that has no network: one archive below 50 MB.

    python integration/gpu/bring_peers.py [--arch 90] [--python 3.12] [--into build/gpu-peers]

Writes `peers.tar.xz` into a folder that git ignores; `bench.py` unpacks it there and uses it.
Carry the folder to the machine with the checkout. Nothing of it becomes part of the repository.

    einops               what qplug itself needs besides torch, Triton and NumPy
    gemlite, conch       Triton: source alone
    humming              CUDA, compiled on the machine by nvrtc, with CUDA's headers there
    bitsandbytes         the library for the machine's CUDA alone
    Marlin, Machete      `_C.abi3.so` of vLLM 0.20.0, which needs torch 2.11.0 and CUDA 13

That library has code for seven architectures. A fat binary (magic 0xBA55ED50) is a list of
entries, machine code (kind 2) or PTX (kind 1) for an architecture each. The driver takes the
machine code for its own, else compiles the newest PTX that is not newer. Payloads of all others
are overwritten with zeros, sizes unchanged, so that they compress to nothing. PTX must not be
dropped altogether: Marlin for float16 and its repacking have machine code for sm_75 and sm_80, and
PTX for everything else.
"""

from __future__ import annotations

import argparse
import io
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTO = ROOT / "build" / "gpu-peers"
ARCHIVE = "peers.tar.xz"
SITE, LIBRARY = "site", "lib/vllm_C.abi3.so"
"""In the archive: what is imported, and vLLM's library, which must not look like a `vllm`."""

MOST = 50 << 20
"""Bytes of the archive."""

MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, CUBIN = 1, 2


@dataclass(frozen=True, slots=True)
class Peer:
    """A distribution to fetch and what of it to keep.

    Attributes
    ----------
    name, version
        As the package index has it.
    keep
        Beginnings of the paths in the wheel that are kept.
    drop
        Parts of names that are not, for all that.
    source
        Whether there is a source distribution alone.
    """

    name: str
    version: str
    keep: tuple[str, ...]
    drop: tuple[str, ...] = ()
    source: bool = False


PEERS = (
    Peer("einops", "0.8.2", ("einops/",)),
    Peer("gemlite", "0.6.0.post2", ("gemlite/",), source=True),
    Peer("conch-triton-kernels", "1.3", ("conch/", "conch_triton_kernels-")),
    Peer("humming-kernels", "0.1.19", ("humming/", "humming_kernels-")),
    Peer(
        "bitsandbytes", "0.50.2", ("bitsandbytes/", "bitsandbytes-"),
        ("_cuda11", "_cuda12", "_rocm", "_xpu"),
    ),
    Peer("vllm", "0.20.0", ("vllm/_C.abi3.so",)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a fat binary: its kind, its architecture, and where its payload lies."""

    kind: int
    arch: int
    start: int
    end: int


def fat_binaries(data: bytes | bytearray) -> Iterator[list[Entry]]:
    """Return the entries of each fat binary in a library."""
    at = data.find(MAGIC)
    while at >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        end = at + header + size
        if version != 1 or header != 16 or end > len(data):
            at = data.find(MAGIC, at + 4)
            continue
        entries, place = [], at + header
        while place < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, place)
            [arch] = struct.unpack_from("<I", data, place + 28)
            start = place + entry_header
            place = start + payload
            entries.append(Entry(kind, arch, start, place))
        yield entries
        at = data.find(MAGIC, end)


def needed(entries: list[Entry], arch: int) -> list[Entry]:
    """Return what the driver of an architecture takes of a fat binary: code, or the newest PTX."""
    code = [one for one in entries if one.kind == CUBIN and one.arch == arch]
    if code:
        return code
    texts = [one for one in entries if one.kind == PTX and one.arch <= arch]
    newest = max((one.arch for one in texts), default=None)
    return [one for one in texts if one.arch == newest]


def thinned(library: bytes, arch: int) -> tuple[bytes, int]:
    """Return a library with the code for other architectures overwritten, and what is left."""
    data, left = bytearray(library), 0
    for entries in fat_binaries(library):
        kept = needed(entries, arch)
        for one in entries:
            if one in kept:
                left += one.end - one.start
            else:
                data[one.start : one.end] = bytes(one.end - one.start)
    return bytes(data), left


def platforms(python: str) -> list[str]:
    """Return pip's options for wheels of another Python on x86-64 Linux.

    pip matches the names of platforms exactly, so all that are in use are named.
    """
    options = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    numbers = (5, 12, 14, 17, 18, 24, 25, 26, 27, 28, 31, 34, 35)
    names = [f"manylinux_2_{number}" for number in numbers]
    names += ["manylinux1", "manylinux2010", "manylinux2014"]
    for name in names:
        options += ["--platform", f"{name}_x86_64"]
    return [*options, "--platform", "any"]


def download(peer: Peer, folder: Path, python: str) -> Path:
    """Fetch one distribution through pip.

    Raises
    ------
    subprocess.CalledProcessError
        If pip could not.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    if peer.source:
        # pip asks a source distribution for its metadata, with the setuptools that is here.
        command += ["--no-build-isolation", "--no-binary", ":all:"]
    else:
        command += platforms(python)
    before = set(folder.iterdir())
    subprocess.run([*command, f"{peer.name}=={peer.version}"], check=True)
    [found] = set(folder.iterdir()) - before
    return found


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Return names and bytes of the files in a wheel or a source distribution."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/"):
                    yield name, wheel.read(name)
    else:
        with tarfile.open(path) as source:
            for member in source:
                if member.isfile() and (file := source.extractfile(member)):
                    yield member.name.partition("/")[2], file.read()


def chosen(peer: Peer, path: Path, arch: int) -> Iterator[tuple[str, bytes]]:
    """Return what is kept of a distribution, by its place in the archive."""
    for name, data in members(path):
        if name.startswith(peer.keep) and not any(part in name for part in peer.drop):
            if peer.name != "vllm":
                yield f"{SITE}/{name}", data
                continue
            data, left = thinned(data, arch)
            print(f"  {name}: {left / 1e6:.1f} MB of code for sm_{arch}")
            yield LIBRARY, data


def pack(into: Path, arch: int, python: str) -> Path:
    """Write the archive; a peer that cannot be had is left out and named.

    Raises
    ------
    SystemExit
        If there is none, or the archive is too large.
    """
    into.mkdir(parents=True, exist_ok=True)
    archive, missing = into / ARCHIVE, []
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "w:xz") as packed:
        for peer in PEERS:
            print(f"{peer.name} {peer.version}", flush=True)
            try:
                path = download(peer, Path(folder), python)
            except subprocess.CalledProcessError:
                missing.append(peer.name)
                continue
            for name, data in chosen(peer, path, arch):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o755
                packed.addfile(member, io.BytesIO(data))
    size = archive.stat().st_size
    print(f"{archive}: {size / 1e6:.1f} MB")
    if missing:
        print(f"could not be downloaded: {', '.join(missing)}")
    if len(missing) == len(PEERS) or size > MOST:
        raise SystemExit(f"{archive} is of no use: no peer, or above {MOST >> 20} MB")
    return archive


def main() -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="e.g. 80, 90")
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--into", type=Path, default=INTO)
    options = parser.parse_args()
    pack(options.into, options.arch, options.python)


if __name__ == "__main__":
    main()
