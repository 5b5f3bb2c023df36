"""The command line: exit code, stdout and stderr of every behaviour, and what it costs."""

from __future__ import annotations

import json
import os
import pty
import re
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from builders import GOLDEN, Command, Draft, Q, Stored, dense, digest

ASYM = GOLDEN / "gptq-4b-asym-g64"
"""Has stored zeros of 2^bits - 1, on which readers disagree."""
SYM = GOLDEN / "gptq-4b-sym-g128"
ORDERED = GOLDEN / "gptq-4b-sym-g64-actorder"
AWQ = GOLDEN / "awq-gemm-g128"
V2 = GOLDEN / "gptq_v2-4b-asym-g64"
QPLUG = Path(sys.executable).parent / "qplug"

AMBIGUOUS = (
    "warning: 15 stored zeros are 2^bits - 1, which readers of gptq decode in different ways; "
    "read by rule `word` (producer gptqmodel:7.7.0; --zero-rule overrides)\n"
)

LEFT = "warning: not part of the model, and not carried along: reference.safetensors\n"
"""What a golden holds besides: the weights as its own tool reads them."""


def shaped(text: str) -> str:
    """Turn an indented block into what is printed."""
    return textwrap.dedent(text).lstrip("\n")


# formats, doctor --------------------------------------------------------------------------------


def test_formats(qplug: Command) -> None:
    ran = qplug("formats")
    assert (ran.code, ran.err) == (0, "")
    lines = [re.split(r"  +", line.strip()) for line in ran.out.splitlines()]
    assert lines[0][:5] == ["format", "also", "can", "bits", "act order"]
    rows = {line[0]: line[1:] for line in lines[1:]}
    assert list(rows) == list(qplug("formats", "--json").json)
    assert rows["canonical"][:4] == ["qplug", "read, write", "1 to 8", "yes"]
    assert rows["gptq"][:4] == ["gptq_v1", "read, write", "2, 3, 4, 8", "yes"]
    assert rows["awq"][:4] == ["awq-gemm", "read, write", "4", "no"]
    assert rows["dense"][:4] == ["float", "write", "-", "no"]


def test_names_cannot_write_to_the_terminal(tmp_path: Path, qplug: Command) -> None:
    draft = Draft.of(ASYM)
    draft.tensors["a\x1b[2J\nb.weight"] = Stored("F32", [1, 1], b"\0\0\0\0")
    draft.config["architectures"] = ["\x1b]0;title\x07"]
    ran = qplug("inspect", draft.save(tmp_path / "odd"))
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert "a\\x1b[2J\\nb" in ran.out


