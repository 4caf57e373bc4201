"""What `kvmesh top` shows: a picture of the fleet's loads, and rates since the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvmesh.client import GroupLoads, LatencySummary, Loads, RouterLoads, SequenceLoads
from kvmesh.cluster.cli.console import human_bytes, human_seconds, human_wait

BAR_CHARS, PROMPT_BAR_CHARS = 14, 8
# So that all columns fit a terminal of 80.
NAME_CHARS, GROUP_CHARS = 22, 10
USED, CACHED, FREE = "█", "▒", "░"
FULLNESS = ((0.8, "green"), (0.95, "yellow"), (float("inf"), "red"))


@dataclass(frozen=True, slots=True)
class Picture:
    """The loads at a moment. at_s: by a monotonic clock; when: for people"""

    loads: Loads
    model: str
    at_s: float
    when: datetime


def fleet(now: Picture, before: Picture | None, max_requests: int, note: str = "") -> Group:
    """before: an earlier picture, for rates; note: shown in the first line"""
    old = {group.group: group for group in before.loads.groups} if before else {}
    elapsed_s = now.at_s - before.at_s if before else 0.0
    parts: list[RenderableType] = [
        _head(now, note),
        _router(now.loads.router),
        Text(),
        _groups(now.loads.groups, old, elapsed_s),
    ]
    if requests := longest_running(now.loads.groups)[:max_requests]:
        parts += [Text(), _requests(requests)]
    return Group(*parts)


def longest_running(groups: Sequence[GroupLoads]) -> list[tuple[str, SequenceLoads]]:
    """Sequences with their groups, the oldest first."""
    found = [(group.group, sequence) for group in groups for sequence in group.oldest]
    return sorted(found, key=lambda x: -x[1].age_s)


def _head(now: Picture, note: str) -> Text:
    up = sum(group.healthy for group in now.loads.groups)
    line = f"[bold]{escape(now.model)}[/bold]  {up} of {len(now.loads.groups)} groups up"
    line += f"  {now.when:%H:%M:%S}"
    if note:
        line += f"  [red]{escape(note)}[/red]"
    return Text.from_markup(line)


def _router(router: RouterLoads) -> Text:
    waits = f"{router.queue_length} of {router.queue_capacity} waiting for room"
    if router.queue_length:
        waits += f", the oldest for {human_wait(router.oldest_wait_s)}"
    refused = sum(router.refused_total.values())
    line = f"router: {waits}; {router.leases} leases, {refused} refused"
    if router.audit_faults_total:
        line += f"\n[red]ledger: {router.audit_faults_total} audits with errors[/red]"
    return Text.from_markup(line)


def _groups(groups: Sequence[GroupLoads], old: Mapping[str, GroupLoads], elapsed_s: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("group", overflow="ellipsis", no_wrap=True, max_width=GROUP_CHARS)
    table.add_column("KV memory", no_wrap=True)
    for name in ("run", "wait", "in/s", "out/s", "first", "each"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        before = old.get(group.group)
        table.add_row(
            Text(group.group, style="red" if not group.healthy else ""),
            _pool(group),
            str(group.running),
            str(group.waiting),
            _rate(group, before, elapsed_s, "prompt_tokens_total"),
            _rate(group, before, elapsed_s, "completion_tokens_total"),
            _latency(group.time_to_first_token),
            _latency(group.time_per_output_token),
        )
    return table


def _pool(group: GroupLoads) -> Text:
    """A bar of what is used, cached and free; then the share that is used."""
    if not group.healthy:
        return Text("down", style="red")
    if group.draining:
        return Text("draining", style="yellow")
    total = max(group.total_bytes, 1)
    used = group.used_bytes / total
    style = next(style for limit, style in FULLNESS if used < limit)
    bar = _bar(used, group.cached_bytes / total, BAR_CHARS, style)
    return bar.append(f" {used:4.0%} {human_bytes(group.total_bytes)}", style="")


def _bar(full: float, half: float, chars: int, style: str) -> Text:
    """full, half: shares of the bar in its two forms"""
    used = min(round(full * chars), chars)
    cached = min(round((full + half) * chars), chars) - used
    bar = Text(USED * used, style=style)
    bar.append(CACHED * cached, style="blue")
    return bar.append(FREE * (chars - used - cached), style="dim")


def _rate(group: GroupLoads, before: GroupLoads | None, elapsed_s: float, name: str) -> str:
    if before is None or elapsed_s <= 0:
        return "–"
    gained = getattr(group, name) - getattr(before, name)
    # A new engine of the group starts at 0.
    return f"{gained / elapsed_s:,.0f}" if gained >= 0 else "–"


def _latency(summary: LatencySummary) -> str:
    return human_seconds(summary.p50_s) if summary.count else "–"


def _requests(requests: Sequence[tuple[str, SequenceLoads]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("longest running", overflow="ellipsis", no_wrap=True, max_width=NAME_CHARS)
    table.add_column("group", overflow="ellipsis", no_wrap=True, max_width=GROUP_CHARS)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("prompt", no_wrap=True)
    table.add_column("out", justify="right", no_wrap=True)
    for group, one in requests:
        name = f"{one.tenant}/{one.request_id}" if one.tenant else "unknown"
        table.add_row(
            Text(name), group, human_wait(one.age_s), _prompt(one), f"{one.completion_tokens:,}"
        )
    return table


def _prompt(one: SequenceLoads) -> Text:
    """How much of the prompt is computed, and of that what was in the prefix cache."""
    total = max(one.prompt_tokens, 1)
    computed = min(one.computed_tokens, total)
    cached = min(one.cached_tokens, computed)
    bar = _bar((computed - cached) / total, cached / total, PROMPT_BAR_CHARS, "green")
    return bar.append(f" {computed / total:4.0%} of {one.prompt_tokens:,}", style="")
