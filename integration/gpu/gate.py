"""Nothing is timed before it was compared with float64, in a process of its own.

A process for each adapter, several at once: it compiles what it runs into the caches that the
timing will use, and a library that ends its process, or never comes back, costs its own rows alone.

    python -m integration.gpu.gate --adapter qplug --forms int4 int3 --out checked.jsonl

writes a line of JSON for each case, at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import cases
from .adapters import Adapter, Ready
from .cases import Form, Group, Linear
from .peers import ADAPTERS

PROCESSES = 12

UNFINISHED = "its check was not finished in time"

Key = tuple[str, str, str, int]


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of one adapter at one case.

    Attributes
    ----------
    adapter, form, linear, tokens
        The case.
    reason
        Why it is not timed; empty where it is.
    error
        Relative Frobenius error of the product, where there is one.
    wrong
        Whether the product was there and wrong.
    """

    adapter: str
    form: str
    linear: str
    tokens: int
    reason: str = ""
    error: float | None = None
    wrong: bool = False

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return self.adapter, self.form, self.linear, self.tokens


def judge(y: torch.Tensor, expected: torch.Tensor, bound: float) -> tuple[float, str]:
    """Return the relative error of `y`, and why it is wrong or an empty string."""
    if y.shape != expected.shape:
        return float("inf"), f"its product is {list(y.shape)}, not {list(expected.shape)}"
    error = float((y.double() - expected).norm() / expected.norm())
    if error <= bound:
        return error, ""
    return error, f"its error against float64 is {error:.1e}, above {bound:.0e}"


def said(error: BaseException) -> str:
    """Return an exception as one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def check(
    adapter: Adapter, form: Form, linear: Linear, tokens: Sequence[int], device: str
) -> Iterator[Checked]:
    """Compare one adapter with float64 at one weight."""
    names = adapter.name, form.name, linear.name
    reason = adapter.cannot(form)
    if reason:
        yield from (Checked(*names, count, reason) for count in tokens)
        return
    weight = cases.draw(form, linear, device)
    try:
        ready: Ready | None = adapter.prepare(weight, form)
    except Exception as error:  # whatever a library raises is its reason
        ready, reason = None, said(error)
    exact = weight.dequantize().double()
    for count in tokens:
        if ready is None:
            yield Checked(*names, count, reason)
            continue
        x = cases.activations(form, linear, count, device)
        expected = x.double() @ exact.T
        try:
            y = ready.call(x, ready.tensors)
            found, why = judge(y, expected, adapter.bound(form))
            yield Checked(*names, count, why, found, wrong=bool(why))
        except Exception as error:
            yield Checked(*names, count, said(error))


def work(
    adapter: Adapter, groups: Iterable[Group], device: str, tell: Callable[[Checked], None]
) -> None:
    """Check every case of an adapter, telling each result."""
    for group in groups:
        for checked in check(adapter, group.form, group.linear, group.tokens, device):
            tell(checked)


@dataclass(frozen=True, slots=True)
class Task:
    """What one process checks."""

    adapter: Adapter
    forms: tuple[Form, ...]


def split(adapters: Sequence[Adapter], forms: Sequence[Form]) -> list[Task]:
    """Share the checks among processes.

    What is compiled by Triton at each form has a process for each; others one for all their forms,
    since starting costs more than checking.
    """
    tasks = []
    for adapter in adapters:
        can = tuple(form for form in forms if adapter.cannot(form) is None)
        if adapter.side in ("qplug", "triton"):
            tasks += [Task(adapter, (form,)) for form in can]
        elif can:
            tasks.append(Task(adapter, can))
    return tasks


def expected_of(task: Task, groups: Sequence[Group]) -> list[Key]:
    """Return the keys of the results that a task is to write."""
    return [
        (task.adapter.name, group.form.name, group.linear.name, tokens)
        for group in groups
        if group.form in task.forms
        for tokens in group.tokens
    ]


def fill(found: Iterable[Checked], expected: Iterable[Key], ended: str) -> list[Checked]:
    """Return results, and `ended` as the reason of those that are missing."""
    found = {checked.key: checked for checked in found}
    return [found.get(key) or Checked(*key, ended) for key in expected]


def read(path: Path) -> list[Checked]:
    """Read what a process wrote; the last line of one that died may be cut."""
    results = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            results.append(Checked(**json.loads(line)))
        except ValueError:
            break
    return results


def run(
    tasks: Sequence[Task],
    groups: Sequence[Group],
    options: Sequence[str],
    folder: Path,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Checked]:
    """Check in processes, several at once; those that run at the deadline are ended.

    Parameters
    ----------
    options
        Passed to each process: which device, which cases.
    folder
        Where they write.
    deadline
        On `clock`.
    """
    waiting = list(enumerate(tasks))
    running: dict[int, subprocess.Popen[bytes]] = {}
    ended: dict[int, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < PROCESSES and clock() < deadline:
                at, task = waiting.pop(0)
                running[at] = _start(task, options, folder / f"{at}.jsonl")
            if clock() >= deadline:
                break
            for at, process in list(running.items()):
                if process.poll() is not None:
                    ended[at] = _how(process.returncode)
                    del running[at]
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    results = []
    for at, task in enumerate(tasks):
        why = ended.get(at, UNFINISHED)
        results += fill(read(folder / f"{at}.jsonl"), expected_of(task, groups), why)
    return results


def _start(task: Task, options: Sequence[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "integration.gpu.gate", "--adapter", task.adapter.name]
    command += ["--forms", *(form.name for form in task.forms), "--out", str(out), *options]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _how(code: int) -> str:
    """Say how a process ended that did not write all it should."""
    return f"its process ended by signal {-code}" if code < 0 else f"its process ended with {code}"


def cases_of(options: argparse.Namespace) -> list[Group]:
    """Return the cases that options name."""
    linears = cases.TINY if options.tiny else cases.LLAMA_3_8B
    return cases.plan(cases.named(options.forms), linears, options.most)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which cases, here and in `bench.py`."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small linears: to see that it works")
    parser.add_argument("--most", type=int, default=max(cases.ALL), help="tokens, at most")
    parser.add_argument(
        "--forms", nargs="+", default=[form.name for form in cases.FORMS],
        choices=[form.name for form in cases.FORMS],
    )  # fmt: skip


def main() -> None:
    """Check one adapter."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--adapter", required=True, choices=[one.name for one in ADAPTERS])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    adapter = next(one for one in ADAPTERS if one.name == options.adapter)
    with options.out.open("w") as out, torch.no_grad():

        def tell(checked: Checked) -> None:
            out.write(json.dumps(asdict(checked)) + "\n")
            out.flush()

        work(adapter, cases_of(options), options.device, tell)


if __name__ == "__main__":
    main()
