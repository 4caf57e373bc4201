"""The command line. Commands import what they need when they run, so that `--help` is fast."""

from __future__ import annotations

import typer

from kvmesh.cluster.cli import client_commands, server_commands
from kvmesh.cluster.cli.calibrate_command import calibrate
from kvmesh.cluster.cli.eval_commands import eval_app
from kvmesh.cluster.cli.formats_command import formats
from kvmesh.cluster.cli.simulate_command import PASS_THROUGH, simulate

app = typer.Typer(
    name="kvmesh",
    help="Distributed LLM serving on Ray with a quantised, fully accounted KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("demo")(server_commands.demo)
app.command("serve")(server_commands.serve)
app.command("config")(server_commands.config)
app.command("generate")(client_commands.generate)
app.command("chat")(client_commands.chat)
app.command("status")(client_commands.status)
app.command("estimate")(client_commands.estimate)
app.command("explain")(client_commands.explain)
app.command("calibrate")(calibrate)
app.command("simulate", context_settings=PASS_THROUGH)(simulate)
app.command("formats")(formats)
app.add_typer(eval_app, name="eval")
