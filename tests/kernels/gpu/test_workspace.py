"""One piece for each stream, provided before a capture; nothing is allocated inside one."""

from __future__ import annotations

import threading

import pytest
import torch

from qplug_kernels.gpu import workspace

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def stream(monkeypatch):
    """Return a function that sets the current stream; pieces are small and counted."""
    now = {"stream": (0, False), "made": 0}

    def make(device):
        assert not now["stream"][1], "allocated under capture"
        now["made"] += 1
        return workspace.Workspace(torch.zeros(1), torch.zeros(1, dtype=torch.int32))

    monkeypatch.setattr(workspace, "_stream", lambda device: now["stream"])
    monkeypatch.setattr(workspace, "_make", make)

    def at(number, capturing=False):
        now["stream"] = (number, capturing)
        return workspace.of(DEVICE)

    at.made = lambda: now["made"]
    return at


def test_streams_do_not_share(stream):
    first = stream(1)
    assert stream(1) is first
    assert stream(2) is not first
    assert stream(1) is first


def test_a_captured_stream_takes_the_piece_that_lies_ready(stream):
    first = stream(1)
    captured = stream(7, capturing=True)
    assert captured is not first
    assert stream(7, capturing=True) is captured
    assert stream.made() == 2
    stream(1)
    assert stream.made() == 3  # the next one lies ready
    assert stream(8, capturing=True) is not captured


def test_a_second_unknown_stream_under_capture_is_an_error(stream):
    workspace.reserve(DEVICE)
    stream(7, capturing=True)
    with pytest.raises(RuntimeError, match="run the model once outside the capture"):
        stream(8, capturing=True)


def test_each_device_has_its_own(stream):
    other = workspace.of(torch.device("cuda", 1))
    assert stream(0) is not other


def test_pieces_are_allocated_in_a_thread_of_their_own(monkeypatch):
    threads = []
    allocate = workspace._allocate

    def allocated(device):
        threads.append(threading.get_ident())
        return allocate(device)

    monkeypatch.setattr(workspace, "_allocate", allocated)
    workspace.reserve(torch.device("cpu"))
    assert len(threads) == 1
    assert threads != [threading.get_ident()]


def test_what_is_provided():
    piece = workspace.of(torch.device("cpu"))
    assert piece.partial.shape == (workspace.FLOATS,)
    assert piece.count.shape == (workspace.COUNTERS,)
    assert not piece.count.any()
