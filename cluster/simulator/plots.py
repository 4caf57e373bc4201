"""Plots of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kvmesh.cluster.simulator.simulation import Run


def plot_runs(runs: Sequence[Run], path: Path) -> None:
    """Distribution of the time to the first token, a line for each policy."""
    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    for run in runs:
        times = sorted(
            seq.first_token_at - seq.request.arrival_s
            for seq in run.sequences
            if not math.isnan(seq.first_token_at)
        )
        shares = np.arange(1, len(times) + 1) / len(times)
        axes.plot(times, shares, label=run.policy)
    axes.set_xscale("log")
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("share of requests")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, xlabel: str, ylabel: str
) -> None:
    """Named curves of (x, y) points."""
    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    for name, points in curves.items():
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", markersize=3, label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
