"""`kvmesh serve`, `kvmesh demo`, `kvmesh config`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cluster.cli.console import EXIT_INTERRUPTED, Steps, err, friendly_errors, out

if TYPE_CHECKING:
    from kvmesh.cluster.config import ClusterConfig

DEMO_QUESTION = "Why is the sky blue? Answer in two sentences."

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A YAML file; see `kvmesh config`.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="A local Hugging Face directory, a GGUF file, or a hub name."),
]
FormatOption = Annotated[str | None, typer.Option(help="KV format, e.g. int8, k4v4 or exact.")]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="A file of `kvmesh calibrate`, for calibrated formats.")
]
TpOption = Annotated[int | None, typer.Option(help="Tensor-parallel ranks per group.")]
GroupsOption = Annotated[int | None, typer.Option(help="Engine groups.")]
MemoryOption = Annotated[
    str | None, typer.Option("--kv-memory", help="KV memory of one rank, e.g. 512MiB.")
]
PortOption = Annotated[int | None, typer.Option(help="gRPC port; 0: any free one.")]
HostOption = Annotated[str | None, typer.Option(help="Address to listen on.")]
IngressOption = Annotated[int | None, typer.Option("--ingress", help="Ingress processes.")]
AuthOption = Annotated[
    str | None, typer.Option(help="api_key, or none to accept requests from anyone.")
]
AddressOption = Annotated[
    str | None, typer.Option(help="A running Ray cluster to join, e.g. auto.")
]


def serve(
    config: ConfigOption = None,
    model: ModelOption = None,
    kv_format: FormatOption = None,
    calibration: CalibrationOption = None,
    tp: TpOption = None,
    groups: GroupsOption = None,
    kv_memory: MemoryOption = None,
    host: HostOption = None,
    port: PortOption = None,
    ingress: IngressOption = None,
    auth: AuthOption = None,
    address: AddressOption = None,
) -> None:
    """Start a cluster and serve until Ctrl-C."""
    with friendly_errors():
        from kvmesh.cluster.cli.signals import Stop, hold_signals

        settings = _settings(
            config,
            {
                "model": model,
                "engine.kv_format": kv_format,
                "engine.calibration": None if calibration is None else str(calibration),
                "engine.tp": tp,
                "groups": groups,
                "engine.kv_memory_bytes": kv_memory,
                "ingress.host": host,
                "ingress.port": port,
                "ingress.replicas": ingress,
                "auth.mode": auth,
                "ray.address": address,
            },
        )
        from kvmesh.cluster.lifecycle import Cluster

        with hold_signals() as stop, Steps() as steps:
            cluster = Cluster(settings, steps)
            stop.on_repeat(cluster.hurry)
            try:
                with stop.interrupting(), cluster as endpoint:
                    stop.wait_ready()
                    _announce(endpoint, settings)
                    stop.wait(cluster.check_alive)
                    err.print(
                        "shutting down; press Ctrl-C again to stop without waiting for requests"
                    )
            except Stop:
                raise typer.Exit(EXIT_INTERRUPTED) from None


def _announce(endpoint: Any, settings: ClusterConfig) -> None:
    local = endpoint.target.endswith(":9000")
    target = "" if local else f" --target {endpoint.target}"
    out.print(f"[bold green]ready[/bold green] at {endpoint.target}")
    out.print(f'  generate kvmesh generate{target} "Once upon a time"')
    out.print(f"  chat     kvmesh chat{target}")
    out.print(f"  status   kvmesh status{target}")
    argument = "" if local else f'"{endpoint.target}"'
    out.print(f"  Python   kvmesh.Client({argument}).generate(…)", markup=False)
    if endpoint.metrics_url:
        out.print(f"  metrics  {endpoint.metrics_url}")
    if settings.auth.mode == "none":
        out.print(
            "  [yellow]anyone who can reach this port may send requests (auth: none)[/yellow]"
        )


def demo(
    question: Annotated[str, typer.Argument(help="The question to ask.")] = DEMO_QUESTION,
    config: ConfigOption = None,
    model: ModelOption = None,
    kv_format: FormatOption = None,
    calibration: CalibrationOption = None,
    tp: TpOption = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of the answer.")] = 96,
) -> None:
    """Start a cluster, ask one question, show the answer and its cost, and shut down."""
    with friendly_errors():
        from kvmesh.cluster.cli.demo import run_demo

        settings = _settings(
            config,
            {
                "model": model,
                "engine.kv_format": kv_format,
                "engine.calibration": None if calibration is None else str(calibration),
                "engine.tp": tp,
                "ingress.port": 0,
            },
        )
        if config is None and tp is None:
            settings = demo_defaults(settings)
        raise typer.Exit(run_demo(settings, question, max_tokens))


def demo_defaults(settings: ClusterConfig) -> ClusterConfig:
    """The settings with as many ranks as the model's KV heads allow, up to three."""
    from kvmesh.cluster.cli.demo import widest_tp

    engine = settings.engine.model_copy(update={"tp": widest_tp(settings.model)})
    return settings.model_copy(update={"engine": engine})


def config() -> None:
    """Print the default configuration with comments, for `serve --config`."""
    from kvmesh.cluster.config import default_yaml

    typer.echo(default_yaml(), nl=False)


def _settings(path: Path | None, overrides: dict[str, Any]) -> ClusterConfig:
    from kvmesh.cluster.config import load

    return load(path, overrides)
