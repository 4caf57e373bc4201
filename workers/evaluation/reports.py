"""What evaluations report. Torch-free: the command line lays these out."""

from __future__ import annotations

from dataclasses import dataclass

LONG_CONTEXT = 32_768


@dataclass(frozen=True, slots=True)
class FormatPerplexity:
    """One format's figures.

    loss: perplexity over exact KV's, less 1
    kl_nats: mean KL(exact ‖ format) of the next-token distributions
    sealed_bits: per element of a sealed page, metadata included
    bits, bytes_per_token: at the context measured, exact windows counted at 16 bits
    bits_at_32k: the same at 32,768 tokens
    """

    kv_format: str
    perplexity: float
    loss: float
    kl_nats: float
    sealed_bits: float
    bits: float
    bits_at_32k: float
    bytes_per_token: float
    sink_pages: int
    recent_pages: int


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """Figures of one run: the same windows for all formats, `exact` first."""

    model: str
    model_revision: str
    dtype: str
    page_size: int
    context: int
    windows: int
    predictions: int
    formats: list[FormatPerplexity]


@dataclass(frozen=True, slots=True)
class FormatRecall:
    """accuracy: share of the second copy's tokens predicted, mean over the passages;
    difference: to exact KV's; kl_nats: mean KL(exact ‖ format) there"""

    kv_format: str
    length: int
    accuracy: float
    difference: float
    kl_nats: float


@dataclass(frozen=True, slots=True)
class RecallReport:
    """passages: of each length, in the order of the formats' figures, `exact` first"""

    model: str
    model_revision: str
    dtype: str
    page_size: int
    passages: dict[int, int]
    figures: list[FormatRecall]


@dataclass(frozen=True, slots=True)
class FormatPasskey:
    """found: of `asked` numbers, the ones in the first ten tokens of greedy output;
    missed_depths: share of the text before each number that was not found"""

    kv_format: str
    length: int
    found: int
    asked: int
    missed_depths: list[float]


@dataclass(frozen=True, slots=True)
class PasskeyReport:
    """figures: by length, then format, `exact` first"""

    model: str
    model_revision: str
    dtype: str
    page_size: int
    depths: int
    seeds: int
    figures: list[FormatPasskey]
