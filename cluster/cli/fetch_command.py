"""`kvmesh fetch`: has a model ready before it is served, in an image or on a volume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cluster.cli.console import Steps, out
from kvmesh.cluster.cli.exits import errors_by_option
from kvmesh.cluster.cli.options import QuietOption
from kvmesh.cluster.config import DEFAULT_MODEL


def fetch(
    model: Annotated[
        str, typer.Argument(help="The embedded model's name, a GGUF file, or a hub name.")
    ] = DEFAULT_MODEL,
    root: Annotated[
        Path | None,
        typer.Option(help="Where converted models are kept; by default in the cache directory."),
    ] = None,
    installed: Annotated[
        bool,
        typer.Option(
            "--installed", help="Keep it with this Python environment, as an image needs it."
        ),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Download and convert a model, and print its directory."""
    from kvmesh.workers.model.source import resolve_model
    from kvmesh.workers.model.store import installed_root

    if installed and root is not None:
        raise typer.BadParameter("give one of --root and --installed")
    with errors_by_option(), Steps() as steps:
        files = resolve_model(model, progress=steps, root=installed_root() if installed else root)
    out.print(str(files.path), markup=False, soft_wrap=True)
