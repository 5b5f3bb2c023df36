"""A fuzzer that knows the structure of checkpoints: goldens with a few things wrong, by seed.

A case is a golden, changed in one to three places (configs, headers, indexes, the tensors that
decide, bytes anywhere), and then opened, surveyed, judged, planned to every format, converted to
one and verified. What may happen is a `QplugError` with a place and a fix, or a conversion whose
proof keeps the plan's promise; nothing else, within `MOST_SECONDS` and `MOST_MEMORY`.

Case `n` of a seed is always the same: `Fuzzer(seed, folder).case(n)` meets it again.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import FrameType

from mutate import CHANGES, LATE, draft_of, goldens

from qplug.engines import ENGINES, judge, of_checkpoint
from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import MOST_CHARACTERS, QplugError
from qplug_converters.execute import execute
from qplug_converters.look import looker
from qplug_converters.plan import Verdict, Wishes, make_plan
from qplug_converters.survey import histogram, survey
from qplug_converters.verify import verify

MOST_SECONDS = 10.0
MOST_MEMORY = 2 << 30
"""Bytes of address space that a case may take beyond what is taken before it."""


class Hung(BaseException):
    """A case took longer than `MOST_SECONDS`; no `except Exception` may hide it."""


class Broken(Exception):
    """A case ended in what is no error of the input, or broke a promise."""


# One case -----------------------------------------------------------------------------------------


class Fuzzer:
    """Cases of one seed, met in a folder of their own.

    Attributes
    ----------
    met
        How many cases ended how: the module that refused them, or the verdict of what was done.
    failures
        What is wrong, with the number of the case.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.met: Counter[str] = Counter()
        self.failures: list[str] = []
        self.cases = 0

    def run(self, cases: int = 1 << 62, seconds: float = float("inf"), most: int = 20) -> None:
        """Meet cases until there were enough, time is up, or `most` failed."""
        end = time.monotonic() + seconds
        with _memory_limit(), _alarm():
            while self.cases < cases and time.monotonic() < end and len(self.failures) < most:
                try:
                    self.met[self.case(self.cases)] += 1
                except (Exception, Hung):
                    self.failures.append(
                        f"seed {self.seed} case {self.cases}:\n{traceback.format_exc()}"
                    )
                self.cases += 1

    def write(self, number: int) -> tuple[random.Random, Path]:
        """Write the checkpoint of a case; return what else the case draws from."""
        rng = random.Random(f"{self.seed}:{number}")
        source = self.folder / "source"
        for left in (source, self.folder / "target"):
            shutil.rmtree(left, ignore_errors=True)
        draft = deepcopy(draft_of(rng.choice(goldens())))
        late = rng.choice(LATE)
        for _ in range(rng.choice((1, 1, 2, 3)) if late is None else rng.choice((0, 0, 1))):
            if draft.tensors:
                rng.choice(CHANGES)(rng, draft)
        draft.save(source)
        if late is not None and draft.tensors:
            late(rng, draft, source)
        return rng, source

    def case(self, number: int) -> str:
        """Meet one case; return how it ended.

        Raises
        ------
        Exception
            Whatever is no error of the input.
        """
        rng, source = self.write(number)
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        try:
            return self._meet(rng, source)
        except QplugError as error:
            _check(error)
            return _origin(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if time.monotonic() - began > MOST_SECONDS:
                raise Hung(f"{time.monotonic() - began:.1f} s")

    def _meet(self, rng: random.Random, source: Path) -> str:
        target = self.folder / "target"
        checkpoint = open_checkpoint(source)
        found, model = checkpoint.scheme()
        facts = of_checkpoint(checkpoint, model)
        for engine in ENGINES:
            for answer in judge(engine, facts, "name"):
                answer.as_json()
        model = survey(checkpoint, found, model)
        histogram(checkpoint, found, model)
        look = looker(checkpoint, found, model)
        plans = []
        wishes = rng.choice((Wishes(), Wishes(), Wishes(), Wishes(tp=2), Wishes(sym=True)))
        for format_ in formats.FORMATS:
            plan = make_plan(found, model, format_, wishes, headers=checkpoint.headers, look=look)
            json.dumps([step.as_json() for step in plan.steps])
            _ = plan.nbytes, plan.counts
            if plan.verdict is not Verdict.IMPOSSIBLE:
                plans.append(plan)
        if not plans:
            return "impossible"
        plan = rng.choice(plans)
        try:
            execute(plan, checkpoint, target, max_shard=rng.choice((1 << 30, 50_000)))
        except QplugError:
            if target.exists() or len(list(self.folder.iterdir())) > 1:
                raise Broken("something was left behind") from None
            raise
        proof = verify(open_checkpoint(source), open_checkpoint(target))
        if proof.problems or proof.verdict > max(plan.verdict, Verdict.EXACT):
            raise Broken(f"{plan.verdict.name} was promised: {proof.as_json()}")
        return f"converted: {plan.verdict.name}"


def _check(error: QplugError) -> None:
    """Hold an error to what every error must be."""
    for one in (error, *error.others):
        if not one.where or not one.fix:
            raise Broken(f"no place or no fix: {one!r} {one.where!r} {one.fix!r}") from error
        if not str(one).isprintable() or len(str(one)) > MOST_CHARACTERS + 100:
            raise Broken(f"not one clear line: {one!r}") from error
        if "this is a bug" in one.fix:
            raise Broken(f"a plan that does not hold: {one}") from error


def _origin(error: QplugError) -> str:
    """Return the module that raised an error."""
    trace = error.__traceback__
    name = ""
    while trace is not None:
        name = Path(trace.tb_frame.f_code.co_filename).stem
        if name == "errors":
            break
        last, trace = name, trace.tb_next
    return f"refused by {last}"


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Let this process take no more than `MOST_MEMORY` beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _alarm() -> Iterator[None]:
    """Turn the alarm of a case into an exception."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hung(f"still at work after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
