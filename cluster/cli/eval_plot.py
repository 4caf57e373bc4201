"""The plot of a perplexity evaluation: divergence from exact KV against bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter
from matplotlib.transforms import Bbox

from kvmesh.cluster.cli.eval_tables import precision_of
from kvmesh.workers.evaluation.reports import FormatPerplexity, PerplexityReport

# Smaller divergences depend on the choice of text.
FLOOR_NATS = 1e-5
_INK, _MUTED, _GRID, _POINT = "#1c2733", "#66727f", "#e4e8ec", "#1f6feb"
# Possible positions of a label: offset from its point in points, and alignments.
_POSITIONS = (
    (6, 5, "left", "bottom"),
    (9, 0, "left", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (-9, 0, "right", "center"),
    (7, -7, "left", "top"),
    (-7, 7, "right", "bottom"),
    (-7, -7, "right", "top"),
)


def plot_perplexity(reports: Sequence[PerplexityReport], path: Path) -> None:
    """A panel per report, with a point per format except exact: bits per element at the measured
    context, and KL.

    Perplexity is not shown: on some models a format that loses information has a lower one.
    """
    single = len(reports) == 1
    size = (8.4, 5.2) if single else (5.6 * len(reports), 5.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(ncols=len(reports), sharex=True, sharey=True, squeeze=False)[0]
    rows_of = [sorted(x.formats[1:], key=lambda row: (row.bits, _nats(row))) for x in reports]
    for axes, report, rows in zip(panels, reports, rows_of, strict=True):
        _panel(axes, report, rows)
    highest = max((_nats(row) for rows in rows_of for row in rows), default=0.1)
    bits = [row.bits for rows in rows_of for row in rows] or [2.0, 8.0]
    margin = max(0.4, (max(bits) - min(bits)) * 0.08)
    panels[0].set_xlim(min(bits) - margin, max(bits) + 2 * margin)
    panels[0].set_ylim(FLOOR_NATS / 1.6, max(highest * 2, 0.1))
    panels[0].set_ylabel("KL divergence from exact KV, nats", color=_INK, fontsize=10.5)
    figure.draw_without_rendering()  # computes the positions of the points
    for axes, rows in zip(panels, rows_of, strict=True):
        _label(axes, rows)
    figure.savefig(path, dpi=160 if single else 110)


def _panel(axes: Axes, report: PerplexityReport, rows: list[FormatPerplexity]) -> None:
    _frame(axes, report, rows)
    front = _front(rows)
    axes.plot(
        [row.bits for row in front],
        [_nats(row) for row in front],
        color=_POINT,
        alpha=0.25,
        linewidth=6,
        solid_capstyle="round",
        solid_joinstyle="round",
        zorder=2,
    )
    for row in rows:
        floored = _nats(row) == FLOOR_NATS
        axes.plot(
            row.bits,
            _nats(row),
            marker="v" if floored else "o",
            markersize=8,
            markerfacecolor="white" if floored else _POINT,
            markeredgecolor=_POINT,
            markeredgewidth=1.6,
            zorder=3,
        )


def _nats(row: FormatPerplexity) -> float:
    return max(row.kl_nats, FLOOR_NATS)


def _front(rows: list[FormatPerplexity]) -> list[FormatPerplexity]:
    """The Pareto front: formats for which no format with fewer bits diverges less."""
    front: list[FormatPerplexity] = []
    for row in rows:
        if not front or _nats(row) < _nats(front[-1]):
            front.append(row)
    return front


def _frame(axes: Axes, report: PerplexityReport, rows: list[FormatPerplexity]) -> None:
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="major", color=_GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_MUTED)
    axes.tick_params(which="both", colors=_MUTED, labelsize=9.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel(
        f"bits per key or value element at {report.context:,} tokens", color=_INK, fontsize=10.5
    )
    axes.set_title(report.model, loc="left", color=_INK, fontsize=13, pad=36, fontweight="bold")
    floor = "; ▽ at most 0.00001" if any(_nats(row) == FLOOR_NATS for row in rows) else ""
    axes.text(
        0,
        1.025,
        f"{report.predictions:,} predictions in {report.windows} windows of {report.context:,} "
        f"tokens\n{precision_of(report)}; exact windows count as 16 bits{floor}",
        transform=axes.transAxes,
        color=_MUTED,
        fontsize=9,
    )


def _number(value: float, _: int) -> str:
    return f"{value:g}"


def _label(axes: Axes, rows: list[FormatPerplexity]) -> None:
    """Place each format's name so that it covers neither a point nor another name."""
    taken = []
    for row in rows:
        x, y = axes.transData.transform((row.bits, _nats(row)))
        taken.append(Bbox.from_bounds(x - 6, y - 6, 12, 12))
    for row in rows:
        label = axes.annotate(
            row.kv_format,
            (row.bits, _nats(row)),
            xytext=(0, 0),
            textcoords="offset points",
            color=_INK,
            fontsize=9.5,
            zorder=4,
        )
        taken.append(_place(label, taken, axes.bbox))


def _place(label: Annotation, taken: list[Bbox], frame: Bbox) -> Bbox:
    """Move a label to the first free position, or else the least covered one; returns its box."""
    boxes = []
    for dx, dy, horizontal, vertical in _POSITIONS:
        label.set(position=(dx, dy), horizontalalignment=horizontal, verticalalignment=vertical)
        box = label.get_window_extent()
        inside = box.x0 >= frame.x0 and box.x1 <= frame.x1
        covered = sum(_overlap(box, other) for other in taken)
        boxes.append((covered if inside else covered + box.width * box.height, box))
    best = min(range(len(boxes)), key=lambda index: boxes[index][0])
    dx, dy, horizontal, vertical = _POSITIONS[best]
    label.set(position=(dx, dy), horizontalalignment=horizontal, verticalalignment=vertical)
    return boxes[best][1]


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height
