"""What the tests with real engines share.

What is not installed skips its tests. With QPLUG_REQUIRE_ENGINES=1, as `make test` sets it, a skip
fails instead: there, everything is to be there. What tests measure is shown at the end of a run
and written to build/measured.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
QPLUG = Path(sys.executable).with_name("qplug")
REQUIRE = os.environ.get("QPLUG_REQUIRE_ENGINES") == "1"
MEASURED = ROOT / "build" / "measured.txt"
LINES = pytest.StashKey[list[str]]()


def _fail_instead(report: Any) -> None:
    """Make a failure of a skip; an expected failure (`wasxfail`) is none."""
    if REQUIRE and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else [report.longrepr]
        report.outcome, report.longrepr = "failed", f"QPLUG_REQUIRE_ENGINES=1: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if item.get_closest_marker("gpu") is None:
        _fail_instead(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    _fail_instead(report)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show what was measured, of tests that passed too."""
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write("\n".join(lines) + "\n")
        MEASURED.parent.mkdir(exist_ok=True)
        MEASURED.write_text("\n".join(lines) + "\n")
        terminalreporter.write(f"(also in {MEASURED.relative_to(ROOT)})\n")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that takes a line to show at the end of the run."""
    return request.config.stash.setdefault(LINES, []).append


@pytest.fixture(scope="session")
def needs() -> Callable[[str], Any]:
    """Return a function that imports a module or skips."""
    return lambda name: pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture(scope="session")
def engine(needs: Callable[[str], Any]) -> Callable[..., Any]:
    """Return `with engine(folder, quantization=…) as found`: vLLM in this process."""
    needs("vllm")
    from .vllm.engines import start

    return start


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of SmolLM2-135M by format, written by the `qplug` command.

    `source` is the unquantized model (`QPLUG_TEST_MODEL`, or what `make_dense.py` writes); `gptq`
    is made of it, and `awq` and `dense` (float32, exact) of `gptq`.
    """
    source = Path(os.environ.get("QPLUG_TEST_MODEL", ROOT / "build/models/smollm2-dense"))
    if not (source / "config.json").exists():
        pytest.skip(f"{source} is not there: run integration/demo/make_dense.py")
    if not QPLUG.exists():
        pytest.skip("the `qplug` command is not installed beside this Python")
    work = tmp_path_factory.mktemp("smollm2")
    made = {name: work / name for name in ("gptq", "awq", "dense")}
    commands = [
        ["quantize", source, made["gptq"], "--bits", "4", "--group-size", "64", "--asym"],
        ["convert", made["gptq"], made["awq"], "--to", "awq-layout", "--verify"],
        ["convert", made["gptq"], made["dense"], "--to", "dense", "--dtype", "float32"],
    ]
    commands[0] += ["--to", "gptq"]
    for command in commands:
        done = subprocess.run([QPLUG, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return {"source": source, **made}
