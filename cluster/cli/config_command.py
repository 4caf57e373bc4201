"""`kvmesh config`: the settings, those in effect, and what is wrong with a file."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from kvmesh.cluster.cli.console import print_json
from kvmesh.cluster.cli.options import JsonOption, QuietOption, with_options
from kvmesh.cluster.cli.settings_options import ServeSettings


@with_options
def config(
    settings: ServeSettings,
    effective: Annotated[
        bool,
        typer.Option(
            "--effective", help="Print what `serve` would use here, and where each value is from."
        ),
    ] = False,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Report all that is wrong with a file.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON Schema of the file, for editors.")
    ] = False,
    for_serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Print the configuration of Ray Serve that runs kvmesh with the settings, for "
            "`serve deploy` and for serveConfigV2 on Kubernetes.",
        ),
    ] = False,
    variables: Annotated[
        bool,
        typer.Option(
            "--variables", help="Print what a shell on every node has to run before Ray starts."
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print the default configuration with comments, for `serve --config`."""
    from kvmesh.cluster.autos import autos_here
    from kvmesh.cluster.config import ClusterConfig
    from kvmesh.cluster.config_text import default_yaml, effective_yaml, json_schema, plain
    from kvmesh.cluster.telemetry.gpus import local_gpu_memory

    if effective + schema + for_serve + variables + (check is not None) > 1:
        raise typer.BadParameter(
            "give one of --effective, --check, --schema, --serve and --variables"
        )
    if check is not None and settings.config is not None:
        raise typer.BadParameter("give the file to --check or to --config", param_hint="--check")
    if schema:
        print_json(json_schema())
    elif check is not None:
        settings.load(check)
        if as_json:
            print_json({"file": str(check), "valid": True})
        else:
            typer.echo(f"{check} is valid")
    elif variables:
        _print_variables(settings, as_json)
    elif for_serve:
        _print_for_serve(settings, as_json)
    elif effective or settings.given:
        loaded = settings.load()
        here = autos_here(loaded.config, local_gpu_memory(os.environ))
        if as_json:
            sources = {".".join(path): source for path, source in loaded.sources.items()}
            found = {".".join(path): value for path, value in here.items()}
            print_json({"settings": plain(loaded.config), "sources": sources, "auto": found})
        else:
            typer.echo(effective_yaml(loaded, here), nl=False)
    elif as_json:
        print_json(plain(ClusterConfig()))
    else:
        typer.echo(default_yaml(), nl=False)


def _print_variables(settings: ServeSettings, as_json: bool) -> None:
    from kvmesh.cluster.environment import node_variables

    variables = node_variables(settings.load().config)
    if as_json:
        print_json(variables)
    else:
        typer.echo("\n".join(f"export {name}={quote(value)}" for name, value in variables.items()))


def _print_for_serve(settings: ServeSettings, as_json: bool) -> None:
    from kvmesh.cluster.config_text import block_yaml
    from kvmesh.cluster.serve_config import anywhere, for_nodes, serve_config

    deployed = serve_config(anywhere(for_nodes(settings.load().config), os.environ))
    if as_json:
        print_json(deployed)
    else:
        typer.echo(block_yaml(deployed), nl=False)
