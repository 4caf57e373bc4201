"""The group of all commands: the one place where their errors are printed."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from kvmesh.cluster.cli.exits import ExitCode, friendly_errors

EPILOG = "\n".join(("Exit codes:", *(f"{int(code):>4} {code.meaning}" for code in ExitCode)))


class CommandGroup(TyperGroup):
    """Runs a command, and turns its errors into a line, or JSON, and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Before the command's own options are parsed, as that may be what fails.
        words = args[: args.index("--")] if "--" in args else args
        ctx.meta["json"] = "--json" in words
        with friendly_errors(as_json=ctx.meta["json"]):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with friendly_errors(as_json=ctx.meta["json"]):
            return super().invoke(ctx)
