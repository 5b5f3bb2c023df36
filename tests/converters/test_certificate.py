"""Certificates: one hash a linear in whatever layout, every byte covered, every claim checked."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from builders import GOLDEN, Command, Draft, Q, convert, dense

from qplug_converters import formats
from qplug_converters.certificate import seal
from qplug_converters.check import check
from qplug_converters.checkpoint import CERTIFICATE, open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.plan import Plan, Verdict, Wishes, make_plan
from qplug_converters.shards import read_header
from qplug_converters.survey import survey

GPTQ, ORDER, AWQ = "gptq-4b-asym-g64", "gptq-4b-sym-g64-actorder", "awq-gemm-g128"
SYM = "gptq-4b-sym-g128"
THREE = "gptq-3b-sym-g128-by-5.8.0"


def certificate(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CERTIFICATE).read_text())
    return found


def planned(source: Path, to: str, **wishes: Any) -> Plan:
    """Plan a conversion with wishes."""
    checkpoint = open_checkpoint(source)
    found, model = checkpoint.scheme()
    model = survey(checkpoint, found, model)
    return make_plan(found, model, formats.find(to), Wishes(**wishes))


def made(source: Path, target: Path, to: str, **wishes: Any) -> Path:
    """Convert with wishes."""
    execute(planned(source, to, **wishes), open_checkpoint(source), target)
    return target


def problems(folder: Path, source: Path | None = None) -> list[str]:
    """Return what does not hold, an error being one thing."""
    try:
        before = None if source is None else open_checkpoint(source)
        return check(open_checkpoint(folder), before).problems
    except QplugError as error:
        return [str(error)]


# The hash ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", [GPTQ, AWQ, "ct-int4-asym-g64"])
def test_the_hash_is_that_of_the_numbers_in_whatever_layout(golden: str, tmp_path: Path) -> None:
    found = {}
    for to in ("gptq_v2", "awq", "canonical", "compressed-tensors", "gptq"):
        if planned(GOLDEN / golden, to).verdict <= Verdict.EXACT:  # v1 cannot store a zero of 0
            convert(GOLDEN / golden, tmp_path / to, to)
            claims = certificate(tmp_path / to)["linears"]
            if not any(claim["moves"] for claim in claims.values()):
                assert all("source_blake3" not in claim for claim in claims.values())
                found[to] = {module: claim["blake3"] for module, claim in claims.items()}
    assert len(found) >= 3
    assert len({json.dumps(hashes) for hashes in found.values()}) == 1
    hashes = next(iter(found.values()))
    assert len(set(hashes.values())) == len(hashes)


def test_the_hash_as_it_is_documented(tmp_path: Path) -> None:
    """Done again from the table in `digest`, in NumPy, from the canonical layout."""
    convert(GOLDEN / SYM, tmp_path / "c", "canonical")
    reference = Draft.of(SYM).tensors
    words = reference[f"{Q}.qweight"].array.view(np.uint32).T
    codes = np.ascontiguousarray(words).view(np.uint8)
    scales = np.ascontiguousarray(reference[f"{Q}.scales"].array.T.astype(np.float32))
    packed = reference[f"{Q}.qzeros"].array.view(np.uint32)
    fields = (packed[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    assert not (fields == 15).any()  # on these the rules for zeros differ
    zeros = np.ascontiguousarray((fields.reshape(len(packed), -1) + 1).T.astype(np.int16))
    groups = (np.arange(codes.shape[1] * 2) // 128).astype(np.int32)
    text = "qplug linear 1\n4 bits\n"
    for name, dtype, array in (
        ("codes", "U8", codes), ("scales", "F32", scales), ("zeros", "I16", zeros),
        ("g_idx", "I32", groups),
    ):  # fmt: skip
        digest = blake3(array.tobytes()).hexdigest()
        text += f"{name} {dtype} {list(array.shape)} {digest}\n"
    said = certificate(tmp_path / "c")["linears"][Q]["blake3"]
    assert said == blake3(text.encode()).hexdigest()


def test_moves_have_two_hashes(tmp_path: Path) -> None:
    made(GOLDEN / GPTQ, tmp_path / "wide", "gptq", bits=8, sym=True)
    convert(GOLDEN / GPTQ, tmp_path / "plain", "canonical")
    plain = certificate(tmp_path / "plain")["linears"]
    for module, claim in certificate(tmp_path / "wide")["linears"].items():
        assert claim["source_blake3"] == plain[module]["blake3"] != claim["blake3"]


def test_blocks_and_threads_change_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qplug_converters import blocks, conversion, tiles

    names = ("gptq_v2", "awq", "canonical")
    for to in names:
        convert(GOLDEN / GPTQ, tmp_path / f"{to}-whole", to)
    monkeypatch.setattr(conversion, "blocks_of", partial(blocks.blocks_of, most=1 << 10))
    monkeypatch.setattr(tiles, "_BLOCK", 64)
    monkeypatch.setattr(conversion, "MOST_SCRATCH", 100)
    for to in names:
        convert(GOLDEN / GPTQ, tmp_path / f"{to}-cut", to)
        for shard in (tmp_path / f"{to}-whole").glob("*.safetensors"):
            assert shard.read_bytes() == (tmp_path / f"{to}-cut" / shard.name).read_bytes()
        one, two = (certificate(tmp_path / f"{to}-{how}")["linears"] for how in ("whole", "cut"))
        assert one == two


# What is there -----------------------------------------------------------------------------------


def test_what_a_certificate_holds(tmp_path: Path) -> None:
    convert(GOLDEN / GPTQ, tmp_path / "c", "awq")
    said = certificate(tmp_path / "c")
    assert said["sha256"] == seal(said)["sha256"]
    assert set(said["versions"]) == {"torch", "python"}
    assert said["source"]["files"] == {
        "model.safetensors": (GOLDEN / GPTQ / "model.safetensors").stat().st_size
    }
    others = set(read_header(tmp_path / "c" / "model.safetensors")) - {
        f"{m}.{p}" for m in said["linears"] for p in ("qweight", "qzeros", "scales")
    }
    assert set(said["tensors"]) == others
    assert "config.json" in said["files"]


def test_a_source_in_the_hub_cache_is_known_by_its_hash(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    Draft.of(GPTQ).save(folder)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    shard = folder / "model.safetensors"
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    shard.rename(blobs / digest)
    shard.symlink_to(blobs / digest)
    convert(folder, tmp_path / "c", "awq")
    assert certificate(tmp_path / "c")["source"]["sha256"]["model.safetensors"] == digest


@pytest.mark.parametrize(
    ("golden", "to", "wishes"),
    [
        (GPTQ, "awq", {}),
        (GPTQ, "gptq", {}),
        (GPTQ, "gptq", {"bits": 8, "sym": True}),
        (GPTQ, "dense", {"dtype": "float32"}),
        (GPTQ, "dense", {"dtype": "bfloat16"}),
        (ORDER, "gptq_v2", {}),
        (THREE, "awq", {}),
        (AWQ, "compressed-tensors", {}),
        ("autogptq-4b-sym-ragged-g96", "awq", {}),
        ("gptq-dynamic-mixed", "canonical", {}),
        ("gptq-moe-mixtral-4b-g64", "awq", {}),
    ],
    ids=lambda v: ",".join(map(str, v.values())) if isinstance(v, dict) else v,
)
def test_certificates_hold(golden: str, to: str, wishes: dict[str, Any], tmp_path: Path) -> None:
    made(GOLDEN / golden, tmp_path / "c", to, **wishes)
    assert problems(tmp_path / "c") == []
    assert problems(tmp_path / "c", GOLDEN / golden) == []


def test_quantized_by_qplug(tmp_path: Path, qplug: Command) -> None:
    source = dense().save(tmp_path / "dense")
    out = tmp_path / "out"
    assert qplug("quantize", source, out, "--to", "gptq", "--group-size", "32").code == 0
    assert problems(out) == []


# Tampering ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden", "to"),
    [(GPTQ, "awq"), (GPTQ, "gptq"), (ORDER, "gptq_v2"), (THREE, "canonical"), (AWQ, "dense"),
     (AWQ, "compressed-tensors")],
)  # fmt: skip
def test_no_byte_of_a_folder_may_change(golden: str, to: str, tmp_path: Path) -> None:
    draft = Draft.of(golden)
    draft.files["tokenizer.json"] = b'{"a": 1}'
    source = draft.save(tmp_path / "source")
    convert(source, tmp_path / "c", to)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "c").iterdir()):
        raw = path.read_bytes()
        places = {int(n) for n in rng.integers(0, len(raw), 25)}
        if path.suffix == ".safetensors":
            for place in read_header(path).values():
                places |= {place.offset, place.offset + place.spec.nbytes - 1}
        for at in sorted(places):
            shutil.rmtree(tmp_path / "t", ignore_errors=True)
            shutil.copytree(tmp_path / "c", tmp_path / "t")
            changed = bytearray(raw)
            changed[at] ^= 1 << int(rng.integers(8))
            (tmp_path / "t" / path.name).write_bytes(changed)
            assert problems(tmp_path / "t"), (path.name, at)
    assert problems(tmp_path / "c") == []


def test_no_file_may_be_missing(tmp_path: Path) -> None:
    draft = Draft.of(GPTQ)
    draft.files["tokenizer.json"] = b"{}"
    convert(draft.save(tmp_path / "source"), tmp_path / "c", "awq")
    (tmp_path / "c" / "tokenizer.json").unlink()
    assert problems(tmp_path / "c") == ["tokenizer.json: not there"]
    (tmp_path / "c" / CERTIFICATE).unlink()
    (found,) = problems(tmp_path / "c")
    assert "no certificate" in found


def test_a_card_may_be_edited_and_a_new_file_is_said(tmp_path: Path) -> None:
    convert(GOLDEN / GPTQ, tmp_path / "c", "awq")
    (tmp_path / "c" / "README.md").write_text("mine")
    (tmp_path / "c" / "new.txt").write_text("new")
    found = check(open_checkpoint(tmp_path / "c"))
    assert found.holds
    assert found.notes == ["new.txt: not in the certificate"]


Forge = Callable[[dict[str, Any]], object]
FORGERIES: dict[str, Forge] = {
    "verdict": lambda c: c.update(verdict="COPIED"),
    "verdict of a linear": lambda c: c["linears"][Q].update(verdict="COPIED"),
    "moves": lambda c: c["linears"][Q].update(moves=["widen(4)"]),
    "no moves": lambda c: c["linears"][Q].update(moves=[]),
    "unknown move": lambda c: c["linears"][Q].update(moves=["improve(4)"]),
    "hash": lambda c: c["linears"][Q].update(blake3="0" * 64),
    "source hash": lambda c: c["linears"][Q].update(source_blake3="0" * 64),
    "from": lambda c: c["linears"][Q].update({"from": "4-bit sym g64"}),
    "zero rule": lambda c: c["linears"][Q].update(zero_rule="field"),
    "rows from": lambda c: c["linears"][Q].update(rows_from="nowhere"),
    "linear left out": lambda c: c["linears"].pop(Q),
    "linear invented": lambda c: c["linears"].update(x=copy.deepcopy(c["linears"][Q])),
    "tensor": lambda c: c["tensors"].update(dict.fromkeys(c["tensors"], "0" * 64)),
    "target": lambda c: c.update(target="awq"),
    "source files": lambda c: c["source"]["files"].update(x=1),
    "source format": lambda c: c["source"].update(format="awq"),
    "file left out": lambda c: c["files"].pop("model.safetensors"),
    "header": lambda c: c["files"]["model.safetensors"].update(header_sha256="0" * 64),
}


@pytest.mark.parametrize("sealed", [False, True], ids=["broken seal", "sealed again"])
@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_certificates(kind: str, sealed: bool, tmp_path: Path) -> None:
    """A broken seal is found at once; whoever seals again is found out with the source."""
    source = GOLDEN / GPTQ
    made(source, tmp_path / "c", "gptq", bits=8, sym=True)
    said = certificate(tmp_path / "c")
    FORGERIES[kind](said)
    assert said != certificate(tmp_path / "c")
    text = json.dumps(seal(said) if sealed else said)
    (tmp_path / "c" / CERTIFICATE).write_text(text)
    assert problems(tmp_path / "c", source if sealed else None)


@pytest.mark.parametrize(
    "said",
    [[], {}, {"linears": []}, {"linears": {"a": 1}, "files": {}, "tensors": {}},
     {"linears": {"a": {"verdict": "GOOD", "moves": []}}, "files": {}, "tensors": {}},
     {"linears": {}, "files": {"../x": {}}, "tensors": {}, "verdict": "EXACT", "source": {}},
     {"linears": {}, "files": {"x": 3}, "tensors": {}, "verdict": "EXACT", "source": {}}],
    ids=str,
)  # fmt: skip
def test_what_is_no_certificate(said: object, tmp_path: Path) -> None:
    convert(GOLDEN / GPTQ, tmp_path / "c", "awq")
    (tmp_path / "c" / CERTIFICATE).write_text(json.dumps(said))
    assert problems(tmp_path / "c")


def test_another_source(tmp_path: Path) -> None:
    convert(GOLDEN / GPTQ, tmp_path / "c", "awq")
    shutil.copytree(GOLDEN / GPTQ, tmp_path / "other")
    shard = tmp_path / "other" / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[read_header(shard)[f"{Q}.scales"].offset] ^= 1
    shard.write_bytes(raw)
    found = problems(tmp_path / "c", tmp_path / "other")
    assert any(Q in problem for problem in found)


# The command -------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, qplug: Command) -> None:
    convert(GOLDEN / GPTQ, tmp_path / "c", "awq")
    ran = qplug("verify", tmp_path / "c")
    assert ran.code == 0
    assert "the certificate (EXACT) holds" in ran.out
    ran = qplug("verify", tmp_path / "c", "--source", GOLDEN / GPTQ, "--deep", "--json")
    assert ran.code == 0
    assert ran.json["holds"] is True
    hashes = ran.json["weights_sha256"]
    assert hashes["source"] == hashes["folder"]
    assert len(hashes["folder"]) == ran.json["linears"]
    ran = qplug("verify", GOLDEN / GPTQ, tmp_path / "c", "--deep", "--json")
    assert ran.json["weights_sha256"]["first"] == hashes["source"]
    config = tmp_path / "c" / "config.json"
    config.write_text(config.read_text() + " ")
    ran = qplug("verify", tmp_path / "c")
    assert ran.code == 3
    assert "wrong: config.json" in ran.out
    assert qplug("verify", GOLDEN / GPTQ).code == 1
    assert qplug("verify", "a", "b", "--source", "c").code == 2
    assert qplug("verify", tmp_path / "c", "--allow", "rounded").code == 2


def test_deep_is_the_hash_of_the_weights(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("verify", GOLDEN / GPTQ, GOLDEN / GPTQ, "--deep", "--json")
    from safetensors.numpy import load_file

    weight = load_file(GOLDEN / GPTQ / "reference.safetensors")[f"{Q}.weight"]
    expected = hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()
    assert ran.json["weights_sha256"]["first"][Q] == expected
