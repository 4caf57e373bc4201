"""Perplexity and divergence on windows of real text; every token is predicted."""

from __future__ import annotations

import statistics

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.evaluation.model import EvaluatedModel
from kvmesh.workers.evaluation.reports import LONG_CONTEXT, FormatPerplexity, PerplexityReport
from kvmesh.workers.evaluation.text import TokenText
from kvmesh.workers.scoring.meter import Meter
from kvmesh.workers.scoring.tally import Tally, compare


def measure_perplexity(
    model: EvaluatedModel,
    formats: list[KVFormat],
    text: str,
    *,
    context: int,
    windows: int,
    meter: Meter,
) -> PerplexityReport:
    """formats: exact first, as returned by choose_formats.

    windows: maximum number; context: tokens per window
    Raises ConfigError naming the invalid argument: context, text, kv_format.
    """
    model.check_length("context", context)
    footprints = [model.footprint(fmt) for fmt in formats]
    parts = TokenText(model.tokenizer, text).windows(context, windows)
    meter.plan(sum(map(len, parts)) * len(formats))
    scorers = [model.scorer(fmt, context) for fmt in formats]
    by_window = [[Tally() for _ in formats] for _ in parts]
    for tokens, window in zip(parts, by_window, strict=True):
        compare(scorers, tokens, window, meter)
    by_format = list(zip(*by_window, strict=True))
    tallies = [Tally.total(found) for found in by_format]
    figures = [
        FormatPerplexity(
            kv_format=fmt.name,
            perplexity=tally.perplexity,
            loss=tally.perplexity / tallies[0].perplexity - 1,
            kl_nats=tally.mean_kl_nats,
            kl_error_nats=_standard_error([window.mean_kl_nats for window in found]),
            sealed_bits=footprint.sealed_bits,
            bits=footprint.bits_at(context),
            bits_at_32k=footprint.bits_at(LONG_CONTEXT),
            bytes_per_token=footprint.bytes_per_token_at(context),
            sink_pages=footprint.geometry.sink_pages,
            recent_pages=footprint.geometry.recent_pages,
        )
        for fmt, tally, found, footprint in zip(
            formats, tallies, by_format, footprints, strict=True
        )
    ]
    return PerplexityReport(
        model=model.name,
        model_revision=model.facts.revision,
        dtype=model.dtype,
        weight_format=model.config.weight_format,
        page_size=model.config.page_size,
        context=context,
        windows=len(parts),
        predictions=tallies[0].predictions,
        formats=figures,
    )


def _standard_error(values: list[float]) -> float | None:
    """Of their mean; None of a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
