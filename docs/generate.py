"""Write the pages of docs/ that follow from the code; `--check` says whether they are true."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import click

import qplug.cli
from qplug.cli import COMMANDS
from qplug.engines import ENGINES, Engine, Rule
from qplug_converters import zeros
from qplug_converters.format import Format
from qplug_converters.formats import FORMATS
from qplug_converters.layout import Part
from qplug_converters.matrix import describe, grid, matrix
from qplug_converters.scheme import Kind, Scheme

HERE = Path(__file__).parent
HEAD = "<!-- Written by `make docs` from the code: do not edit. -->\n\n"


def part_row(part: Part) -> str:
    """Return one stored tensor as a table row."""
    axes = [f"{n}/{part.packing.factor}" if part.packing and i == part.packed_axis else n
            for i, n in enumerate(part.axes)]  # fmt: skip
    order = part.packing.order if part.packing else ()
    notes = [f"order {' '.join(map(str, order))}"] if order else []
    notes += [f"zero rule `{part.rule}`"] if part.rule != "as_is" else []
    pattern = f"`{part.stream}`" + (f", `{part.stored}`" if part.stored else "")
    if part.constant:
        axes, pattern = [str(n) for n in part.constant_shape], "always the same for a scheme"
    return (
        f"| `{part.name}` | {part.holds.value} | {part.dtype} | [{', '.join(axes)}] "
        f"| {pattern} | {'; '.join(notes)} |"
    )


def format_section(one: Format) -> str:
    """Return what a format is: its docstring, its capacity, its layout."""
    module = inspect.getmodule(one.claims)
    assert module is not None
    doc = inspect.cleandoc(module.__doc__ or "")
    first = next(known for known in FORMATS if inspect.getmodule(known.claims) is module)
    if first is not one:
        doc = f"As [{first.name}](#{first.name}), of which it shares the description."
    lines = [f"## {one.name}", "", doc, ""]
    holds = one.capacity
    bits = 4
    if holds is not None:
        bits = min(holds.bits, key=lambda n: abs(n - 4))
        facts = [f"{', '.join(map(str, holds.bits))} bits"]
        if holds.kind is Kind.AFFINE:
            low, high = holds.zeros(bits)
            facts += [
                f"zeros {low} to {high} at {bits} bits",
                f"act order: {'yes' if holds.act_order else 'no'}",
                f"short last group: {'yes' if holds.ragged else 'no'}",
            ]
        else:
            facts.append(f"{holds.kind.value} grids")
        if holds.group_sizes:
            facts.append(f"groups of {', '.join(map(str, holds.group_sizes))}")
        lines += [f"Holds: {'; '.join(facts)}; scales {', '.join(holds.scale_dtypes)}.", ""]
    scheme = one.adopt(Scheme(4096, 4096, bits, 128, act_order=bool(holds and holds.act_order)))
    lines += [
        f"Layout at {bits} bits:",
        "",
        "| tensor | holds | dtype | shape | patterns | |",
        "|---|---|---|---|---|---|",
        *(part_row(part) for part in one.layout(scheme)),
        "",
    ]
    return "\n".join(lines)


def formats_page() -> str:
    """Return docs/formats.md."""
    intro = (
        "# Formats\n\nA stored tensor is described by two einops patterns around a little-endian "
        "bit stream: canonical axes to rows of codes, and rows of words to the tensor "
        "(`qplug_converters/layout.py`).\n\n"
    )
    rules = ["## Zero rules of GPTQ v1", "", "| rule | stored zero to zero |", "|---|---|"]
    rules += [f"| `{name}` | {rule.summary} |" for name, rule in zeros.RULES.items()]
    return HEAD + intro + "\n".join(map(format_section, FORMATS)) + "\n".join(rules) + "\n"


def matrix_page() -> str:
    """Return docs/matrix.md."""
    intro = (
        "# What becomes of each format in each other one\n\n"
        "From the code that plans conversions (`qplug formats --matrix`). COPIED: the same bytes. "
        "EXACT: the same weights, bit for bit. ROUNDED: within a bound that the plan states. "
        "REQUANTIZED: new codes by least squares, the error measured; needs `--allow requantized`. "
        "IMPOSSIBLE: no way. The usual linear is symmetric, with groups that suit the format.\n\n"
    )
    heads, cells = grid()
    table = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    table += [f"| {' | '.join(row)} |" for row in cells]
    table.append(
        "\nA cell has the usual linear, then the worst of others: C copied, E exact, R rounded, "
        "Q requantized, I impossible.\n\n## Pair by pair\n"
    )
    found = matrix()
    rows = [*table, "| from | to | usual | otherwise |", "|---|---|---|---|"]
    for (source, target), cell in found.items():
        usual, _, others = describe(cell).partition("; ")
        rows.append(f"| {source} | {target} | {usual} | {others} |")
    return HEAD + intro + "\n".join(rows) + "\n"


def cli_page() -> str:
    """Return docs/cli.md."""
    group = qplug.cli.group
    pages = [HEAD + "# Command line\n"]
    context = click.Context(group, info_name="qplug", terminal_width=90)
    pages.append(f"```\n{group.get_help(context)}\n```\n")
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        own = click.Context(command, info_name=name, parent=context, terminal_width=90)
        pages.append(f"## qplug {name}\n\n```\n{command.get_help(own)}\n```\n")
    return "\n".join(pages)


def engine_section(engine: Engine) -> str:
    """Return the rules of one engine; formats with the same rules share a table."""
    lines = [f"## {engine.title}", "", f"Versions {engine.first} to {engine.last}.", ""]
    shared: dict[tuple[Rule, ...], list[str]] = {}
    for name, rules in engine.rules.items():
        shared.setdefault(rules, []).append(f"`{name}`")
    for rules, names in shared.items():
        lines += [
            f"{', '.join(names)}:",
            "",
            "| with | versions | answer | a config can cure it | known from |",
            "|---|---|---|---|---|",
            *(rule_row(rule) for rule in rules),
            "",
        ]
    return "\n".join(lines)


def rule_row(rule: Rule) -> str:
    """Return one rule as a table row."""
    since = f"from {rule.since}" if rule.since else ""
    until = f"before {rule.until}" if rule.until else ""
    span = " ".join(part for part in (since, until) if part) or "all"
    cure = "yes, where it is true" if rule.repair is not None else ""
    return f"| {rule.what} | {span} | {rule.outcome.value} | {cure} | {rule.source} |"


def engines_page() -> str:
    """Return docs/engines.md."""
    intro = """# Engines

What engines do with the checkpoints that qplug reads, as `qplug inspect` answers for one of them.
The first rule that holds for a version and whose left column is true of a checkpoint decides; of
other formats nothing is claimed. Where a config can cure a refusal, `qplug convert --for` copies
the tensors and states the truth. Source: `qplug/engines/`.

"""
    return HEAD + intro + "\n".join(map(engine_section, ENGINES)).rstrip() + "\n"


PAGES = {
    "formats.md": formats_page,
    "matrix.md": matrix_page,
    "cli.md": cli_page,
    "engines.md": engines_page,
}


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"docs/{', docs/'.join(stale)}: not what the code says; run `make docs`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
