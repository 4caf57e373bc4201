"""Recall at a distance: a passage, other text, and the passage again.

    0        256                     length          length + 256
    |passage |------ other text ------|-- passage ---|

What predicts the second copy's tokens is `length` tokens back, beyond any recent window:
next-token accuracy on it measures fidelity at that distance.
"""

from __future__ import annotations

import numpy as np

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.evaluation.model import EvaluatedModel
from kvmesh.workers.evaluation.reports import FormatRecall, RecallReport
from kvmesh.workers.evaluation.text import TokenText
from kvmesh.workers.scoring.meter import Meter
from kvmesh.workers.scoring.tally import Tally, compare

PASSAGE_TOKENS = 256


def measure_recall(
    model: EvaluatedModel,
    formats: list[KVFormat],
    text: str,
    *,
    lengths: list[int],
    passages: int,
    meter: Meter,
) -> RecallReport:
    """formats: exact first, as returned by choose_formats.

    lengths: tokens from the first copy's beginning to the second's; passages: maximum number
    Raises ConfigError naming the invalid argument: lengths, text, kv_format.
    """
    for length in lengths:
        if length <= PASSAGE_TOKENS:
            raise ConfigError(
                "lengths", f"must be more than a passage's {PASSAGE_TOKENS} tokens, got {length}"
            )
        model.check_length("lengths", length + PASSAGE_TOKENS)
    for fmt in formats:
        model.footprint(fmt)
    source = TokenText(model.tokenizer, text)
    windows = {length: source.windows(length, passages) for length in lengths}
    for length, parts in windows.items():
        meter.plan((length + PASSAGE_TOKENS) * len(parts) * len(formats))
    figures: list[FormatRecall] = []
    for length, parts in windows.items():
        scorers = [model.scorer(fmt, length + PASSAGE_TOKENS) for fmt in formats]
        tallies = [Tally() for _ in formats]
        begin = len(source.prefix)
        for window in parts:
            tokens = np.concatenate((window, window[begin : begin + PASSAGE_TOKENS]))
            compare(scorers, tokens, tallies, meter, first=length)
        figures += [
            FormatRecall(
                kv_format=fmt.name,
                length=length,
                accuracy=tally.accuracy,
                difference=tally.accuracy - tallies[0].accuracy,
                kl_nats=tally.mean_kl_nats,
            )
            for fmt, tally in zip(formats, tallies, strict=True)
        ]
    return RecallReport(
        model=model.name,
        model_revision=model.facts.revision,
        dtype=model.dtype,
        weight_format=model.config.weight_format,
        page_size=model.config.page_size,
        passages={length: len(parts) for length, parts in windows.items()},
        figures=figures,
    )
