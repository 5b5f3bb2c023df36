"""What counts as a usable stock backend: the package, its metadata, and the oldest version."""

import importlib.util
from importlib import metadata

import pytest

from qplug.transformers import compat


@pytest.fixture
def installed(monkeypatch):
    found = {}

    def version(name):
        if found.get(name) is None:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(metadata, "version", version)
    return found


def test_usable(installed):
    installed.update(optimum="2.0.0", gptqmodel="7.7.0")
    assert compat.stock_lacks("gptq") is None


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        ({}, "optimum is not installed"),
        ({"optimum": "2.0.0"}, "gptqmodel is not installed"),
        ({"optimum": "2.0.0", "gptqmodel": "1.4.2"}, "gptqmodel 1.4.2 is older than 1.4.3"),
        ({"optimum": "1.9", "gptqmodel": "7.7.0"}, "optimum 1.9 is older than 1.24.0"),
        # `optimum-quanto` alone makes a namespace package `optimum` without its metadata.
        ({"optimum": None, "gptqmodel": "7.7.0"}, "optimum has no usable metadata"),
    ],
)
def test_unusable(installed, packages, reason):
    installed.update(packages)
    assert compat.stock_lacks("gptq") == reason
