"""What `qplug doctor` finds wrong: a plugin that does not register, a kernel that cannot."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from builders import Command

from qplug import doctor


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not import vLLM, which takes seconds."""
    monkeypatch.setattr(doctor, "registering", lambda: "")


def stand_in(folder: Path, code: str) -> None:
    """Write a package named vllm that does `code` when the plugin asks it to register."""
    package = folder / "vllm" / "model_executor" / "layers"
    package.mkdir(parents=True)
    for path in (package, package.parent, package.parent.parent):
        (path / "__init__.py").write_text("")
    (package / "quantization.py").write_text(code)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_registering() -> None:
    assert doctor.registering() == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libcudart.so.13 is missing')", "ImportError: libcudart.so.13 is"),
        ("import os; os.abort()", "the process ended with code -6"),
        ("import sys; sys.exit('no')", "the process ended with code 1: no"),
        ("import os; os._exit(0)", "the process ended with code 0: it said nothing"),
        ("print('hello'); raise ValueError('x')", "ValueError: x"),
    ],
)
def test_registering_fails(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.registering().startswith(said)


def test_a_failed_registration_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "registering", lambda: "ImportError: x")
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    found = {"vllm": ["vllm"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: found)
    said: list[str] = []
    examined = doctor.examine(said.append)
    assert examined.engines["vllm"] == "vllm 1.0, plugin failed"
    assert "registration with vLLM failed: ImportError: x" in examined.problems
    assert [line.partition(" to ")[0] for line in said] == ["importing vLLM"]
    found.clear()
    assert doctor.examine(said.append).engines["vllm"] == "not installed"
    assert len(said) == 1


def test_a_slow_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PATIENCE", 1)
    assert doctor.registering() == "importing vLLM takes longer than 1 s"


@pytest.mark.usefixtures("no_vllm")
def test_a_kernel_by_name(qplug: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPLUG_KERNEL", "reference")
    found = qplug("doctor", "--json").json
    assert {k["kernel"] for k in found["kernels"]} == {"reference"}
    assert found["machine"]["QPLUG_KERNEL"] == "reference"
    assert not any("QPLUG_KERNEL" in problem for problem in found["problems"])


@pytest.mark.usefixtures("no_vllm")
@pytest.mark.parametrize(
    ("name", "said"), [("nope", "found `nope`, expected one of"), ("cpu_int4", "cannot multiply")]
)
def test_a_kernel_that_cannot(
    name: str, said: str, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QPLUG_KERNEL", name)
    ran = qplug("doctor", "--json")
    assert ran.code == 1
    problems = [p for p in ran.json["problems"] if p.startswith("QPLUG_KERNEL: ")]
    assert problems
    assert all(said in problem for problem in problems)
    without = [k["why"] for k in ran.json["kernels"] if k["kernel"] == "none"]
    assert set(without) == set(problems)
