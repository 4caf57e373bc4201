"""A short measurement, at load, of how KV formats affect a model: mean KL on a built-in text.

The text (`probe.txt`, written for this purpose) has prose, a table, dialogue, code, German
and arithmetic. Its second half repeats names and numbers of the first, so that predicting
it needs keys and values in sealed pages. Only the second half is counted.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import transformers

from kvmesh.kernels.source_digest import source_digest
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.scoring.meter import Meter
from kvmesh.workers.scoring.scorer import Scorer, ScoringRank
from kvmesh.workers.scoring.tally import Tally, compare

_TEXT = Path(__file__).with_name("probe.txt")
_MAX_TOKENS = 1280

_SOURCES = Path(__file__).parents[1]


def code_versions() -> tuple[str, ...]:
    """Digests and versions of the text and the code that the divergences depend on."""
    text = hashlib.sha256(_TEXT.read_bytes()).hexdigest()
    sources = (source_digest(_SOURCES), source_digest(_SOURCES.with_name("kernels")))
    return (text, *sources, torch.__version__, transformers.__version__)


def measure_divergences(
    rank: ScoringRank, model_path: Path, kv_formats: list[str], *, page_size: int, max_tokens: int
) -> list[float]:
    """Mean KL(exact ‖ format) in nats of each format, on the rank that samples; [] on others.

    All ranks of a group call this together: each runs the same plans on its own shard.
    """
    tokenizer = Tokenizer.load(model_path)
    ids = tokenizer.encode(_TEXT.read_text(encoding="utf-8"))[: min(_MAX_TOKENS, max_tokens)]
    tokens = np.array(ids, dtype=np.int32)
    scorers = [
        Scorer(rank.with_format(name), page_size=page_size, context=len(tokens))
        for name in ("exact", *kv_formats)
    ]
    tallies = [Tally() for _ in scorers]
    compare(scorers, tokens, tallies, Meter(), first=len(tokens) // 2)
    del scorers
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the serving pool is allocated next, in one block per layer
    return [tally.mean_kl_nats for tally in tallies[1:] if tally.predictions]
