"""`kvmesh serve` and `kvmesh demo`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kvmesh.cluster.cli.console import err, human_bytes, notes, out
from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.cluster.cli.options import QuietOption, with_options
from kvmesh.cluster.cli.settings_options import ModelSettings, ServeSettings

if TYPE_CHECKING:
    from kvmesh.client import GroupFacts
    from kvmesh.cluster.config import ClusterConfig
    from kvmesh.cluster.lifecycle import Endpoint

DEMO_QUESTION = "Why is the sky blue? Answer in two sentences."


@with_options
def serve(settings: ServeSettings, quiet: QuietOption = False) -> None:
    """Start a cluster and serve until Ctrl-C."""
    from kvmesh.cluster.cli.signals import Stop, hold_signals

    config = settings.load().config
    from kvmesh.cluster.cli.running import running

    with hold_signals() as stop:
        try:
            with running(config, stop) as (cluster, endpoint):
                stop.wait_ready()
                _announce(endpoint, config, _groups(endpoint, config))
                stop.wait(cluster.check_alive)
                err.print("shutting down; press Ctrl-C again to stop without waiting for requests")
        except Stop:
            raise typer.Exit(ExitCode.INTERRUPTED) from None


def _announce(endpoint: Endpoint, config: ClusterConfig, groups: Sequence[GroupFacts]) -> None:
    """The address on stdout; and for people where everything is, and what to do first.

    groups: none if this process has no key to ask with
    """
    from kvmesh.client.credentials import resolve_target
    from kvmesh.cluster.keys import local_key_file

    out.print(f"[bold green]ready[/bold green] at {endpoint.target}")
    out.file.flush()
    rows = [("gRPC", endpoint.target), ("OpenAI", f"{endpoint.http_url}/v1")]
    if endpoint.metrics_url:
        rows.append(("metrics", endpoint.metrics_url))
    if endpoint.dashboard_url:
        rows.append(
            ("dashboard", f"{endpoint.dashboard_url}, asks for what `ray get-auth-token` prints")
        )
    if endpoint.api_key is not None:
        rows.append(("key", str(local_key_file(config.auth, os.environ))))
    rows += [(group.group, _in_short(group)) for group in groups]
    rows += [("layout", groups[0].layout_reason)] if groups and groups[0].layout_reason else []
    default = resolve_target(None, os.environ).replace("localhost", "127.0.0.1")
    is_default = endpoint.target.replace("localhost", "127.0.0.1") == default
    target = "" if is_default else f" --target {endpoint.target}"
    rows += [
        ("try", f'kvmesh generate{target} "Once upon a time"'),
        ("", f"kvmesh chat{target}"),
        ("", f"kvmesh status{target}"),
        ("stop", "Ctrl-C"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        notes.print(f"  [dim]{name:{width}}[/dim]  {escape(value)}", soft_wrap=True)
    for group in groups:
        if group.kv_format_warning:
            err.print(f"  [yellow]{group.group}: {escape(group.kv_format_warning)}[/yellow]")
    if config.auth.mode == "none":
        err.print(
            "  [yellow]anyone who can reach this port may send requests (auth: none)[/yellow]"
        )


def _in_short(group: GroupFacts) -> str:
    counts = [count for count in (group.tp, group.kvp) if count > 1]
    ranks = "".join(f"{count} × " for count in counts)
    return (
        f"{ranks}{group.device} {group.dtype}, {human_bytes(group.capacity_bytes)} of KV in "
        f"{group.kv_format}, {group.max_num_seqs} sequences at a time, "
        f"{group.max_num_batched_tokens:,} tokens a step"
    )


def _groups(endpoint: Endpoint, config: ClusterConfig) -> Sequence[GroupFacts]:
    """What each group is made of; none if that needs a key which only its owner has.

    The generated key is an operator's, and without authentication everyone is one.
    """
    from kvmesh.client import Client

    if endpoint.api_key is None and config.auth.mode != "none":
        return ()
    with Client(endpoint.target, api_key=endpoint.api_key or "") as client:
        return client.groups()


@with_options
def demo(
    settings: ModelSettings,
    question: Annotated[str, typer.Argument(help="The question to ask.")] = DEMO_QUESTION,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of the answer.")] = 96,
    quiet: QuietOption = False,
) -> None:
    """Start a cluster, ask one question, show the answer and its cost, and shut down."""
    from kvmesh.cluster.cli.demo import run_demo

    config = settings.load().config
    # Free ones, even while another one serves.
    ingress = config.ingress.model_copy(update={"port": 0, "http_port": 0})
    config = config.model_copy(update={"ingress": ingress})
    raise typer.Exit(run_demo(config, question, max_tokens))
