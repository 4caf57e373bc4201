"""The `kvmesh` command, run in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from unittest import mock

import typer.testing
from typer.main import get_command
from typer.testing import CliRunner, Result

from kvmesh.cluster.cli.commands import app


@cache
def _command() -> Any:
    """All commands with their options, which take longer to build than most take to run."""
    return get_command(app)


def run_kvmesh(
    arguments: Sequence[str],
    env: Mapping[str, str | None] | None = None,
    input: bytes | str | None = None,
) -> Result:
    with mock.patch.object(typer.testing, "_get_command", return_value=_command()):
        return CliRunner().invoke(app, arguments, input=input, env=env)
