"""Tables of what a cluster holds and does."""

from __future__ import annotations

from rich.table import Table

from kvmesh.client import Estimate, GroupLoads, LatencySummary, Loads, ModelInfo, PagesLoad
from kvmesh.cluster.cli.console import human_bytes, human_seconds, out


def show_status(info: ModelInfo, loads: Loads) -> None:
    out.print(
        f"[bold]{info.model}[/bold] ({info.model_revision}), context {info.max_model_len} tokens, "
        f"server {info.version}"
    )
    out.print(_groups(info, loads))
    out.print(_activity(loads))
    router = loads.router
    out.print(
        f"router: {router.queue_length} of {router.queue_capacity} waiting, "
        f"{router.leases} leases, {router.granted_total} granted, "
        f"{router.released_total} released, {router.expired_total} expired"
    )
    for reason, count in sorted(router.refused_total.items()):
        out.print(f"  refused {count}: {reason}")


def _groups(info: ModelInfo, loads: Loads) -> Table:
    facts = {group.group: group for group in info.groups}
    ledger = {group.group: group for group in loads.router.ledger}
    table = Table(title="KV pools (pages of one rank: used / cached / free)", title_justify="left")
    for name in ("group", "state", "format", "ranks", "hot", "sealed", "in use", "leased", "of"):
        table.add_column(name)
    for group in loads.groups:
        fact, account = facts.get(group.group), ledger.get(group.group)
        table.add_row(
            group.group,
            _state(group),
            group.kv_format,
            f"tp {fact.tp}" if fact else "",
            _pages(group.hot),
            _pages(group.sealed),
            human_bytes(group.used_bytes),
            human_bytes(account.leased_bytes) if account else "",
            human_bytes(group.total_bytes),
        )
    return table


def _state(group: GroupLoads) -> str:
    if group.draining:
        return "[yellow]draining[/yellow]"
    return "[green]up[/green]" if group.healthy else "[red]down[/red]"


def _pages(pages: PagesLoad) -> str:
    return f"{pages.used} / {pages.cached} / {pages.free}"


def _activity(loads: Loads) -> Table:
    table = Table(title="since start", title_justify="left")
    names = ("group", "running", "waiting", "prompt", "cached", "output", "preempted", "outcomes")
    for name in (*names, "first token p50/p99", "per token p50/p99"):
        table.add_column(name)
    for group in loads.groups:
        outcomes = ", ".join(f"{n} {k}" for k, n in sorted(group.outcomes_total.items()))
        table.add_row(
            group.group,
            str(group.running),
            str(group.waiting),
            str(group.prompt_tokens_total),
            str(group.cached_tokens_total),
            str(group.completion_tokens_total),
            str(group.preemptions_total),
            outcomes or "–",
            _latency(group.time_to_first_token),
            _latency(group.time_per_output_token),
        )
    return table


def _latency(summary: LatencySummary) -> str:
    if not summary.count:
        return "–"
    return f"{human_seconds(summary.p50_s)} / {human_seconds(summary.p99_s)}"


def show_estimate(estimate: Estimate) -> None:
    verdict = "fits now" if estimate.feasible_now else "would wait"
    if not estimate.feasible_ever:
        verdict = "never fits"
    wait_s = estimate.projected_wait_s
    told = f", about {human_seconds(wait_s)}" if wait_s and not estimate.feasible_now else ""
    where = f" on {estimate.group}" if estimate.group else ""
    out.print(
        f"{estimate.prompt_tokens} prompt + {estimate.max_tokens} output tokens: "
        f"[bold]{verdict}[/bold]{where}{told}"
    )
    table = Table()
    for name in ("group", "format", "hot pages", "sealed pages", "needs", "free", "of", "verdict"):
        table.add_column(name)
    for group in estimate.groups:
        table.add_row(
            group.group,
            group.kv_format,
            str(group.hot_pages),
            str(group.sealed_pages),
            human_bytes(group.needed_bytes),
            human_bytes(group.free_bytes),
            human_bytes(group.capacity_bytes),
            group.reason,
        )
    out.print(table)
