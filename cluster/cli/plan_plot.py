"""The plot of plans: the longest context by bits, a line for each layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kvmesh.cluster.planner.model import PlannedModel
from kvmesh.cluster.planner.plan import Plan, Target
from kvmesh.cluster.simulator.hardware import Gpu


def plot_plans(
    model: PlannedModel, gpu: Gpu, plans: Sequence[Plan], target: Target, path: Path
) -> None:
    """Dashed lines: layouts that this version does not serve."""
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    for layout in dict.fromkeys(plan.layout for plan in plans):
        rows = sorted(
            (plan for plan in plans if plan.layout == layout and plan.longest),
            key=lambda plan: plan.bits,
        )
        axes.plot(
            [plan.bits for plan in rows],
            [plan.longest for plan in rows],
            label=str(layout),
            marker="o",
            markersize=4,
            linestyle="-" if layout.kvp == 1 else "--",
        )
    axes.axhline(target.context, color="#66727f", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("bits per key or value element of a sealed page")
    axes.set_ylabel("tokens of the longest sequence")
    axes.set_title(f"{model.name} on {gpu.name}", loc="left")
    axes.grid(visible=True, alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=140)
