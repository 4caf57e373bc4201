"""`kvmesh calibrate`: writes the file that a calibrated KV format needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cluster.cli.console import human_bytes, notes, out
from kvmesh.cluster.cli.exits import errors_by_option
from kvmesh.cluster.cli.options import QuietOption


def calibrate(
    model: Annotated[
        str, typer.Option(help="A local Hugging Face directory, a GGUF file, or a hub name.")
    ],
    kv_format: Annotated[str, typer.Option(help="A KV format that needs calibration, e.g. nuq4.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text that resembles your requests.")],
    output: Annotated[Path, typer.Option(help="File to write, e.g. nuq4.safetensors.")],
    samples: Annotated[int, typer.Option(help="Number of windows of the text.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    quiet: QuietOption = False,
) -> None:
    """Measure a model's parameters for a KV format, for `serve --calibration`."""
    with errors_by_option():
        _calibrate(model, kv_format, text, output, samples, context)


def _calibrate(
    model: str, kv_format: str, text: Path, output: Path, samples: int, context: int
) -> None:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    from kvmesh.workers.calibration.calibrate import calibrate as run

    contents = _read(text)
    _check_output(output)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=notes) as progress:
        tasks: dict[str, TaskID] = {}

        def report(step: str, share: float | None) -> None:
            if step not in tasks:
                for task in tasks.values():
                    progress.update(task, total=1.0, completed=1.0)
                tasks[step] = progress.add_task(step, total=None)
            if share is not None:
                progress.update(tasks[step], total=1.0, completed=share)

        result = run(model, kv_format, contents, samples=samples, context=context, progress=report)
        result.save(output)
        for task in tasks.values():
            progress.update(task, total=1.0, completed=1.0)
    out.print(
        f"{output}: {kv_format} for {result.model}, revision {result.model_revision}, "
        f"{human_bytes(output.stat().st_size)}",
        soft_wrap=True,
    )


def _read(text: Path) -> str:
    from kvmesh.workers.errors import ConfigError

    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError("text", f"cannot read {text}: {reason}") from None


def _check_output(output: Path) -> None:
    """Raises ConfigError before the model runs instead of after it."""
    from kvmesh.workers.errors import ConfigError

    if output.is_dir():
        raise ConfigError("output", f"{output} is a directory")
    if not output.absolute().parent.is_dir():
        raise ConfigError("output", f"the directory {output.absolute().parent} does not exist")
    if not os.access(output.absolute().parent, os.W_OK):
        raise ConfigError("output", f"{output.absolute().parent} is not writable")
