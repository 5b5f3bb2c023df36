"""Ten minutes of the fuzzer; QPLUG_SOAK_SECONDS and QPLUG_SOAK_SEED change how long and which."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import Fuzzer

SECONDS = float(os.environ.get("QPLUG_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("QPLUG_SOAK_SEED", "1"))


@pytest.mark.slow
def test_only_errors_of_the_input(tmp_path: Path, report: Callable[[str], None]) -> None:
    fuzzer = Fuzzer(SEED, tmp_path)
    fuzzer.run(seconds=SECONDS)
    ended = ", ".join(f"{how} {count}" for how, count in sorted(fuzzer.met.items()))
    report(f"fuzzer, seed {SEED}: {fuzzer.cases} cases in {SECONDS:.0f} s; {ended}")
    assert not fuzzer.failures, "\n\n".join(fuzzer.failures)
