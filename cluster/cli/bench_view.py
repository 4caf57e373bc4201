"""The figures of a run of `kvmesh bench serve` on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table

from kvmesh.cluster.bench.report import MEASURES, LoadReport
from kvmesh.cluster.cli.console import out


def show_load(report: LoadReport, server: str, planned: int) -> None:
    done = f"{report.complete} of {planned} requests in {report.duration_s:.1f} s"
    out.print(f"[bold]{server}[/bold]: {done}", soft_wrap=True)
    out.print(
        f"{report.request_rps:.2f} requests/s, {report.output_tokens_per_s:,.1f} output tokens/s, "
        f"{report.total_tokens_per_s:,.1f} tokens/s with prompts; {report.mean_running:.1f} running"
        f" on average, {report.max_running} at most",
        soft_wrap=True,
    )
    if report.complete:
        cached = f" ({report.cached_tokens / report.complete:,.0f} cached)"
        out.print(
            f"{report.prompt_tokens / report.complete:,.0f} prompt tokens"
            f"{cached if report.cached_tokens else ''} and "
            f"{report.output_tokens / max(report.complete + report.unfinished, 1):,.0f} output "
            "tokens a request",
            soft_wrap=True,
        )
    table = Table(box=None, pad_edge=False)
    table.add_column("milliseconds")
    for name in ("mean", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for name, meaning in MEASURES.items():
        times = report.timings[name]
        figures = (times.mean, times.p50, times.p90, times.p99)
        cells = ("–" if math.isnan(x) else f"{x * 1e3:,.1f}" for x in figures)
        table.add_row(f"{name.upper()} [dim]{meaning}[/dim]", *cells)
    out.print(table)
    if report.goodput is not None:
        limits = ", ".join(
            f"{x.upper()} ≤ {ms:g} ms" for x, ms in report.goodput.objectives_ms.items()
        )
        out.print(
            f"goodput {report.goodput.rps:.2f} requests/s: {report.goodput.requests} of "
            f"{report.requests} ({report.goodput.share:.0%}) met {limits}",
            soft_wrap=True,
        )
    for line in _remarks(report):
        out.print(line, soft_wrap=True, markup=False)


def _remarks(report: LoadReport) -> Iterator[str]:
    """What a reader must know before comparing the figures."""
    for kind, failure in report.failures.items():
        yield f"failed: {failure.count} × {kind}: {failure.example}"
    if report.unfinished:
        yield f"stopped: {report.unfinished} requests had not ended, and are in no latency"
    if report.short_outputs:
        yield f"{report.short_outputs} outputs are shorter than asked for"
    if report.tokens_per_chunk > 1.05:
        yield f"{report.tokens_per_chunk:.1f} tokens a chunk: ITL is not the time of one token"
    if report.send_lag_p99_s > max(0.1 * report.timings["ttft"].p50, 0.005):
        yield (
            f"this program was up to {report.send_lag_p99_s * 1e3:.0f} ms (p99) late in sending, "
            "which is part of the latencies: run it on another machine, or at a lower rate"
        )
