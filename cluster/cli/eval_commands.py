"""`kvmesh eval perplexity`, `passkey` and `recall`: how much KV formats degrade a model.

They run the engine in this process, without Ray.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cluster.cli.console import Steps, notes, out, print_json
from kvmesh.cluster.cli.exits import errors_by_option
from kvmesh.cluster.cli.options import JsonOption, QuietOption

if TYPE_CHECKING:
    from kvmesh.workers.evaluation.model import EvaluatedModel
    from kvmesh.workers.scoring.meter import Meter

eval_app = typer.Typer(
    help="Measure how much KV formats degrade a model, with the engine itself.",
    no_args_is_help=True,
)

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
    str, typer.Option("--weight-format", help="How weights are stored: exact, int8 or int4.")
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="FILE[,FILE…]",
        help="Files of `kvmesh calibrate`, for calibrated formats.",
    ),
]


@eval_app.command("perplexity")
def perplexity(
    kv_format: FormatsOption,
    text: TextOption,
    model: ModelOption = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[
        int, typer.Option(min=1, help="Maximum number of windows, spread over the text.")
    ] = 8,
    page_size: PageSizeOption = 64,
    sink_pages: SinkOption = None,
    recent_pages: RecentOption = None,
    dtype: DtypeOption = "auto",
    weight_format: WeightFormatOption = "exact",
    calibration: CalibrationOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Plot bits against loss to this file.")
    ] = None,
) -> None:
    """Measure perplexity and the divergence from exact KV on windows of text."""
    with _evaluating():
        draw = None if plot is None else _plotter(plot)
        from kvmesh.workers.evaluation.model import choose_formats
        from kvmesh.workers.evaluation.perplexity import measure_perplexity
        from kvmesh.workers.evaluation.text import read_text

        formats, source = choose_formats(_split(kv_format)), read_text(text)
        settings = _settings(page_size, sink_pages, recent_pages, dtype, weight_format)
        with _evaluated(model, settings, _split(calibration)) as (evaluated, meter):
            report = measure_perplexity(
                evaluated, formats, source, context=context, windows=windows, meter=meter
            )
        if draw is not None:
            draw(report, plot)
        if as_json:
            print_json(report)
        else:
            from kvmesh.cluster.cli.eval_tables import perplexity_table

            out.print(perplexity_table(report))


@eval_app.command("passkey")
def passkey(
    kv_format: FormatsOption,
    text: TextOption,
    model: ModelOption = None,
    lengths: LengthsOption = "1024,4096",
    depths: Annotated[
        int, typer.Option(min=1, help="Number of positions of the passkey in the text.")
    ] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Passkeys and texts per position.")] = 1,
    page_size: PageSizeOption = 64,
    sink_pages: SinkOption = None,
    recent_pages: RecentOption = None,
    dtype: DtypeOption = "auto",
    weight_format: WeightFormatOption = "exact",
    calibration: CalibrationOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how often the model finds a number hidden in text."""
    with _evaluating():
        from kvmesh.workers.evaluation.model import choose_formats
        from kvmesh.workers.evaluation.passkey import measure_passkey
        from kvmesh.workers.evaluation.text import read_text

        formats, source = choose_formats(_split(kv_format)), read_text(text)
        sizes = _lengths(lengths)
        settings = _settings(page_size, sink_pages, recent_pages, dtype, weight_format)
        with _evaluated(model, settings, _split(calibration)) as (evaluated, meter):
            report = measure_passkey(
                evaluated,
                formats,
                source,
                lengths=sizes,
                depths=depths,
                seeds=seeds,
                meter=meter,
            )
        if as_json:
            print_json(report)
        else:
            from kvmesh.cluster.cli.eval_tables import passkey_table

            out.print(passkey_table(report))


@eval_app.command("recall")
def recall(
    kv_format: FormatsOption,
    text: TextOption,
    model: ModelOption = None,
    lengths: LengthsOption = "1024,4096",
    passages: Annotated[int, typer.Option(min=1, help="Maximum passages per length.")] = 10,
    page_size: PageSizeOption = 64,
    sink_pages: SinkOption = None,
    recent_pages: RecentOption = None,
    dtype: DtypeOption = "auto",
    weight_format: WeightFormatOption = "exact",
    calibration: CalibrationOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure next-token accuracy on a passage that is repeated after LENGTH tokens."""
    with _evaluating():
        from kvmesh.workers.evaluation.model import choose_formats
        from kvmesh.workers.evaluation.recall import measure_recall
        from kvmesh.workers.evaluation.text import read_text

        formats, source = choose_formats(_split(kv_format)), read_text(text)
        sizes = _lengths(lengths)
        settings = _settings(page_size, sink_pages, recent_pages, dtype, weight_format)
        with _evaluated(model, settings, _split(calibration)) as (evaluated, meter):
            report = measure_recall(
                evaluated, formats, source, lengths=sizes, passages=passages, meter=meter
            )
        if as_json:
            print_json(report)
        else:
            from kvmesh.cluster.cli.eval_tables import recall_table

            out.print(recall_table(report))


@contextlib.contextmanager
def _evaluating() -> Iterator[None]:
    """Prepare the process, and report a ConfigError with the name of its option."""
    # Before the commands import torch and Numba.
    from kvmesh.workers.cache_directory import keep_compiled_loops
    from kvmesh.workers.threads import wait_passively

    wait_passively(os.environ)
    keep_compiled_loops(os.environ)
    with errors_by_option():
        yield


@contextlib.contextmanager
def _evaluated(
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


def _settings(
    page_size: int,
    sink_pages: int | None,
    recent_pages: int | None,
    dtype: str,
    weight_format: str,
) -> dict[str, Any]:
    return {
        "page_size": page_size,
        "sink_pages": sink_pages,
        "recent_pages": recent_pages,
        "dtype": dtype,
        "weight_format": weight_format,
    }


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _lengths(values: str) -> list[int]:
    """The distinct lengths, shortest first. Raises ConfigError(lengths)."""
    from kvmesh.workers.errors import ConfigError

    parts = _split(values)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError("lengths", f"must be whole numbers separated by commas, got {values!r}")
    return sorted({int(part) for part in parts})


def _plotter(path: Path) -> Any:
    """The function that plots. Raises ConfigError before the work if it could not plot."""
    from kvmesh.workers.errors import ConfigError

    if not path.resolve().parent.is_dir():
        raise ConfigError("plot", f"{path.resolve().parent} is not a directory")
    try:
        from kvmesh.cluster.cli.eval_plot import plot_perplexity
    except ModuleNotFoundError as error:
        raise ConfigError(
            "plot", f"needs {error.name}; install it with: pip install kvmesh[plot]"
        ) from None
    return plot_perplexity
