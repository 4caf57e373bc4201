"""`kvmesh simulate`, handed on whole, so that the other commands do not load the simulator."""

from __future__ import annotations

import typer

# Every option, --help too, is the simulator's to read.
HANDED_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def simulate(context: typer.Context) -> None:
    """Simulate a fleet on a trace, with the router's own code."""
    from kvmesh.cluster.simulator.cli import app

    app(args=context.args, prog_name="kvmesh simulate")
