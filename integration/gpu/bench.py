"""How fast qplug multiplies on a GPU, beside everything else that is there: one command.

    make bench-gpu          # at most 9 minutes; needs torch, Triton, NumPy and einops
    python -m integration.gpu --tiny --device cpu

Order: versions and clocks; bandwidths and the time of an empty kernel; every case of every adapter
compared with float64 in processes of their own, which compiles what will be timed; times, the most
important first, until there is no time left. What was measured is written after every weight.

The exit code is 1 where qplug multiplied wrongly, and 0 whatever the times are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from datetime import date
from pathlib import Path

import torch

from qplug_kernels.gpu.timing import Call, Clock, graph_clock, measure, rotate

from . import cases, gate, machine, report
from .adapters import Adapter
from .cases import Group
from .gate import Checked, Key, said
from .peers import ADAPTERS
from .report import Result, Row

LIMIT = 510.0
"""Seconds of a run: 9 minutes less half a one to end in."""

CHECKS = 0.5
"""Share of them that the checks may take."""


def call_clock(calls: Sequence[Call]) -> list[float]:
    """Time calls one after the other, where there are no graphs."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - begin) / len(calls))
    return times


def time_group(
    group: Group, adapter: Adapter, right: Collection[Key], device: str, clock: Clock
) -> tuple[list[Row], list[Checked]]:
    """Time one adapter at one weight; return rows, and reasons of what failed at last."""
    form, linear = group.form, group.linear
    names = adapter.name, form.name, linear.name
    tokens = [count for count in group.tokens if (*names, count) in right]
    rows: list[Row] = []
    failed: list[Checked] = []
    if not tokens:
        return rows, failed
    try:
        ready = adapter.prepare(cases.draw(form, linear, device), form)
    except Exception as error:
        return rows, [Checked(*names, count, said(error)) for count in tokens]
    for count in tokens:
        x = cases.activations(form, linear, count, device)

        def multiply(tensors: Sequence[torch.Tensor], x: torch.Tensor = x) -> torch.Tensor:
            return ready.call(x, tensors)

        try:
            measured = measure(rotate(multiply, ready.tensors), clock)
        except Exception as error:
            failed.append(Checked(*names, count, f"while timed: {said(error)}"))
            continue
        product = count * linear.out_features * form.dtype.itemsize
        nbytes = ready.nbytes + x.nbytes + product
        times = measured.seconds, measured.spread
        rows.append(
            Row(adapter.name, adapter.side.value, ready.detail, *names[1:], count, *times, nbytes)
        )
    return rows, failed


def alive(device: str) -> bool:
    """Whether a device still computes: an illegal access ends all work of its process."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False


def time_all(
    groups: Sequence[Group],
    adapters: Sequence[Adapter],
    result: Result,
    device: str,
    clock: Clock,
    late: Callable[[], bool],
    keep: Callable[[], None],
) -> None:
    """Time what was found right, into `result`, until it is late."""
    right = {checked.key for checked in result.checked if not checked.reason}
    dead = False
    for group in groups:
        for adapter in adapters:
            if dead or late():
                result.dropped += [
                    f"{adapter.name} {group.form.name} {group.linear.name} {count}"
                    for count in group.tokens
                    if (adapter.name, group.form.name, group.linear.name, count) in right
                ]
                continue
            rows, failed = time_group(group, adapter, right, device, clock)
            result.rows += rows
            result.checked += failed
            if failed and not alive(device):
                result.dropped.append(f"{adapter.name} broke the device: nothing ran after it")
                dead = True
        keep()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    gate.add_options(parser)
    parser.add_argument("--seconds", type=float, default=LIMIT, help="for all of it")
    parser.add_argument("--out", type=Path, help="a JSON file; a plot is written beside it")
    parser.add_argument(
        "--adapters", nargs="+", default=[one.name for one in ADAPTERS],
        choices=[one.name for one in ADAPTERS],
    )  # fmt: skip
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench-gpu: this machine has no CUDA device", file=sys.stderr)
        return 2
    adapters = [one for one in ADAPTERS if one.name in options.adapters]
    groups = gate.cases_of(options)
    result = Result(machine.describe(options.device))
    path = options.out or _path(result)
    clock = graph_clock if options.device == "cuda" else call_clock

    def keep() -> None:
        result.seconds = time.monotonic() - begin
        report.save(result, path)

    with torch.no_grad():
        size = {"nbytes": 1 << 20} if options.tiny else {}
        result.limits = machine.limits(options.device, clock, **size)
        keep()
        result.checked = _check(adapters, groups, options, begin)
        keep()
        end = begin + options.seconds
        time_all(
            groups, adapters, result, options.device, clock, lambda: time.monotonic() > end, keep
        )
    keep()
    print(report.show(result))
    print(f"written to {path}")
    _plot(path)
    for wrong in result.wrong:
        print(f"qplug is wrong: {wrong}", file=sys.stderr)
    return 1 if result.wrong else 0


def _check(
    adapters: Sequence[Adapter],
    groups: Sequence[Group],
    options: argparse.Namespace,
    begin: float,
) -> list[Checked]:
    """Compare everything with float64, in processes."""
    forms = cases.named(options.forms)
    passed = ["--device", options.device, "--most", str(options.most)]
    passed += ["--tiny"] if options.tiny else []
    none = [
        Checked(adapter.name, form.name, "", 0, reason)
        for adapter in adapters
        for form in forms
        if (reason := adapter.cannot(form)) is not None
    ]
    with tempfile.TemporaryDirectory(prefix="qplug-gate-") as folder:
        deadline = begin + CHECKS * options.seconds
        tasks = gate.split(adapters, forms)
        return none + gate.run(tasks, groups, passed, Path(folder), deadline)


def _path(result: Result) -> Path:
    """Return where results of a device lie."""
    device = str(result.machine["device"]).lower().replace(" ", "-")
    folder = machine.ROOT / "build" / "bench-gpu"
    return folder / f"{device}-{date.today():%Y-%m-%d}.json"


def _plot(path: Path) -> None:
    """Draw a result where matplotlib is installed."""
    try:
        from . import plot
    except ImportError as error:
        print(f"no plot: {said(error)}")
        return
    print(f"drawn to {plot.draw(report.load(path), path)}")
