"""The plot of `kvmesh eval ruler`: a panel for each task, scores by length, a line per format."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvmesh.cluster.cli.eval_tables import precision_of
from kvmesh.workers.evaluation.reports import RulerReport


def plot_ruler(report: RulerReport, path: Path) -> None:
    """With standard errors; lengths are logarithmic."""
    tasks = list(dict.fromkeys(row.task for row in report.figures))
    formats = list(dict.fromkeys(row.kv_format for row in report.figures))
    lengths = sorted({row.length for row in report.figures})
    figure = Figure(figsize=(2.6 * len(tasks) + 1.4, 3.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        for name in formats:
            rows = [row for row in report.figures if (row.task, row.kv_format) == (task, name)]
            axis.errorbar(
                [row.length for row in rows],
                [row.score for row in rows],
                [row.error or 0.0 for row in rows],
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1.4,
                label=name,
            )
        axis.set_title(task, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(-0.03, 1.03)
        axis.grid(visible=True, color="#e4e8ec")
    axes[0].set_ylabel("share of the answers")
    axes[0].legend(fontsize=8)
    rope = "" if report.rope is None else f", RoPE {report.rope}"
    figure.suptitle(
        f"{report.model}, {precision_of(report)}{rope}: {report.samples} samples a point",
        fontsize=10,
    )
    figure.savefig(path, dpi=160)
