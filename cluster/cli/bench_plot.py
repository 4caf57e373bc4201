"""The plot of a run of `kvmesh bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvmesh.cluster.bench.load import ReplyRecord
from kvmesh.cluster.bench.report import MEASURES, LoadReport, samples_of

_INK, _MUTED, _GRID = "#1c2733", "#66727f", "#e4e8ec"
_COLOURS = {"ttft": "#1f6feb", "tpot": "#d1242f", "itl": "#bf8700", "e2e": "#1a7f37"}
_BINS = 60


def plot_load(records: Sequence[ReplyRecord], report: LoadReport, server: str, path: Path) -> None:
    """Distributions of the latencies, and output and running requests over time."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _distributions(left, records)
    _over_time(right, records, report.duration_s)
    figure.suptitle(
        f"{server}: {report.complete} requests, {report.request_rps:.2f}/s, "
        f"{report.output_tokens_per_s:,.0f} output tokens/s",
        x=0.01,
        ha="left",
        color=_INK,
        fontsize=11,
        fontweight="bold",
    )
    figure.savefig(path, dpi=130)


def _distributions(axes: Axes, records: Sequence[ReplyRecord]) -> None:
    for name, samples in samples_of(records).items():
        if samples:
            times = np.sort(np.asarray(samples)) * 1e3
            shares = np.arange(1, len(times) + 1) / len(times)
            axes.step(times, shares, where="post", color=_COLOURS[name], linewidth=1.8,
                      label=f"{name.upper()}, {MEASURES[name]}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.set_xlabel("milliseconds", color=_INK)
    axes.set_ylabel("share that took at most this", color=_INK)
    _frame(axes)


def _over_time(axes: Axes, records: Sequence[ReplyRecord], duration_s: float) -> None:
    edges = np.linspace(0.0, max(duration_s, 1e-9), _BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    times = np.concatenate([np.asarray(record.chunk_s) for record in records] or [np.zeros(0)])
    per_chunk = sum(record.output_tokens for record in records) / max(len(times), 1)
    rate = np.histogram(times, edges)[0] * per_chunk / np.diff(edges)
    starts = np.array([record.due_s for record in records])
    ends = np.array([duration_s if x.ended_s is None else x.ended_s for x in records])
    running = [int(((starts <= at) & (ends > at)).sum()) for at in middles]
    axes.fill_between(middles, rate, step="mid", color="#1f6feb", alpha=0.25, linewidth=0)
    axes.step(middles, rate, where="mid", color="#1f6feb", label="output tokens/s (left)")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds", color=_INK)
    other = axes.twinx()
    other.step(middles, running, where="mid", color="#d1242f", label="requests running (right)")
    other.set_ylim(bottom=0)
    other.tick_params(colors=_MUTED, labelsize=9)
    other.spines[["top", "left"]].set_visible(False)
    _frame(axes)
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [str(x.get_label()) for x in lines], fontsize=8.5, frameon=False)


def _frame(axes: Axes) -> None:
    axes.grid(visible=True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_MUTED, labelsize=9)
    axes.legend(fontsize=8.5, edgecolor="none")
