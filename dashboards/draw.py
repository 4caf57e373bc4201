"""Draws dashboards from a Prometheus server's data, as pictures for the docs."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from dashboards.panels import Dashboard, Panel
from dashboards.prometheus import Prometheus

COLUMNS = 3
SIZE_INCHES, DPI = (3.6, 2.0), 70
COLOURS = 64
LEGEND_ROOM = 1.35
SECONDS = ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s"))
SCALES = {"bytes": (1 << 20, " MiB"), "Bps": (1 << 20, " MiB/s"), "percentunit": (0.01, "%")}


def draw(dashboard: Dashboard, server: Prometheus, path: Path, window_s: float) -> None:
    """All timeseries panels that have data, to a PNG."""
    panels = [x for x in dashboard.panels if x.kind == "timeseries"]
    found = {
        panel: {
            _legend(query.legend, series.labels): series.values
            for query in panel.queries
            for series in server.ask(query.expr, window_s=window_s)
        }
        for panel in panels
    }
    shown = [panel for panel in panels if found[panel]]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * SIZE_INCHES[0], rows * SIZE_INCHES[1]), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    axes = list(grid.flat)
    now = time.time()
    for panel, ax in zip(shown, axes, strict=False):
        _plot(ax, panel, found[panel], now)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def _plot(
    ax: Axes, panel: Panel, found: dict[str, tuple[tuple[float, float], ...]], now: float
) -> None:
    for legend, values in sorted(found.items()):
        ax.plot([at - now for at, _ in values], [x for _, x in values], label=legend, linewidth=1)
    ax.set_title(panel.title, fontsize=8)
    ax.set_ylim(0, ax.get_ylim()[1] * LEGEND_ROOM)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: _written(x, panel.unit)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f} s"))
    ax.tick_params(labelsize=6)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=5, loc="upper left", ncols=2)


def _written(x: float, unit: str) -> str:
    if unit == "s":
        scale, name = next((scale, name) for limit, scale, name in SECONDS if x < limit)
        return f"{x * scale:.3g} {name}"
    scale, name = SCALES.get(unit, (1, ""))
    return f"{x / scale:.3g}{name}"


def _legend(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)
