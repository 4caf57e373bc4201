"""`kvmesh eval perplexity`, `passkey`, `recall` and `ruler`: how much KV formats degrade a model.

They run the engine in this process, without Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cluster.cli.console import out, print_json
from kvmesh.cluster.cli.eval_setup import (
    CalibrationOption,
    DtypeOption,
    FormatsOption,
    LengthsOption,
    ModelOption,
    PageSizeOption,
    RecentOption,
    SinkOption,
    TextOption,
    WeightFormatOption,
    engine_settings,
    evaluated,
    evaluating,
    lengths_of,
    split,
)
from kvmesh.cluster.cli.options import JsonOption, QuietOption
from kvmesh.cluster.cli.plots import plotter

eval_app = typer.Typer(
    help="Measure how much KV formats degrade a model, with the engine itself.",
    no_args_is_help=True,
)


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
        Path | None, typer.Option(metavar="FILE.png", help="Plot bits against KL to this file.")
    ] = None,
) -> None:
    """Measure perplexity and the divergence from exact KV on windows of text."""
    with evaluating():
        draw = None if plot is None else plotter(plot, "--plot", "eval_plot", "plot_perplexity")
        from kvmesh.workers.evaluation.model import choose_formats
        from kvmesh.workers.evaluation.perplexity import measure_perplexity
        from kvmesh.workers.evaluation.text import read_text

        formats, source = choose_formats(split(kv_format)), read_text(text)
        settings = engine_settings(page_size, sink_pages, recent_pages, dtype, weight_format)
        with evaluated(model, settings, split(calibration)) as (loaded, meter):
            report = measure_perplexity(
                loaded, formats, source, context=context, windows=windows, meter=meter
            )
        if as_json:
            print_json(report)
        else:
            from kvmesh.cluster.cli.eval_tables import perplexity_table

            out.print(perplexity_table(report))
        if draw is not None:
            draw([report])


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
    with evaluating():
        from kvmesh.workers.evaluation.model import choose_formats
        from kvmesh.workers.evaluation.passkey import measure_passkey
        from kvmesh.workers.evaluation.text import read_text

        formats, source = choose_formats(split(kv_format)), read_text(text)
        sizes = lengths_of(lengths)
        settings = engine_settings(page_size, sink_pages, recent_pages, dtype, weight_format)
        with evaluated(model, settings, split(calibration)) as (loaded, meter):
            report = measure_passkey(
                loaded,
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
    with evaluating():
        from kvmesh.workers.evaluation.model import choose_formats
        from kvmesh.workers.evaluation.recall import measure_recall
        from kvmesh.workers.evaluation.text import read_text

        formats, source = choose_formats(split(kv_format)), read_text(text)
        sizes = lengths_of(lengths)
        settings = engine_settings(page_size, sink_pages, recent_pages, dtype, weight_format)
        with evaluated(model, settings, split(calibration)) as (loaded, meter):
            report = measure_recall(
                loaded, formats, source, lengths=sizes, passages=passages, meter=meter
            )
        if as_json:
            print_json(report)
        else:
            from kvmesh.cluster.cli.eval_tables import recall_table

            out.print(recall_table(report))


@eval_app.command("ruler")
def ruler(
    kv_format: FormatsOption,
    model: ModelOption = None,
    tasks: Annotated[
        str,
        typer.Option(metavar="T[,T…]", help="Tasks; default: all."),
    ] = "multi-key,multi-value,variables,common-words,frequent-words",
    lengths: LengthsOption = "4096,8192",
    samples: Annotated[int, typer.Option(min=1, help="Prompts per task and length.")] = 10,
    seed: Annotated[int, typer.Option(help="Another one makes other prompts.")] = 0,
    rope: Annotated[
        str,
        typer.Option(
            metavar="TYPE:FACTOR",
            help="RoPE scaling instead of the model's own, e.g. yarn:4 (engine.rope).",
        ),
    ] = "",
    page_size: PageSizeOption = 64,
    sink_pages: SinkOption = None,
    recent_pages: RecentOption = None,
    dtype: DtypeOption = "auto",
    weight_format: WeightFormatOption = "exact",
    calibration: CalibrationOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Plot scores by length to this file.")
    ] = None,
) -> None:
    """Measure what the model finds, follows and counts in generated long texts."""
    with evaluating():
        draw = None if plot is None else plotter(plot, "--plot", "ruler_plot", "plot_ruler")
        from kvmesh.workers.evaluation.model import choose_formats
        from kvmesh.workers.evaluation.ruler import measure_ruler

        formats, sizes = choose_formats(split(kv_format)), lengths_of(lengths)
        settings = engine_settings(page_size, sink_pages, recent_pages, dtype, weight_format, rope)
        with evaluated(model, settings, split(calibration)) as (loaded, meter):
            report = measure_ruler(
                loaded,
                formats,
                tasks=split(tasks),
                lengths=sizes,
                samples=samples,
                seed=seed,
                meter=meter,
            )
        if as_json:
            print_json(report)
        else:
            from kvmesh.cluster.cli.eval_tables import ruler_table

            out.print(ruler_table(report))
        if draw is not None:
            draw(report)
