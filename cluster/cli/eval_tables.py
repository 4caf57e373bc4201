"""Results of evaluations as tables of at most 80 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from kvmesh.workers.evaluation.reports import (
    PasskeyReport,
    PerplexityReport,
    RecallReport,
    RulerReport,
)


def precision_of(
    report: PerplexityReport | PasskeyReport | RecallReport | RulerReport,
) -> str:
    """What the model computed with."""
    return f"{report.dtype}, {report.weight_format} weights"


def perplexity_table(report: PerplexityReport) -> Group:
    title = (
        f"[bold]{report.model}[/bold], {precision_of(report)}: {report.predictions} predictions in "
        f"{report.windows} windows of {report.context} tokens"
    )
    table = _table()
    table.add_column("KV format", no_wrap=True)
    for name in ("perplexity", "loss", "KL", "±", "bits", f"at {_short(report.context)}", "at 32k"):
        table.add_column(name, justify="right")
    table.add_column("bytes per\ntoken", justify="right")
    for row in report.formats:
        exact = row is report.formats[0]
        table.add_row(
            row.kv_format,
            f"{row.perplexity:.3f}",
            "–" if exact else f"{row.loss:+.2%}",
            "–" if exact else f"{row.kl_nats:.5f}",
            "–" if exact or row.kl_error_nats is None else f"{row.kl_error_nats:.0e}",
            f"{row.sealed_bits:.2f}",
            f"{row.bits:.2f}",
            f"{row.bits_at_32k:.2f}",
            f"{row.bytes_per_token:,.0f}",
        )
    notes = (
        "loss: perplexity relative to exact KV; KL: divergence from exact KV, in nats;\n"
        "±: its standard error over the windows\n"
        "bits: per element of a sealed page, including metadata; then the mean over\n"
        f"sequences of {_short(report.context)} and 32k tokens, with exact windows counted as "
        "16 bits"
    )
    return Group(title, table, _dim(notes))


def passkey_table(report: PasskeyReport) -> Group:
    title = (
        f"[bold]{report.model}[/bold], {precision_of(report)}: passkey, "
        f"depths: {report.depths}, seeds: {report.seeds}"
    )
    table = _table()
    table.add_column("length", justify="right")
    table.add_column("KV format", no_wrap=True)
    table.add_column("found", justify="right")
    table.add_column("missed at depth")
    length = 0
    for row in report.figures:
        if length and row.length != length:
            table.add_section()
        table.add_row(
            "" if row.length == length else str(row.length),
            row.kv_format,
            f"{row.found} of {row.asked}",
            ", ".join(f"{depth:.0%}" for depth in row.missed_depths),
        )
        length = row.length
    notes = "found: within ten tokens of greedy output; depth: position of the passkey in the text"
    return Group(title, table, _dim(notes))


def recall_table(report: RecallReport) -> Group:
    title = f"[bold]{report.model}[/bold], {precision_of(report)}: recall of a 256-token passage"
    table = _table()
    table.add_column("length", justify="right")
    table.add_column("passages", justify="right")
    table.add_column("KV format", no_wrap=True)
    for name in ("accuracy", "difference", "KL"):
        table.add_column(name, justify="right")
    for length, count in report.passages.items():
        for place, row in enumerate(r for r in report.figures if r.length == length):
            table.add_row(
                *(("", "") if place else (str(length), str(count))),
                row.kv_format,
                f"{row.accuracy:.3f}",
                f"{row.difference:+.3f}" if place else "–",
                f"{row.kl_nats:.5f}" if place else "–",
            )
        table.add_section()
    notes = (
        "accuracy: of next tokens in the second copy of the passage, which begins\n"
        "`length` tokens after the first; KL: divergence from exact KV there, in nats"
    )
    return Group(title, table, _dim(notes))


def ruler_table(report: RulerReport) -> Group:
    rope = "" if report.rope is None else f", RoPE {report.rope}"
    title = (
        f"[bold]{report.model}[/bold], {precision_of(report)}{rope}: "
        f"{report.samples} prompts a figure, seed {report.seed}"
    )
    tasks = list(dict.fromkeys(row.task for row in report.figures))
    table = _table()
    table.add_column("length", justify="right")
    table.add_column("KV format", no_wrap=True)
    for task in [*tasks, "mean"]:
        table.add_column(task.replace("-", "\n"), justify="right")
    last = 0
    for length, name in dict.fromkeys((row.length, row.kv_format) for row in report.figures):
        if last and length != last:
            table.add_section()
        rows = [row for row in report.figures if (row.length, row.kv_format) == (length, name)]
        table.add_row(
            "" if length == last else str(length),
            name,
            *(_with_error(row.score, row.error) for row in rows),
            f"{sum(row.score for row in rows) / len(rows):.2f}",
        )
        last = length
    notes = "mean share of a prompt's answers in greedy output, ± its standard error"
    return Group(title, table, _dim(notes))


def _with_error(score: float, error: float | None) -> str:
    return f"{score:.2f}" if error is None else f"{score:.2f} ±{error:.2f}"


def _short(tokens: int) -> str:
    """2048 -> '2k', 1000 -> '1000'."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _dim(notes: str) -> str:
    return f"[dim]{notes}[/dim]"


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
