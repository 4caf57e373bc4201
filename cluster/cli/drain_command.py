"""`kvmesh drain-node`: what a node does before it ends, as a pod's preStop hook."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmesh.cluster.cli.console import notes
from kvmesh.cluster.cli.exits import CommandFailed, ExitCode
from kvmesh.cluster.cli.options import QuietOption


def drain_node(
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which this node may end.")
    ] = 60.0,
    address: Annotated[str, typer.Option(help="The Ray cluster.")] = "auto",
    node_id: Annotated[
        str | None, typer.Option(help="Another node of the cluster, by Ray's id of it.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Move what runs on this node of a Ray cluster elsewhere, and wait until it has ended."""
    from kvmesh.cluster.node_drain import drain_node as drain

    def report(left: int) -> None:
        notes.print(f"  waiting for {left} processes")

    if not drain(timeout, report, address=address, node_id=node_id):
        raise CommandFailed(f"not drained within {timeout:g} s", ExitCode.DEADLINE)
