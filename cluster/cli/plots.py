"""Plots of results: checked before the work, drawn after its results are printed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from kvmesh.cluster.cli.exits import CommandFailed


def plotter(path: Path, option: str, module: str, name: str) -> Callable[..., None]:
    """What draws to `path`: a function of a module here, without its last argument.

    option: that the path was given with
    Raises BadParameter if it could not draw; what is returned raises CommandFailed.
    """
    if (problem := _problem(path)) is not None:
        raise typer.BadParameter(problem, param_hint=option)
    try:
        from matplotlib.figure import Figure

        draw = getattr(importlib.import_module(f"kvmesh.cluster.cli.{module}"), name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"needs {error.name}; install it with: pip install 'kvmesh[plot]'", param_hint=option
        ) from None
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise typer.BadParameter(
            f"must end in one of .{', .'.join(sorted(formats))}; got {path.name}",
            param_hint=option,
        )

    def checked(*results: Any) -> None:
        try:
            draw(*results, path)
        except (OSError, ValueError) as error:
            raise CommandFailed(f"cannot plot to {path}: {error}") from error

    return checked


def _problem(path: Path) -> str | None:
    """Why no file could be written there."""
    folder = path.resolve().parent
    if not folder.is_dir():
        return f"{folder} is not a directory"
    if path.is_dir():
        return f"{path} is a directory"
    if not os.access(path if path.exists() else folder, os.W_OK):
        return f"{path} cannot be written to"
    return None
