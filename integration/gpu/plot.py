"""A result drawn: times by tokens, one panel for each linear of each form.

python -m integration.gpu.plot RESULT.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from . import report
from .report import Result, Row


def panels(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """Return (tokens, microseconds) in order, by form and linear, by adapter."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in sorted(rows, key=lambda row: row.tokens):
        curves = found.setdefault((row.form, row.linear), {})
        curves.setdefault(row.adapter, []).append((row.tokens, row.seconds * 1e6))
    return found


def _panel(axes: Axes, title: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in curves.items():
        tokens, times = zip(*points, strict=True)
        width = 2.0 if name == "qplug" else 1.0
        axes.plot(tokens, times, marker=".", linewidth=width, label=name)
    axes.set(title=title, xscale="log", yscale="log", xlabel="tokens", ylabel="us")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)


def draw(result: Result, path: Path) -> str:
    """Write an SVG and a PNG beside the JSON of a result; return what was written."""
    found = panels(result.rows)
    forms = list(dict.fromkeys(form for form, _ in found))
    linears = list(dict.fromkeys(linear for _, linear in found))
    if not found:
        return "nothing: no times"
    size = (4 * len(linears), 3 * len(forms))
    figure, grid = pyplot.subplots(len(forms), len(linears), figsize=size, squeeze=False)
    for at, form in enumerate(forms):
        for beside, linear in enumerate(linears):
            _panel(grid[at][beside], f"{form} {linear}", found.get((form, linear), {}))
    machine = result.machine
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    names = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for name in names:
        figure.savefig(name)
    pyplot.close(figure)
    return ", ".join(str(name) for name in names)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(report.load(Path(name)), Path(name)))
