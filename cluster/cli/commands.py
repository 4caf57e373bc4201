"""The command line.

Commands import what they need when they run: so `--help` is fast, and those that ask a server work
without the packages of one.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kvmesh.cluster.cli import client_commands, generate_commands, server_commands
from kvmesh.cluster.cli.bench_commands import bench_app
from kvmesh.cluster.cli.calibrate_command import calibrate
from kvmesh.cluster.cli.config_command import config
from kvmesh.cluster.cli.console import notes
from kvmesh.cluster.cli.drain_command import drain_node
from kvmesh.cluster.cli.eval_commands import eval_app
from kvmesh.cluster.cli.fetch_command import fetch
from kvmesh.cluster.cli.formats_command import formats
from kvmesh.cluster.cli.group import EPILOG, CommandGroup
from kvmesh.cluster.cli.options import QuietOption
from kvmesh.cluster.cli.plan_command import plan
from kvmesh.cluster.cli.run_command import run
from kvmesh.cluster.cli.simulate_command import PASS_THROUGH, simulate
from kvmesh.cluster.cli.top_command import top
from kvmesh.cluster.version import package_version

app = typer.Typer(
    name="kvmesh",
    cls=CommandGroup,
    help="Distributed LLM serving on Ray with a quantised, fully accounted KV cache.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvmesh {package_version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    notes.quiet = quiet


app.command("demo")(server_commands.demo)
app.command("serve")(server_commands.serve)
app.command("config")(config)
app.command("drain-node")(drain_node)
app.command("fetch")(fetch)
app.command("generate")(generate_commands.generate)
app.command("chat")(generate_commands.chat)
app.command("status")(client_commands.status)
app.command("models")(client_commands.models)
app.command("loads")(client_commands.loads)
app.command("top")(top)
app.command("estimate")(client_commands.estimate)
app.command("explain")(client_commands.explain)
app.command("abort")(client_commands.abort)
app.command("tokenize")(client_commands.tokenize)
app.command("detokenize")(client_commands.detokenize)
app.command("calibrate")(calibrate)
app.command("plan")(plan)
app.command("run")(run)
app.command("simulate", context_settings=PASS_THROUGH)(simulate)
app.command("formats")(formats)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
