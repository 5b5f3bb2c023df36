"""What the tests of this folder share: without a GPU, tests that need one are skipped.

With QPLUG_REQUIRE_GPU=1, as `make test-gpu` sets it, they fail instead.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# Before anything imports Triton: its interpreter runs kernels where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REASON = "this machine has no CUDA device"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("QPLUG_REQUIRE_GPU") == "1":
        pytest.fail(f"QPLUG_REQUIRE_GPU=1: {REASON}", pytrace=False)
    pytest.skip(REASON)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say last what did not run on a card although there is one: a tool was missing."""
    if torch.cuda.is_available():
        for report in terminalreporter.stats.get("skipped", ()):
            terminalreporter.write_line(f"not run: {report.nodeid}: {report.longrepr[2]}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the card."""
    return torch.device("cuda", torch.cuda.current_device())
