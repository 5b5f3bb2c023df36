"""Fat binaries made by hand: what a card needs of them stays, everything else is zeros."""

import io
import struct
import sys
import tarfile
import zipfile

import pytest

from . import bring_peers, carried
from .bring_peers import CUBIN, PTX, Peer, fat_binaries, needed, thinned


def entry(kind, arch, payload):
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)) + bytes(12)
    return header + struct.pack("<I", arch) + bytes(64 - len(header) - 4) + payload


def fat(*entries):
    body = b"".join(entry(*one) for one in entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def kept(library):
    return [
        (one.kind, one.arch)
        for entries in fat_binaries(library)
        for one in entries
        if any(library[one.start : one.end])
    ]


NATIVE = fat(
    (PTX, 80, b"p" * 40), (CUBIN, 80, b"8" * 64), (CUBIN, 90, b"9" * 72), (PTX, 90, b"q" * 8)
)
TEXT = fat(
    (CUBIN, 75, b"7" * 16), (PTX, 70, b"o" * 24), (PTX, 80, b"p" * 40), (CUBIN, 80, b"8" * 64)
)
FOREIGN = fat((CUBIN, 100, b"a" * 32), (PTX, 120, b"b" * 32))
LIBRARY = (
    b"ELF" * 5 + NATIVE + b"xx" + TEXT + FOREIGN + struct.pack("<I", 0xBA55ED50) + b"not one" * 4
)


def test_machine_code_for_the_card_is_kept_alone():
    assert kept(thinned(NATIVE, 90)[0]) == [(CUBIN, 90)]


def test_without_it_the_newest_text_that_the_driver_can_compile_is_kept():
    assert kept(thinned(TEXT, 90)[0]) == [(PTX, 80)]
    assert kept(thinned(TEXT, 75)[0]) == [(CUBIN, 75)]


def test_nothing_is_kept_for_newer_cards_alone():
    assert kept(thinned(FOREIGN, 90)[0]) == []
    [entries] = fat_binaries(FOREIGN)
    assert needed(entries, 90) == []


def test_headers_sizes_and_everything_outside_stay():
    thin, left = thinned(LIBRARY, 90)
    assert left == 72 + 40
    assert len(thin) == len(LIBRARY)
    for before, after in zip(fat_binaries(LIBRARY), fat_binaries(thin), strict=True):
        assert before == after
    assert thin[:15] == LIBRARY[:15]
    assert thin.endswith(b"not one" * 4)


def test_only_what_is_asked_for_is_packed_and_found_again(tmp_path, monkeypatch):
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("gpu_peer_of_a_test/__init__.py", "VALUE = 7")
        made.writestr("gpu_peer_of_a_test/lib_cuda118.so", "old")
        made.writestr("elsewhere/__init__.py", "")
    library = tmp_path / "vllm.whl"
    with zipfile.ZipFile(library, "w") as made:
        made.writestr("vllm/_C.abi3.so", LIBRARY)
        made.writestr("vllm/__init__.py", "")
    peers = (
        Peer("one", "1", ("gpu_peer_of_a_test/",), ("_cuda11",)),
        Peer("vllm", "1", ("vllm/_C.abi3.so",)),
    )
    monkeypatch.setattr(bring_peers, "PEERS", peers)
    monkeypatch.setattr(
        bring_peers, "download", lambda peer, *_: wheel if peer.name == "one" else library
    )
    folder = tmp_path / "into"
    bring_peers.pack(folder, 90, "3.12")
    with tarfile.open(folder / "peers.tar.xz") as packed:
        assert sorted(packed.getnames()) == [
            "lib/vllm_C.abi3.so",
            "site/gpu_peer_of_a_test/__init__.py",
        ]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "first")
    monkeypatch.delenv("QPLUG_VLLM_LIBRARY", raising=False)
    assert "peers of" in carried.use(folder)
    assert __import__("gpu_peer_of_a_test").VALUE == 7
    assert carried.os.environ["PYTHONPATH"] == f"first:{folder / 'site'}"
    assert carried.os.environ["QPLUG_VLLM_LIBRARY"] == str(folder / "lib/vllm_C.abi3.so")
    assert kept((folder / "lib/vllm_C.abi3.so").read_bytes()) == [(CUBIN, 90), (PTX, 80)]
    assert not (folder / "site/vllm").exists()


def test_without_an_archive_it_says_so(tmp_path):
    assert "bring_peers.py" in carried.use(tmp_path)


def test_a_source_distribution_loses_its_outer_folder(tmp_path):
    path = tmp_path / "gemlite-1.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        member = tarfile.TarInfo("gemlite-1/gemlite/__init__.py")
        member.size = 3
        made.addfile(member, io.BytesIO(b"abc"))
    assert list(bring_peers.members(path)) == [("gemlite/__init__.py", b"abc")]


def test_no_peer_at_all_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise bring_peers.subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(bring_peers, "download", refuse)
    with pytest.raises(SystemExit, match="no peer"):
        bring_peers.pack(tmp_path, 90, "3.12")
