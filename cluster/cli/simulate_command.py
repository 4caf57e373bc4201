"""`kvmesh simulate`: passes all arguments on, so that other commands do not load the simulator."""

from __future__ import annotations

import typer

from kvmesh.cluster.cli.exits import CommandFailed, ExitCode

# The simulator parses every option, including --help.
PASS_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def simulate(context: typer.Context) -> None:
    """Simulate a fleet on a trace, with the router's code."""
    from kvmesh.cluster.simulator.cli import app

    # Its errors are printed like those of other commands.
    try:
        code = app(args=context.args, prog_name="kvmesh simulate", standalone_mode=False)
    except ValueError as error:  # an option, or a file that it names
        raise CommandFailed(str(error), ExitCode.USAGE) from error
    raise typer.Exit(code or 0)
