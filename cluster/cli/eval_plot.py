"""The picture of an evaluation: what formats cost against what they take."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvmesh.workers.evaluation.perplexity import PerplexityReport

# A loss below this is within what the choice of text makes of it, and can be negative.
FLOOR_PERCENT = 0.01
_INK, _MUTED, _POINT = "#1c2733", "#6b7785", "#1f6feb"


def plot_perplexity(report: PerplexityReport, path: Path) -> None:
    """A point a format: bits per element at the context measured, loss in per cent."""
    rows = report.formats[1:]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    for row in rows:
        loss = row.loss * 100
        floored = loss < FLOOR_PERCENT
        axes.plot(
            row.bits,
            max(loss, FLOOR_PERCENT),
            marker="v" if floored else "o",
            markersize=8,
            markerfacecolor="white" if floored else _POINT,
            markeredgecolor=_POINT,
            markeredgewidth=1.6,
            zorder=3,
        )
        axes.annotate(
            row.kv_format,
            (row.bits, max(loss, FLOOR_PERCENT)),
            xytext=(8, 5),
            textcoords="offset points",
            color=_INK,
            fontsize=10,
        )
    _frame(axes, report)
    figure.savefig(path, dpi=160)
