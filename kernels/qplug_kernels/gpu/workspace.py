"""Memory for partial sums: one piece for each stream of a device, none allocated under capture.

Programs that split K leave partial sums there and count themselves; the counters are zero between
launches, since the last program to arrive sets its own back. Two streams that shared a piece would
add each other's sums. A graph keeps the piece of the stream it was captured on: two graphs captured
on one stream must not be replayed at the same time.

A stream met while it is captured gets a piece that lies ready: a linear that is prepared, and every
call outside a capture, provide one more than the streams that are known.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

FLOATS = 1 << 22
"""Of partial sums: 16 MB."""

COUNTERS = 1 << 16
"""Tiles of one launch that may split K."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """`partial` float32 `[FLOATS]`, any numbers; `count` int32 `[COUNTERS]`, zeros."""

    partial: Tensor
    count: Tensor


_OF_STREAM: dict[tuple[torch.device, int], Workspace] = {}
_READY: dict[torch.device, list[Workspace]] = {}
_LOCK = Lock()


def _make(device: torch.device) -> Workspace:
    """Allocate in a thread of its own.

    While `torch.compile(mode="reduce-overhead")` runs a graph for the first time, what this thread
    allocates belongs to the graph, which refuses memory that outlives it.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_allocate, device).result()


def _allocate(device: torch.device) -> Workspace:
    partial = torch.empty(FLOATS, dtype=torch.float32, device=device)
    count = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # another stream may take the piece
    return Workspace(partial, count)


def _stream(device: torch.device) -> tuple[int, bool]:
    """Return the current stream, and whether it is being captured."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def reserve(device: torch.device) -> None:
    """Provide a piece that the next unknown stream will take."""
    ready = _READY.setdefault(device, [])
    if not ready:
        ready.append(_make(device))


def of(device: torch.device) -> Workspace:
    """Return the piece of the current stream.

    Raises
    ------
    RuntimeError
        If a second unknown stream is captured before anything ran outside a capture.
    """
    stream, capturing = _stream(device)
    found = _OF_STREAM.get((device, stream))
    if found is None:
        with _LOCK:
            found = _OF_STREAM.get((device, stream))
            if found is None:
                found = _OF_STREAM[device, stream] = _take(device, capturing)
    if not capturing and not _READY.get(device):
        with _LOCK:
            reserve(device)
    return found


def _take(device: torch.device, capturing: bool) -> Workspace:
    if not capturing:
        reserve(device)
    ready = _READY.get(device)
    if not ready:
        raise RuntimeError(
            f"no workspace is ready on {device} for a stream that is being captured: run the "
            "model once outside the capture, after each new stream"
        )
    return ready.pop()


def forget() -> None:
    """Drop all pieces: after a launch that did not end, counters may not be zero."""
    _OF_STREAM.clear()
    _READY.clear()
