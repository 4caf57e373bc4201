"""`kvmesh serve` and `kvmesh demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cluster.cli.console import err, notes, out
from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.cluster.cli.options import QuietOption, with_options
from kvmesh.cluster.cli.settings_options import ModelSettings, ServeSettings

if TYPE_CHECKING:
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
                _announce(endpoint, config)
                stop.wait(cluster.check_alive)
                err.print("shutting down; press Ctrl-C again to stop without waiting for requests")
        except Stop:
            raise typer.Exit(ExitCode.INTERRUPTED) from None


def _announce(endpoint: Endpoint, config: ClusterConfig) -> None:
    out.print(f"[bold green]ready[/bold green] at {endpoint.target}")
    out.file.flush()
    local = endpoint.target.endswith(":9000")
    target = "" if local else f" --target {endpoint.target}"
    notes.print(f'  generate kvmesh generate{target} "Once upon a time"')
    notes.print(f"  chat     kvmesh chat{target}")
    notes.print(f"  status   kvmesh status{target}")
    argument = "" if local else f'"{endpoint.target}"'
    notes.print(f"  Python   kvmesh.Client({argument}).generate(…)", markup=False)
    notes.print(f"  OpenAI   {endpoint.http_url}/v1", markup=False)
    if endpoint.metrics_url:
        notes.print(f"  metrics  {endpoint.metrics_url}")
    if endpoint.dashboard_url:
        notes.print(f"  Ray      {endpoint.dashboard_url} asks for a token: ray get-auth-token")
    if config.auth.mode == "none":
        err.print(
            "  [yellow]anyone who can reach this port may send requests (auth: none)[/yellow]"
        )


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
    # Free even while another one serves.
    ingress = config.ingress.model_copy(update={"port": 0, "http_port": 0})
    config = config.model_copy(update={"ingress": ingress})
    raise typer.Exit(run_demo(config, question, max_tokens))