def test_doctor(qplug: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qplug.doctor.registering", lambda: "")  # tests/test_doctor.py runs it
    ran = qplug("doctor")
    found = qplug("doctor", "--json")
    assert ran.code == found.code == (1 if found.json["problems"] else 0)
    said = [line for line in ran.err.splitlines() if not line.startswith("importing vLLM")]
    assert said == [f"warning: {p}" for p in found.json["problems"]]
    assert found.err == ""
    assert ran.out.startswith("qplug ")
    assert {k["weights"] for k in found.json["kernels"]} >= {"4-bit g128", "nf4 b64", "int8 rows"}
    assert all(k["kernel"] and k["why"] for k in found.json["kernels"])


# convert -----------------------------------------------------------------------------------------


def test_convert(tmp_path: Path, qplug: Command) -> None:
    target = tmp_path / "awq"
    ran = qplug("convert", ASYM, target, "--to", "awq", "--verify")
    assert ran.code == 0
    plan, proof = ran.out.rstrip("\n").rsplit("\n", 1)
    assert plan == shaped(
        """
        linears  verdict  from            to              how
        7        EXACT    4-bit asym g64  4-bit asym g64  repacked"""
    )
    assert re.fullmatch(
        r"EXACT: 7 linears, 98,304 weights, 4 other tensors: every weight bit-equal "
        r"\(\d+\.\d s\)",
        proof,
    )
    said = ran.err.splitlines(keepends=True)
    assert said[0] == "gptq to awq: EXACT, 56.6 kB to 53.0 kB\n"
    assert said[1:3] == [LEFT, AMBIGUOUS]
    assert re.fullmatch(rf"wrote {re.escape(str(target))} in \d+\.\d s\n", said[3])
    assert len(said) == 4  # the proof does not say again what the plan has said
    assert {p.name for p in target.iterdir()} == {
        "config.json",
        "model.safetensors",
        "qplug-certificate.json",
    }


def test_convert_json(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", ASYM, tmp_path / "awq", "--to", "awq", "--verify", "--json")
    assert (ran.code, ran.err) == (0, "")
    answer = ran.json
    assert answer["plan"]["verdict"] == "EXACT"
    assert answer["plan"]["counts"] == {"EXACT": 7}
    assert answer["output"] == str(tmp_path / "awq")
    assert answer["proof"]["same"] is True
    certificate = json.loads((tmp_path / "awq" / "qplug-certificate.json").read_text())
    assert certificate["linears"][Q]["verdict"] == "EXACT"


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["text", "json"])
def test_dry_run_writes_nothing(arguments: tuple[str, ...], tmp_path: Path, qplug: Command) -> None:
    before = digest(ASYM)
    ran = qplug("convert", ASYM, tmp_path / "x" / "y", "--to", "awq", "--dry-run", *arguments)
    assert ran.code == 0
    assert list(tmp_path.iterdir()) == []
    assert digest(ASYM) == before
    if arguments:
        assert set(ran.json) == {"plan"}
        assert ran.err == ""
    else:
        assert ran.err == f"gptq to awq: EXACT, 56.6 kB to 53.0 kB\n{LEFT}{AMBIGUOUS}"


@pytest.mark.parametrize(
    ("source", "name", "format_name"),
    [
        (AWQ, "awq", "awq"),
        (AWQ, "awq-layout", "awq"),
        (AWQ, "awq-gemm-layout", "awq"),
        (ASYM, "gptq", "gptq"),
        (ASYM, "gptq-layout", "gptq"),
        (ASYM, "GPTQ-Layout", "gptq"),
        (V2, "gptq_v2", "gptq_v2"),
        (V2, "gptq-v2-layout", "gptq_v2"),
    ],
)
def test_names_of_formats(
    source: Path, name: str, format_name: str, tmp_path: Path, qplug: Command
) -> None:
    ran = qplug(
        "convert", source, tmp_path / "x", "--from", name, "--to", name, "--dry-run", "--json"
    )
    assert ran.code == 0
    assert (ran.json["plan"]["from"], ran.json["plan"]["to"]) == (format_name, format_name)
    assert ran.json["plan"]["verdict"] == "COPIED"


@pytest.mark.parametrize("name", ["gptq_v2-layout", "canonical-layout", "dense-layout", "qplug"])
def test_names_of_targets(name: str, tmp_path: Path, qplug: Command) -> None:
    assert qplug("convert", SYM, tmp_path / "x", "--to", name, "--dry-run").code == 0


def test_contradicted_from(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", AWQ, tmp_path / "x", "--from", "gptq-layout", "--to", "canonical")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == shaped(
        f"""
        error: {AWQ}: found format awq, expected gptq, as --from says
        hint: leave out --from, or correct it
        """
    )
    assert qplug("inspect", AWQ, "--from", "gptq").code == 1
    assert list(tmp_path.iterdir()) == []


def test_act_order_has_no_exact_way_into_awq(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", ORDERED, tmp_path / "x", "--to", "awq")
    assert ran.code == 3
    assert ran.errors == [
        f"error: {Q} and 5 more: REQUANTIZED: columns are in act order, and awq has no g_idx"
    ]
    assert ran.err.rstrip().endswith("or --allow requantized")
    ran = qplug("convert", ORDERED, tmp_path / "x", "--to", "awq", "--json")
    assert ran.code == 3
    assert ran.error["found"].startswith("REQUANTIZED: ")
    ran = qplug("convert", ORDERED, tmp_path / "x", "--to", "awq", "--dry-run", "--json")
    assert ran.code == 3
    assert ran.json["plan"]["verdict"] == "REQUANTIZED"
    assert ran.json["refused"]["found"].startswith("REQUANTIZED: ")
    ran = qplug(
        "convert", ORDERED, tmp_path / "x", "--to", "awq", "--allow", "requantized", "--verify"
    )
    assert ran.code == 0
    assert "relative error" in ran.err


def test_allow(tmp_path: Path, qplug: Command) -> None:
    rounded = ("convert", SYM, tmp_path / "x", "--to", "dense", "--dtype", "bfloat16")
    ran = qplug(*rounded, "--allow", "exact")
    assert ran.code == 3
    assert "ROUNDED: rounded once to bfloat16: at most 2^-9 of each weight" in ran.errors[0]
    assert "hint: --allow rounded" in ran.err
    assert list(tmp_path.iterdir()) == []
    ran = qplug(*rounded, "--verify", "--json")
    assert ran.code == 0
    assert ran.json["proof"]["verdict"] == "ROUNDED"


def test_options_of_a_conversion(tmp_path: Path, qplug: Command) -> None:
    ran = qplug(
        "convert", SYM, tmp_path / "x", "--to", "gptq", "--bits", "8", "--group-size", "32",
        "--max-shard-size", "50kB", "--verify", "--json",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.json["plan"]["linears"][0]["to"] == "8-bit sym g32"
    assert ran.json["plan"]["linears"][0]["moves"] == ["symmetrize(8)", "split_groups(32)"]
    assert ran.json["proof"]["same"]
    found = qplug("inspect", tmp_path / "x", "--json").json
    assert found["shards"] > 2
    assert found["schemes"] == {"8-bit sym g32": 7}


def test_group_sizes_that_do_not_divide(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", ASYM, tmp_path / "x", "--to", "gptq_v2", "--group-size", "48")
    assert ran.code == 3
    assert "groups of 64 inputs are not groups of 48" in ran.errors[0]
    assert "--group-size that divides 64" in ran.err


# --zero-rule -------------------------------------------------------------------------------------


def test_forced_zero_rule_changes_the_weights(tmp_path: Path, qplug: Command) -> None:
    for rule in ("word", "plain"):
        ran = qplug(
            "convert", ASYM, tmp_path / rule, "--to", "canonical", "--zero-rule", rule,
            "--verify", "--json",
        )  # fmt: skip
        assert ran.code == 0, ran.json["proof"]
        assert {x["zero_rule"] for x in ran.json["plan"]["linears"]} == {rule}
    # `word` is what the producer means.
    assert qplug("verify", ASYM, tmp_path / "word").code == 0
    ran = qplug("verify", ASYM, tmp_path / "plain", "--json")
    assert ran.code == 3
    assert sum(r["differing"] for r in ran.json["linears"]) > 0
    assert qplug("verify", ASYM, tmp_path / "plain", "--zero-rule", "plain").code == 0


def test_forced_zero_rule_of_a_copy(tmp_path: Path, qplug: Command) -> None:
    """The config of a copy does not say by which rule: only the producer's may be copied."""
    for rule, verdict in (("word", "COPIED"), ("plain", "REQUANTIZED")):
        ran = qplug(
            "convert", ASYM, tmp_path / rule, "--to", "gptq", "--zero-rule", rule, "--verify"
        )
        assert ran.code == (0 if verdict == "COPIED" else 3)
        assert verdict in {line.split()[1] for line in ran.out.splitlines()[1:]}
    assert {path.name for path in tmp_path.iterdir()} == {"word"}


@pytest.mark.parametrize("source", [AWQ, V2], ids=["awq", "gptq_v2"])
def test_zero_rule_elsewhere(source: Path, tmp_path: Path, qplug: Command) -> None:
    ran = qplug("convert", source, tmp_path / "x", "--to", "canonical", "--zero-rule", "plain")
    assert ran.code == 1
    assert ran.errors == [
        f"error: --zero-rule: found format {source.name.partition('-')[0]}, "
        "expected gptq, the format that has several rules"
    ]


def test_zero_rule_for_other_bits(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("inspect", ASYM, "--zero-rule", "legacy3")
    assert ran.code == 1
    assert "rule `legacy3` is for 3 bits, not 4" in ran.errors[0]


# verify ------------------------------------------------------------------------------------------


def test_verify_of_the_same(qplug: Command) -> None:
    ran = qplug("verify", SYM, SYM)
    assert (ran.code, ran.err) == (0, LEFT)
    assert ran.out.startswith("EXACT: 7 linears, 98,304 weights, 5 other tensors")


def test_verify_of_different_ones(tmp_path: Path, qplug: Command) -> None:
    draft = Draft.of(SYM)
    for name, at in ((f"{Q}.scales", (0, 5)), ("model.norm.weight", (3,))):
        stored = draft.tensors[name]
        stored = Stored(stored.dtype.replace("BF16", "I16"), stored.shape, stored.data)
        array = stored.array.view("int16")
        array[at] ^= 1
        draft.tensors[name] = Stored(draft.tensors[name].dtype, stored.shape, array.tobytes())
    changed = draft.save(tmp_path / "changed")
    ran = qplug("verify", SYM, changed)
    assert ran.code == 3
    lines = ran.out.splitlines()
    assert lines[0].split() == ["linear", "verdict", "weights", "that", "differ", "max", "mean"]
    assert lines[1].split()[:3] == [Q, "REQUANTIZED", "128"]
    assert lines[2] == "differs: model.norm.weight: the bytes differ"
    assert lines[3].startswith("REQUANTIZED: 7 linears")
    assert "1 linears and 1 other things differ" in lines[3]
    ran = qplug("verify", SYM, changed, "--json")
    assert ran.code == 3
    assert (ran.json["same"], ran.err) == (False, "")


def test_verify_of_rounded_ones(tmp_path: Path, qplug: Command) -> None:
    assert qplug("convert", SYM, tmp_path / "x", "--to", "dense", "--dtype", "float16").code == 0
    assert qplug("verify", SYM, tmp_path / "x").code == 3
    assert qplug("verify", SYM, tmp_path / "x", "--allow", "rounded").code == 0


# Usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nope",), "No such option '--nope'"),
        (("nope",), "No such command 'nope'"),
        ((), "Usage:"),
        (("convert", "a"), "Missing argument 'DST'"),
        (("convert", "a", "b"), "one of --to and --for"),
        (("convert", "a", "b", "--to", "nope"), "no format 'nope': choose one of canonical,"),
        (("convert", "a", "b", "--to", "awq", "--from", "nope"), "no format 'nope'"),
        (("convert", "a", "b", "--to", "awq", "--group-size", "0"), "0 is no group size"),
        (("convert", "a", "b", "--to", "awq", "--group-size", "-2"), "-2 is no group size"),
        (("convert", "a", "b", "--to", "awq", "--bits", "0"), "0 is not in the range"),
        (("convert", "a", "b", "--to", "awq", "--bits", "x"), "'x' is not a valid integer"),
        (("convert", "a", "b", "--to", "awq", "--zero-rule", "x"), "no rule 'x': choose one of"),
        (("convert", "a", "b", "--to", "awq", "--allow", "x"), "'x' is not one of"),
        (("convert", "a", "b", "--to", "awq", "--bits", "8"), "awq holds 4 bits, not 8"),
        (("convert", "a", "b", "--to", "dense", "--bits", "4"), "--bits means nothing with --to"),
        (
            ("convert", "a", "b", "--to", "dense", "--group-size", "32"),
            "--group-size means nothing",
        ),
        (("convert", "a", "b", "--to", "dense", "--sym"), "--sym means nothing with --to dense"),
        (("convert", "a", "b", "--to", "awq", "--dtype", "float32"), "--dtype is that of dense"),
        (("convert", "", "b", "--to", "awq"), "an empty path"),
        (("convert", "a", "", "--to", "awq"), "an empty path"),
        (("inspect", ""), "an empty path"),
        (("verify", "a", ""), "an empty path"),
        (("quantize", "", "b", "--to", "awq"), "an empty path"),
        (("quantize", "a", "b", "--to", "dense"), "dense holds no codes"),
        (("quantize", "a", "b", "--to", "awq", "--bits", "8"), "awq holds 4 bits, not 8"),
        (("quantize", "a", "b", "--to", "qplug", "--bits", "1", "--sym"), "cannot be symmetric"),
        (("inspect", "a", "--zero-rule", "x"), "no rule 'x'"),
        (("inspect", "a", "b"), "unexpected extra argument"),
        (("quantize", "a", "b"), "Missing option '--to'"),
        (("quantize", "a", "b", "--to", "gptq", "--group-size", "0"), "0 is no group size"),
        (("quantize", "a", "b", "--to", "gptq", "--bits", "9"), "9 is not in the range"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str, qplug: Command) -> None:
    ran = qplug(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    if len(arguments) > 1:
        ran = qplug(*arguments, "--json")
        assert ran.code == 2
        assert said in ran.error["found"]


@pytest.mark.parametrize(
    "size", ["x", "0", "0.5", "-5GB", "5 parsecs", "", "9" * 400, "10000000000000TB"]
)
def test_wrong_sizes(size: str, tmp_path: Path, qplug: Command) -> None:
    target = tmp_path / "x"
    ran = qplug("convert", SYM, target, "--to", "gptq", f"--max-shard-size={size}")
    assert (ran.code, ran.out) == (2, "")
    assert not target.exists()


# Where DST lies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_an_existing_target_is_refused_first(command: str, tmp_path: Path, qplug: Command) -> None:
    """Before SRC is opened, and without a plan; a dry run does not mind."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in (tmp_path, tmp_path / "link"):
        ran = qplug(command, "/nowhere", target, "--to", "gptq")
        assert (ran.code, ran.out) == (1, "")
        assert ran.errors == [
            f"error: {target}: found a file or folder that exists, expected a new name"
        ]
    assert qplug("convert", SYM, tmp_path, "--to", "gptq", "--dry-run").code == 0


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_target_inside_the_source(command: str, tmp_path: Path, qplug: Command) -> None:
    source = (
        Draft.of(SYM).save(tmp_path / "source") if command == "convert" else tmp_path / "source"
    )
    if command == "quantize":
        dense().save(source)
    (tmp_path / "link").symlink_to(source)
    before = digest(source)
    for one, two in (
        (source, source / "x"),
        (tmp_path / "link", source / "a" / "b"),
        (source, tmp_path / "link" / "x"),
        (source, tmp_path / "new" / ".." / "source" / "x"),
    ):
        ran = qplug(command, one, two, "--to", "gptq")
        assert ran.code == 1
        assert "found a place inside the source" in ran.errors[0]
    assert digest(source) == before
    assert {p.name for p in tmp_path.iterdir()} == {"source", "link"}


def test_detours_in_a_target(
    tmp_path: Path, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for detour in ("./x/../y", "x/../z/w/..", f"{tmp_path}/a/b/../../c"):
        assert qplug("convert", SYM, detour, "--to", "gptq").code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"y", "z", "c"}
    (tmp_path / "loop").symlink_to("loop")
    ran = qplug("convert", SYM, "loop/v", "--to", "gptq")
    assert (ran.code, ran.out) == (1, "")
    assert len(ran.errors) == 1


# quantize ----------------------------------------------------------------------------------------


def test_quantize(tmp_path: Path, qplug: Command) -> None:
    source = dense().save(tmp_path / "dense")
    ran = qplug("quantize", source, tmp_path / "q", "--to", "gptq-layout", "--group-size", "32")
    assert (ran.code, ran.err) == (0, "")
    found = dict(re.split(r"  +", line, maxsplit=1) for line in ran.out.splitlines())
    assert found["wrote"] == str(tmp_path / "q")
    assert found["linears"] == "4 x 4-bit asym g32 by rtn"
    assert found["left dense"] == "none"
    ran = qplug(
        "quantize", source, tmp_path / "q2", "--to", "awq", "--group-size", "32", "--sym", "--json"
    )
    assert ran.code == 0
    assert ran.json["scheme"] == "4-bit sym g32"
    assert 0 < ran.json["relative_error"] < 0.2
    assert ran.json["worst"]["module"].startswith("model.layers.0.")
    for options, scheme in (((), "4-bit g32"), (("--zeros",), "4-bit sym g32")):
        found = qplug("inspect", tmp_path / "q2", *options, "--json")
        assert found.json["schemes"] == {scheme: 4}


def test_quantize_refuses(tmp_path: Path, qplug: Command) -> None:
    ran = qplug("quantize", SYM, tmp_path / "q", "--to", "gptq", "--json")
    assert ran.code == 1
    assert "`qplug convert`" in ran.error["fix"]
    ran = qplug("convert", dense().save(tmp_path / "dense"), tmp_path / "q", "--to", "gptq")
    assert ran.code == 1
    assert "`qplug quantize`" in ran.err
    assert not (tmp_path / "q").exists()


# Terminals ---------------------------------------------------------------------------------------


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """Run with stdout and stderr on a terminal; return what it shows."""
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    child = subprocess.Popen(
        [QPLUG, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**clean, "TERM": "xterm", **environment},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # what Linux says when the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    child.wait(timeout=30)
    return shown.decode()


def test_colour_on_a_terminal() -> None:
    assert "\x1b[" in on_a_terminal("inspect", "/nowhere")
    assert "\x1b[" in on_a_terminal("formats")


def test_no_color() -> None:
    assert "\x1b" not in on_a_terminal("inspect", "/nowhere", NO_COLOR="1")
    assert "\x1b" not in on_a_terminal("formats", NO_COLOR="1")


def test_no_escape_codes_where_nobody_looks(tmp_path: Path) -> None:
    """Nor a progress bar; stdout and stderr are pipes here."""
    commands = (
        ["convert", ORDERED, tmp_path / "x", "--to", "gptq_v2", "--verify"],
        ["inspect", "/nowhere"],
        ["formats", "--nope"],
    )
    program = "import sys, qplug.cli; qplug.cli.main(sys.argv[1:])"
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, command)], capture_output=True, check=False
        )
        assert b"\x1b" not in done.stdout + done.stderr
        assert b"\r" not in done.stdout + done.stderr


def test_closed_pipe(tmp_path: Path) -> None:
    """`qplug formats | head -0` says nothing of broken pipes."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [QPLUG, "formats"], stdout=writer, stderr=subprocess.PIPE, check=False, timeout=30
    )
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""


def test_other_encodings(tmp_path: Path) -> None:
    """A terminal that has no such letter gets an escape, not a traceback."""
    draft = Draft.of(ASYM)
    draft.config["architectures"] = ["Größe 模型"]
    source = draft.save(tmp_path / "source")
    for arguments in ((), ("--json",)):
        done = subprocess.run(
            [QPLUG, "inspect", source, *arguments],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "latin-1"},
            check=True,
        )
        assert done.stderr == b""
        assert arguments or "Größe \\u6a21\\u578b" in done.stdout.decode("latin-1")
    assert json.loads(done.stdout)["architecture"] == "Größe 模型"


# Costs -------------------------------------------------------------------------------------------


def quickest(*arguments: object, times: int = 5) -> float:
    """Return the shortest wall time of a few runs, in seconds."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run([QPLUG, *map(str, arguments)], check=True, capture_output=True)
        found.append(time.perf_counter() - started)
    return min(found)


def test_help_is_quick() -> None:
    assert quickest("--help") < 0.3


def large(folder: Path, shards: int = 100, layers: int = 80) -> Path:
    """Write the headers of a 70B model; its data is a hole in each file."""
    hidden, inter, group = 8192, 28672, 128
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    specs: list[tuple[str, str, list[int], int]] = []
    for layer in range(layers):
        for name, (out, inp) in linears.items():
            module = f"model.layers.{layer}.{name}"
            specs += [
                (f"{module}.qweight", "I32", [inp // 8, out], inp * out // 2),
                (f"{module}.qzeros", "I32", [inp // group, out // 8], inp // group * out // 2),
                (f"{module}.scales", "F16", [inp // group, out], inp // group * out * 2),
                (f"{module}.g_idx", "I32", [inp], inp * 4),
            ]
    folder.mkdir()
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, at = {}, 0
        cut = slice(len(specs) * number // shards, len(specs) * (number + 1) // shards)
        for name, dtype, shape, size in specs[cut]:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            weight_map[name] = file
            at += size
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as shard:
            shard.write(struct.pack("<Q", len(raw)) + raw)
            shard.truncate(8 + len(raw) + at)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    block = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": True}
    (folder / "config.json").write_text(json.dumps({"quantization_config": block}))
    return folder


def test_inspect_of_a_hundred_shards_is_quick(tmp_path: Path) -> None:
    folder = large(tmp_path / "large")
    done = subprocess.run(
        [QPLUG, "inspect", folder, "--json"], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert (found["shards"], found["quantized_linears"]) == (100, 560)
    assert found["weights"] > 68e9
    assert quickest("inspect", folder, times=3) < 1.0


WITHOUT_TORCH = """
import contextlib, io, sys
from qplug.cli import main

commands = [line.split("|") for line in sys.stdin.read().splitlines()]
for command in commands:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(command)
        except SystemExit as end:
            assert end.code in (0, None, 3), (command, end.code, err.getvalue())
    for heavy in ("torch", "transformers", "vllm", "rich"):
        assert heavy not in sys.modules, (heavy, command)
    assert out.getvalue()
"""


def test_torch_stays_away(tmp_path: Path) -> None:
    """Plans, inspect, --dry-run, formats and --help never import torch."""
    helps = [[], ["inspect"], ["convert"], ["verify"], ["quantize"], ["formats"], ["doctor"]]
    commands = [[*command, "--help"] for command in helps]
    commands += [["--version"], ["formats"], ["formats", "--json"]]
    for source in (ASYM, ORDERED, AWQ, GOLDEN / "gptq-3b-sym-g128-by-5.8.0"):
        commands += [["inspect", str(source)], ["inspect", str(source), "--zeros"]]
        commands += [
            ["convert", str(source), str(tmp_path / "x"), "--to", target, "--dry-run"]
            for target in ("awq", "gptq_v2", "canonical", "dense")
        ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join("|".join(command) for command in commands),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
