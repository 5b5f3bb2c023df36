"""What a GPU can do at most: bandwidths, the time of a kernel that does nothing; what it is."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from qplug_kernels.gpu.compat import jit, tl
from qplug_kernels.gpu.timing import Clock, measure

ROOT = Path(__file__).resolve().parents[2]

COPIED = 1 << 30
"""Bytes of the tensor that is copied and read."""

QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """What times are compared with.

    Attributes
    ----------
    copy
        Bytes a second of `copy_`, those read and those written.
    read
        Bytes a second of a kernel that reads alone.
    node
        Seconds of a kernel that does nothing, in a graph of such.
    spread
        The largest of the three spreads.
    """

    copy: float
    read: float
    node: float
    spread: float


@jit
def nothing_kernel(x):
    """Do nothing."""
    return


@jit
def read_kernel(x, sums, EACH: tl.constexpr, STEPS: tl.constexpr):
    """Read EACH * STEPS numbers and write their sum."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((EACH,), tl.float32)
    for step in range(STEPS):
        total += tl.load(x + (program * STEPS + step) * EACH + tl.arange(0, EACH))
    tl.store(sums + program, tl.sum(total, 0))


def limits(device: str, clock: Clock, nbytes: int = COPIED) -> Limits:
    """Measure a device."""
    each, steps = 4096, 16
    programs = nbytes // 4 // (each * steps)
    source = torch.ones(programs * each * steps, device=device)
    target, sums = torch.empty_like(source), torch.empty(programs, device=device)
    copy = measure([lambda: target.copy_(source)] * 4, clock)
    read = measure([lambda: read_kernel[(programs,)](source, sums, each, steps)] * 4, clock)
    node = measure([lambda: nothing_kernel[(1,)](sums)] * 200, clock)
    assert torch.all(sums == each * steps)
    spread = max(copy.spread, read.spread, node.spread)
    return Limits(
        2 * source.nbytes / copy.seconds, source.nbytes / read.seconds, node.seconds, spread
    )


def _ask(*command: str) -> str:
    """Return what a command prints, or an empty string."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def clocks() -> dict[str, str]:
    """Ask nvidia-smi; nothing is set."""
    line = _ask("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
    return dict(zip(QUERY, line.splitlines()[0].split(", "), strict=False)) if line else {}


def revision() -> str:
    """Return the commit that is measured (`QPLUG_REVISION` where there is no .git)."""
    found = _ask("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _ask("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return os.environ.get("QPLUG_REVISION", "") or (f"{found}{'+' if changed else ''}" or "unknown")


def describe(device: str) -> dict[str, object]:
    """Return what a result is worth nothing without."""
    import triton

    facts: dict[str, object] = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "revision": revision(),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "device": card.name,
            "arch": f"sm_{card.major}{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cache_bytes": card.L2_cache_size,
            "cuda": torch.version.cuda,
            "nvidia-smi": clocks(),
        }
    return facts
