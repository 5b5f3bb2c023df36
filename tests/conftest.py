"""Fixtures that several rooms share; what builds checkpoints is in `support/builders.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import Command, Ran
from fake_hub import FakeHub, patched
from hypothesis import settings

# Before anything imports Triton: its interpreter runs kernels where there is no GPU.
if not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("fixed", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("fixed")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of checkpoints written by real tools; read-only."""
    folder = Path(__file__).resolve().parent / "golden"
    assert folder.is_dir(), "tests/golden is part of the repository"
    return folder


@pytest.fixture
def qplug(capfd: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command line inside this process."""
    from qplug.cli import main

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        streams = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ran(code, streams.out, streams.err)

    return run


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """Return a hub that this process uses, with a token that may write to `me/…`."""
    with FakeHub() as fake, patched(fake, str(tmp_path / "home")):
        yield fake
