"""The demo: one question to a complete cluster, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from kvmesh.client import (
    Client,
    FinishReason,
    KVMeshError,
    Loads,
    Message,
    RetryPolicy,
    Stream,
)
from kvmesh.cluster.cli.console import human_bytes, human_seconds, out
from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.cluster.cli.running import running
from kvmesh.cluster.cli.signals import Stop, hold_signals
from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.lifecycle import Endpoint


@dataclass(frozen=True, slots=True)
class Cost:
    """A finished stream, and the cluster's loads before, during and after it."""

    stream: Stream
    before: Loads
    during: Loads
    after: Loads


def run_demo(settings: ClusterConfig, question: str, max_tokens: int) -> ExitCode:
    """Run the demo and return the exit code."""
    with hold_signals() as stop:
        try:
            with running(settings, stop) as (cluster, endpoint):
                try:
                    _describe(settings, endpoint)
                    cost = _ask(endpoint, question, max_tokens)
                    out.print(_table(cost))
                except KVMeshError:
                    cluster.check_alive()  # a better reason, if it raises
                    raise
        except Stop:
            return ExitCode.INTERRUPTED
    out.print("\nNext: [bold]kvmesh serve[/bold], and in another terminal [bold]kvmesh chat[/bold]")
    return ExitCode.DONE


def _describe(settings: ClusterConfig, endpoint: Endpoint) -> None:
    out.print(f"[bold]{settings.model}[/bold]")
    with Client(endpoint.target, api_key=endpoint.api_key) as client:
        groups = client.groups()  # those that run, perhaps fewer than are configured
    for group in groups:
        count = group.tp * group.kvp
        ranks = f"{count} ranks" if count > 1 else "one rank"
        out.print(f"{group.group}: {ranks}, KV format {group.kv_format}")
    out.print(f"gRPC at {endpoint.target}, OpenAI's API at {endpoint.http_url}/v1", markup=False)


def _ask(endpoint: Endpoint, question: str, max_tokens: int) -> Cost:
    # The cluster is ours: if it dies, it does not return.
    retry = RetryPolicy(max_outage_s=10.0)
    with Client(endpoint.target, api_key=endpoint.api_key, retry=retry) as client:
        before = during = client.loads()
        out.print(f"\n[bold cyan]you[/bold cyan]    {question}")
        out.print("[bold green]model[/bold green]  ", end="")
        messages = [Message("user", question)]
        with client.chat_stream(messages, max_tokens=max_tokens, temperature=0.0) as stream:
            for number, delta in enumerate(stream):
                out.print(delta.text, end="", markup=False, soft_wrap=True)
                out.file.flush()
                if number == 8:
                    during = client.loads()
        out.print("\n")
        if stream.completion.choices[0].finish_reason is FinishReason.LENGTH:
            out.print(f"[dim]The answer ends at its limit, --max-tokens {max_tokens}.[/dim]\n")
        return Cost(stream, before, during, client.loads())


def _table(cost: Cost) -> Table:
    usage = cost.stream.usage
    assert usage is not None, "the stream has ended"
    table = Table(title="what it cost", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("prompt tokens", f"{usage.prompt_tokens} ({usage.cached_tokens} cached)")
    table.add_row("output tokens", str(usage.completion_tokens))
    if usage.time_to_first_token_s is not None:
        first_s = usage.time_to_first_token_s
        table.add_row("time to first token", human_seconds(first_s))
        if usage.completion_tokens > 1:
            rate = (usage.completion_tokens - 1) / max(usage.total_s - first_s, 1e-9)
            table.add_row("speed", f"{rate:.1f} tokens/s")
    table.add_row("KV pages per rank", f"{usage.kv_hot_pages} hot, {usage.kv_sealed_pages} sealed")
    table.add_row("KV reserved", human_bytes(usage.kv_reserved_bytes))
    table.add_row("KV used (peak)", human_bytes(usage.kv_used_bytes))
    table.add_row("KV freed", human_bytes(usage.kv_freed_bytes))
    table.add_section()
    for name, loads in (("before", cost.before), ("during", cost.during), ("after", cost.after)):
        table.add_row(f"pool usage {name}", _pool(loads))
    return table


def _pool(loads: Loads) -> str:
    used = sum(group.used_bytes for group in loads.groups)
    cached = sum(group.cached_bytes for group in loads.groups)
    pages = sum(group.hot.used + group.sealed.used for group in loads.groups)
    return f"{pages} pages, {human_bytes(used)} (+ {human_bytes(cached)} cached)"
