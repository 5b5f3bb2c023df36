"""Measure how kernels are best launched on this card, and write the user's table of it.

    python -m qplug_kernels.tune                                  # Llama-3-8B's linears, 4 bits
    python -m qplug_kernels.tune --linears 5120x27648 --kinds int3 nf4 --dtypes bfloat16
    python -m qplug_kernels.tune --dry-run                        # what would be measured

Linears are inputs x outputs. For each, and each bucket of tokens, the configurations around the
rule's are launched (`candidates`): one that fails to launch, whose product differs from float64 by
more than its dtype allows, or that gives two different results is refused and named. The fastest
gets a row if it saves `WORTH` of the rule's time. The table is written after every linear; rows for
other linears stay in it. Nothing is tuned while serving: a process reads the table once
(`gpu/tables.py`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qplug_converters.formats.bnb_4bit import TABLES
from qplug_converters.weight import AffineGrid, CodebookGrid, QuantizedWeight, RowGrid

from .gpu import affine, codebook, configs, rows, tables, timing
from .gpu.configs import Card, Config
from .gpu.planes import Tiled
from .gpu.tables import Row, Table
from .problem import Kernel, Problem

WORTH = 0.03
"""Part of the rule's time that a row must save: below, it is noise."""

BOUND = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative Frobenius error of a product."""

LINEARS = ("4096x6144", "4096x4096", "4096x28672", "14336x4096")
KINDS = ("int2", "int3", "int4", "int8", "nf4", "int8-rows")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Tuned:
    """A kernel whose launches can be configured.

    Attributes
    ----------
    kernel
        As selection knows it.
    form
        Reads the layout of its operands.
    launch
        Launches it with a configuration.
    choose
        Its configuration without any table.
    """

    kernel: Kernel
    form: Callable[[Sequence[Tensor]], Tiled]
    launch: Callable[[Tensor, Sequence[Tensor], Tensor | None, Config], Tensor]
    choose: Callable[[Tiled, int, Card], Config]


def _codebook_rule(form: Tiled, tokens: int, card: Card) -> Config:
    return codebook.settled(configs.rule(form, tokens, card))


AFFINE = Tuned(affine.KERNEL, affine.Form.of, affine.launch, configs.rule)
CODEBOOK = Tuned(codebook.KERNEL, codebook.Form.of, codebook.launch, _codebook_rule)
ROWS = Tuned(rows.KERNEL, rows.Form.of, rows.launch, configs.rule)


def draw(kind: str, inputs: int, outputs: int, group: int, device: str) -> QuantizedWeight:
    """Return a random weight of a kind."""
    bits = 4 if kind == "nf4" else int(kind[3])
    codes = torch.randint(1 << bits, (outputs, inputs), dtype=torch.uint8, device=device)
    if kind == "int8-rows":
        return QuantizedWeight(codes, 8, RowGrid(torch.rand(outputs, device=device) + 0.5))
    if kind == "nf4":
        table = torch.frombuffer(bytearray(TABLES["nf4"]), dtype=torch.float32).to(device)
        absmax = torch.rand(-(-inputs * outputs // 64), device=device) + 0.5
        return QuantizedWeight(codes, 4, CodebookGrid(table, absmax, 64))
    shape = (outputs, -(-inputs // group))
    scales = (torch.rand(shape, device=device) + 0.5).half() / 64
    zeros = torch.randint(1 << bits, shape, dtype=torch.int16, device=device)
    return QuantizedWeight(codes, bits, AffineGrid(scales, zeros, group))


def tuned_of(kind: str) -> Tuned:
    """Return the kernel that multiplies a kind."""
    return {"nf4": CODEBOOK, "int8-rows": ROWS}.get(kind, AFFINE)


def candidates(form: Tiled, base: Config, card: Card) -> list[Config]:
    """Return configurations around the rule's, itself first, that a card has the memory for."""
    warps = (2, 4) if base.warps == 4 else (base.warps,)
    splits = {max(1, base.splits * part // 4) for part in (1, 2, 3, 4, 6, 8, 12, 16)}
    found = [base] + [
        replace(base, splits=split, warps=warp, stages=stages, joined=joined)
        for stages in (base.stages, 2, 3, 4, 5)
        for warp in warps
        for joined in (base.joined, not base.joined)
        for split in sorted(splits)
        if split <= form.tiles[1]
    ]
    return [
        config
        for config in dict.fromkeys(found)
        if config == base or configs.shared_bytes(form, config.tokens, config.stages) <= card.shared
    ]


@dataclass(frozen=True, slots=True)
class Job:
    """A prepared linear and activations, to be launched in different ways."""

    tuned: Tuned
    form: Tiled
    operands: Sequence[Tensor]
    x: Tensor
    expected: Tensor

    def refusal(self, config: Config) -> str | None:
        """Launch once or twice; say what is wrong with a configuration."""
        try:
            first, second = (self.launch(config) for _ in range(2))
            error = float((first.double() - self.expected).norm() / self.expected.norm())
        except Exception as raised:  # the compiler, the driver: whatever it is, this one is out
            return f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        if not error <= BOUND[self.x.dtype]:
            return f"its error against float64 is {error:.1e}"
        return None if torch.equal(first, second) else "two results differ"

    def launch(self, config: Config) -> Tensor:
        """Multiply."""
        return self.tuned.launch(self.x, self.operands, None, config)

    def seconds(self, config: Config, clock: timing.Clock) -> float:
        """Return the time of one launch."""

        def call(operands: Sequence[Tensor]) -> Tensor:
            return self.tuned.launch(self.x, operands, None, config)

        return timing.measure(timing.rotate(call, self.operands), clock).seconds


def best(
    job: Job,
    found: Sequence[Config],
    clock: timing.Clock,
    tell: Callable[[str], None],
    late: Callable[[], bool] = lambda: False,
) -> tuple[Config, float, float] | None:
    """Return the fastest configuration that is right, its seconds, and those of the first.

    The clock decides among the steps of splits, warps and stages one after the other, so that not
    every combination is measured. `None` if the first itself is refused.
    """
    base, *others = found
    if why := job.refusal(base):
        tell(f"the rule's own configuration is refused: {why}")
        return None
    measured = {base: job.seconds(base, clock)}
    winner = base
    for names in (("splits",), ("warps", "joined"), ("stages",), ("splits",)):
        steps = [config for config in others if _differs(config, winner) <= set(names)]
        for config in steps:
            if config in measured or late():
                continue
            if why := job.refusal(config):
                tell(f"{config} is refused: {why}")
                measured[config] = float("inf")
                continue
            measured[config] = job.seconds(config, clock)
        winner = min(measured, key=lambda config: measured[config])
    return winner, measured[winner], measured[base]


def _differs(one: Config, other: Config) -> set[str]:
    return {name for name in tables.SETS if getattr(one, name) != getattr(other, name)}


def merged(old: Sequence[Row], new: Sequence[Row], asked: Sequence[dict[str, object]]) -> list[Row]:
    """Return new rows before old ones; old rows for what was measured again are dropped."""
    kept = [
        row
        for row in old
        if not any(all(getattr(row, key) == value for key, value in one.items()) for one in asked)
    ]
    return [*new, *kept]


@dataclass(frozen=True, slots=True)
class Linear:
    """What is measured."""

    kind: str
    inputs: int
    outputs: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kind} {self.inputs}x{self.outputs} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Session:
    """How it is measured: group size of integers, device, clock, when it is late, who is told."""

    group: int
    device: str
    clock: timing.Clock
    late: Callable[[], bool]
    tell: Callable[[str], None]

    @property
    def card(self) -> Card:
        """The card."""
        return configs.card(torch.device(self.device))

    def job(self, linear: Linear, tokens: int) -> Job:
        """Prepare a linear as selection would.

        Raises
        ------
        ValueError
            If its kernel cannot multiply it, with the reason.
        """
        weight = draw(linear.kind, linear.inputs, linear.outputs, self.group, self.device)
        tuned = tuned_of(linear.kind)
        problem = replace(Problem.here(weight, linear.dtype, self.device), device="cuda")
        if reason := tuned.kernel.cannot(problem):
            raise ValueError(reason)
        operands = list(tuned.kernel.prepare(weight, problem).values())
        x = torch.randn(tokens, linear.inputs, device=self.device).to(linear.dtype)
        expected = x.double() @ weight.dequantize().double().T
        return Job(tuned, tuned.form(operands), operands, x, expected)

    def measure(self, linear: Linear) -> Iterator[tuple[Row | None, dict[str, object]]]:
        """Return a row, or none where the rule is best, for each bucket of tokens."""
        for tokens in tables.BUCKETS:
            if self.late():
                return
            try:
                job = self.job(linear, tokens)
            except ValueError as error:
                self.tell(f"{linear}: {error}")
                return
            base = job.tuned.choose(job.form, tokens, self.card)
            ways = candidates(job.form, base, self.card)
            found = best(job, ways, self.clock, self.tell, self.late)
            if found is None:
                continue
            config, seconds, before = found
            saved = 1 - seconds / before
            self.tell(
                f"{linear}, {tokens} tokens: {before * 1e6:.2f} us, {saved:.0%} saved by {config}"
            )
            purpose = tables.purpose(job.form, tokens)
            row = None
            if saved >= WORTH:
                values = {key: getattr(config, key) for key in tables.SETS}
                row = Row(**purpose, **values, microseconds=seconds * 1e6, rule=before * 1e6)
            yield row, purpose


def tune(wanted: Sequence[Linear], session: Session, path: Path) -> Table:
    """Measure linears, and write the table as it grows."""
    card = session.card
    here = card.arch, card.multiprocessors, tables.version()
    old = _known(path, card)
    new: list[Row] = []
    asked: list[dict[str, object]] = []
    for linear in wanted:
        if session.late():
            session.tell("no time is left: the rest is not measured")
            break
        for row, purpose in session.measure(linear):
            asked.append(purpose)
            new += [row] if row is not None else []
        tables.write(path, Table(*here, tuple(merged(old, new, asked))))
    return Table(*here, tuple(merged(old, new, asked)))


def _known(path: Path, card: Card) -> tuple[Row, ...]:
    """Return the rows of the table that is there, if they are for this card and this Triton."""
    if not path.exists():
        return ()
    table = tables.read(path)
    return table.rows if tables.fits(table, card.arch, card.multiprocessors) else ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune this machine's card."""
    parser = argparse.ArgumentParser(
        prog="python -m qplug_kernels.tune", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--linears", nargs="+", default=LINEARS, help="inputs x outputs")
    parser.add_argument("--kinds", nargs="+", default=["int4"], choices=KINDS)
    parser.add_argument("--dtypes", nargs="+", default=["float16"], choices=list(DTYPES))
    parser.add_argument("--group-size", type=int, default=128, help="of integers")
    parser.add_argument("--seconds", type=float, default=480, help="stop after so long")
    parser.add_argument("--out", type=Path, default=tables.user_file())
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")
    options = parser.parse_args(arguments)
    try:
        sizes = [tuple(map(int, linear.split("x"))) for linear in options.linears]
        pairs = [(inputs, outputs) for inputs, outputs in sizes]
    except ValueError:
        parser.error(f"--linears: inputs x outputs, such as 4096x6144, not {options.linears}")
    wanted = [
        Linear(kind, inputs, outputs, DTYPES[dtype])
        for kind in options.kinds
        for dtype in options.dtypes
        for inputs, outputs in pairs
    ]
    if options.dry_run:
        for linear in wanted:
            print(f"{linear}, {', '.join(map(str, tables.BUCKETS))} tokens")
        print(f"would be written to {options.out}")
        return 0
    if not torch.cuda.is_available():
        print("tune: this machine has no CUDA device", file=sys.stderr)
        return 1
    end = time.monotonic() + options.seconds
    session = Session(
        options.group_size, "cuda", timing.graph_clock, lambda: time.monotonic() > end,
        lambda line: print(line, flush=True),
    )  # fmt: skip
    table = tune(wanted, session, options.out)
    print(f"{len(table.rows)} rows in {options.out}; processes that start from now on use them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
