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


MEASURES = {
    "goodput": "share within the objective",
    "ttft_p99_s": "TTFT p99, s",
    "tpot_p99_s": "TPOT p99, s",
}


def plot_families(
    curves: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], folder: Path
) -> None:
    """A figure for each workload: its families below each other, three measures by load.

    curves: by family and policy, points with `load` and the measures
    """
    workloads = sorted({family.split("-")[0] for family in curves})
    for workload in workloads:
        families = [name for name in curves if name.startswith(f"{workload}-")]
        figure = Figure(figsize=(12, 3 * len(families)), layout="constrained")
        grid = figure.subplots(len(families), len(MEASURES), squeeze=False, sharex=True)
        for row, family in zip(grid, families, strict=True):
            for axes, (measure, label) in zip(row, MEASURES.items(), strict=True):
                for name, points in curves[family].items():
                    own = name == "kvmesh"
                    axes.plot(
                        [point["load"] for point in points],
                        [point[measure] for point in points],
                        label=name,
                        linewidth=2.5 if own else 1.0,
                        color="black" if own else None,
                        zorder=3 if own else 2,
                    )
                if measure == "ttft_p99_s":
                    axes.set_yscale("log")
                else:
                    axes.set_ylim(bottom=0.0)
                axes.set_title(f"{family}: {label}", fontsize="medium")
                axes.grid(visible=True, alpha=0.3)
        for axes in grid[-1]:
            axes.set_xlabel("load")
        grid[0][0].legend(fontsize="small")
        figure.savefig(folder / f"routing-{workload}.png", dpi=64)
