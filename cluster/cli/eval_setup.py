"""What the commands of `kvmesh eval` have in common: their options, and the model they load."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cluster.cli.console import Steps, notes
from kvmesh.cluster.cli.exits import errors_by_option

if TYPE_CHECKING:
    from kvmesh.workers.evaluation.model import EvaluatedModel
    from kvmesh.workers.rope_override import RopeOverride
    from kvmesh.workers.scoring.meter import Meter

ModelOption = Annotated[
    str | None, typer.Option(help="A local Hugging Face directory, a GGUF file, or a hub name.")
]
FormatsOption = Annotated[
    str, typer.Option("--kv-format", metavar="F[,F…]", help="KV formats; see `kvmesh formats`.")
]
TextOption = Annotated[Path, typer.Option(help="UTF-8 text that was not used for calibration.")]
LengthsOption = Annotated[str, typer.Option(metavar="N[,N…]", help="Lengths in tokens.")]
PageSizeOption = Annotated[int, typer.Option(help="Tokens a page.")]
SinkOption = Annotated[
    int | None, typer.Option("--sink-pages", help="First pages kept exact; default: the format's.")
]
RecentOption = Annotated[
    int | None,
    typer.Option("--recent-pages", help="Latest pages kept exact; default: the format's."),
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, or auto as in `serve`.")]
WeightFormatOption = Annotated[
    str,
    typer.Option(
        "--weight-format", help="How weights are stored: exact, int8, int4, fp8 or decoded."
    ),
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="FILE[,FILE…]",
        help="Files of `kvmesh calibrate`, for calibrated formats.",
    ),
]


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """Prepare the process, and report a ConfigError with the name of its option."""
    # Before the commands import torch and Numba.
    from kvmesh.workers.cache_directory import keep_compiled_loops
    from kvmesh.workers.threads import wait_passively

    wait_passively(os.environ)
    keep_compiled_loops(os.environ)
    with errors_by_option():
        yield


@contextlib.contextmanager
def evaluated(
    model: str | None, settings: dict[str, Any], calibrations: list[str]
) -> Iterator[tuple[EvaluatedModel, Meter]]:
    """The loaded model, and a meter that moves a progress bar, or prints lines in a log."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from kvmesh.cluster.config import DEFAULT_MODEL
    from kvmesh.workers.config import EngineConfig
    from kvmesh.workers.evaluation.model import EvaluatedModel
    from kvmesh.workers.scoring.meter import Meter

    config = EngineConfig(model=model or DEFAULT_MODEL, **settings)
    if not notes.is_terminal:
        with Steps() as steps:
            meter = Meter(lambda done, total: steps("computing tokens", done / max(total, 1)))
            yield EvaluatedModel(config, steps, calibrations), meter
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(f"loading {config.model}", total=None)

        def report(step: str, share: float | None) -> None:
            total = None if share is None else 1.0
            bar.update(task, description=step, total=total, completed=share or 0.0)

        def count(done: int, total: int) -> None:
            bar.update(task, description="tokens", total=total, completed=done)

        yield EvaluatedModel(config, report, calibrations), Meter(count)


def engine_settings(
    page_size: int,
    sink_pages: int | None,
    recent_pages: int | None,
    dtype: str,
    weight_format: str,
    rope: str = "",
) -> dict[str, Any]:
    """Of the engine. rope: TYPE:FACTOR, or "" for the model's own; raises ConfigError(rope)."""
    return {
        "rope": _rope(rope),
        "page_size": page_size,
        "sink_pages": sink_pages,
        "recent_pages": recent_pages,
        "dtype": dtype,
        "weight_format": weight_format,
    }


def _rope(text: str) -> RopeOverride | None:
    from kvmesh.workers.errors import ConfigError
    from kvmesh.workers.rope_override import RopeOverride

    if not text:
        return None
    kind, _, factor = text.partition(":")
    try:
        return RopeOverride.model_validate({"type": kind, "factor": factor})
    except ValueError:
        raise ConfigError(
            "rope", f"must be linear, ntk or yarn, and a factor above 1, e.g. yarn:4; got {text!r}"
        ) from None


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def lengths_of(values: str) -> list[int]:
    """The distinct lengths, shortest first. Raises ConfigError(lengths)."""
    from kvmesh.workers.errors import ConfigError

    parts = split(values)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError("lengths", f"must be whole numbers separated by commas, got {values!r}")
    return sorted({int(part) for part in parts})
