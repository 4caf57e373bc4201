"""Tables of a cluster's status, estimates and explanations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from kvmesh.client import (
    Estimate,
    Explanation,
    GroupFacts,
    GroupLedger,
    GroupLoads,
    LatencySummary,
    Loads,
    ModelInfo,
    PagesLoad,
    TenantLoads,
)
from kvmesh.cluster.cli.console import human_bytes, human_seconds, out
from kvmesh.kernels.formats.registry import is_for_comparison


def show_model(info: ModelInfo) -> None:
    out.print(
        f"[bold]{info.model}[/bold] ({info.model_revision}), context {info.max_model_len} tokens, "
        f"server {info.version}"
    )
    given = dataclasses.asdict(info.default_sampling_params).items()
    defaults = ", ".join(f"{name} {value:g}" for name, value in given if value is not None)
    out.print(f"defaults: {defaults or 'none'}", highlight=False)
    if len(info.chat_template_names) > 1:
        names = ", ".join(info.chat_template_names)
        out.print(f"chat templates: {names}", markup=False, highlight=False)


def show_groups(info: ModelInfo) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("group", "KV format", "dtype", "RoPE"):
        table.add_column(name)
    for name in ("KV memory", "context", "divergence from exact KV"):
        table.add_column(name, justify="right")
    for group in info.groups:
        nats = group.kv_divergence_nats
        table.add_row(
            group.group,
            _format(group.kv_format),
            group.dtype,
            group.rope,
            human_bytes(group.capacity_bytes),
            str(group.max_model_len),
            "not measured" if nats is None else f"{nats:g} nats",
        )
    out.print()
    out.print(table)


def show_tenant(loads: TenantLoads) -> None:
    """For keys that may not see the whole cluster."""
    quota = "" if loads.quota_bytes is None else f" of {human_bytes(loads.quota_bytes)}"
    out.print(
        f"tenant {loads.tenant}: {loads.running} running, {loads.queued} waiting, "
        f"{human_bytes(loads.leased_bytes)}{quota} leased"
    )


def show_cluster(groups: Sequence[GroupFacts], loads: Loads) -> None:
    facts = {group.group: group for group in groups}
    ledger = {group.group: group for group in loads.router.ledger}
    if reason := next((fact.layout_reason for fact in groups if fact.layout_reason), ""):
        out.print(f"layout: {escape(reason)}")
    for group in loads.groups:
        out.print()
        out.print(_group(group, facts.get(group.group), ledger.get(group.group)))
    router = loads.router
    out.print(
        f"\nrouter: {router.queue_length} of {router.queue_capacity} waiting, "
        f"{router.leases} leases, {router.granted_total} granted, "
        f"{router.released_total} released, {router.expired_total} expired\n"
        f"ledger: {router.audits_total} audits, {router.audit_faults_total} with errors"
    )
    for reason, count in sorted(router.refused_total.items()):
        out.print(f"  rejected {count}: {reason}")


def _format(name: str) -> str:
    return f"{name} (for comparison, slow)" if is_for_comparison(name) else name


def _group(group: GroupLoads, fact: GroupFacts | None, account: GroupLedger | None) -> Table:
    """One group as a table of two columns, which fits a narrow terminal or a log."""
    ranks = f", tp {fact.tp}" if fact else ""
    if fact and fact.kvp > 1:
        ranks += f" × kvp {fact.kvp}"
    title = (
        f"[bold]{group.group}[/bold] {_state(group)} [dim]{_format(group.kv_format)}{ranks}[/dim]"
    )
    table = Table(title=title, title_justify="left", title_style="", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    leased = f", {human_bytes(account.leased_bytes)} leased" if account else ""
    total = human_bytes(group.total_bytes)
    table.add_row("KV in use", f"{human_bytes(group.used_bytes)} of {total}{leased}")
    table.add_row("hot pages per rank", _pages(group.hot))
    table.add_row("sealed pages per rank", _pages(group.sealed))
    if group.pinned_pages:
        lost = f", {group.pinned_evictions_total} were needed" * bool(group.pinned_evictions_total)
        table.add_row("pinned", f"{group.pinned_pages} pages{lost}")
    if fact:
        device = f"on {fact.device} in {fact.dtype}: " if fact.device else ""
        tokens = fact.max_num_batched_tokens
        step = f", {tokens:,} tokens a step" if tokens else ""
        table.add_row("at most", f"{device}{fact.max_num_seqs} sequences{step}")
        if fact.operators:
            table.add_row("operators", fact.operators)
        if fact.kv_format_warning:
            table.add_row("warning", f"[yellow]{escape(fact.kv_format_warning)}[/yellow]")
    table.add_row(
        "sequences",
        f"{group.running} running, {group.waiting} waiting, {group.preemptions_total} preempted",
    )
    table.add_row(
        "tokens",
        f"{group.prompt_tokens_total} prompt ({group.cached_tokens_total} cached), "
        f"{group.completion_tokens_total} output",
    )
    outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(group.outcomes_total.items()))
    table.add_row("ended", outcomes or "none")
    table.add_row("first token, p50 / p99", _latency(group.time_to_first_token))
    table.add_row("per token, p50 / p99", _latency(group.time_per_output_token))
    table.add_row("queue, p50 / p99", _latency(group.queue_time))
    return table


def _state(group: GroupLoads) -> str:
    if group.draining:
        return "[yellow]draining[/yellow]"
    return "[green]up[/green]" if group.healthy else "[red]down[/red]"


def _pages(pages: PagesLoad) -> str:
    return f"{pages.used} used, {pages.cached} cached, {pages.free} free"


def _latency(summary: LatencySummary) -> str:
    if not summary.count:
        return "–"
    return f"{human_seconds(summary.p50_s)} / {human_seconds(summary.p99_s)}"


def show_estimate(estimate: Estimate) -> None:
    verdict = "fits now" if estimate.feasible_now else "would wait"
    if not estimate.feasible_ever:
        verdict = "never fits"
    wait_s = estimate.projected_wait_s
    wait = f", about {human_seconds(wait_s)}" if wait_s and not estimate.feasible_now else ""
    where = f" on {estimate.group}" if estimate.group else ""
    out.print(
        f"{estimate.prompt_tokens} prompt + {estimate.max_tokens} output tokens: "
        f"[bold]{verdict}[/bold]{where}{wait}"
    )
    for group in estimate.groups:
        out.print(
            f"  {group.group} ({group.kv_format}): {group.reason}\n"
            f"    needs {human_bytes(group.needed_bytes)} "
            f"({group.hot_pages} hot + {group.sealed_pages} sealed pages per rank), "
            f"{human_bytes(group.free_bytes)} free of {human_bytes(group.capacity_bytes)}"
        )


def show_explanation(explanation: Explanation) -> None:
    for decision in explanation.decisions:
        where = f" on {decision.group}" if decision.group else ""
        out.print(f"{human_seconds(decision.age_s)} ago: [bold]{decision.outcome}[/bold]{where}")
        for group in decision.groups:
            out.print(f"  {group.group} ({group.kv_format}): {group.reason}")
            facts = [
                f"needs {human_bytes(group.needed_bytes)}, {human_bytes(group.free_bytes)} free"
            ]
            if group.cached_tokens:
                facts.append(f"has {group.cached_tokens} of its tokens cached")
            if group.cost_s is not None:
                facts.append(f"cost {group.cost_s:.3f} s")
            out.print(f"    {'; '.join(facts)}")
