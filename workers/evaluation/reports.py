"""Results of evaluations. Torch-free: the command line prints them."""

from __future__ import annotations

from dataclasses import dataclass

LONG_CONTEXT = 32_768


@dataclass(frozen=True, slots=True)
class FormatPerplexity:
    """One format's results.

    loss: perplexity divided by that of exact KV, minus 1
    kl_nats: mean KL(exact ‖ format) of the next-token distributions
    kl_error_nats: standard error of that mean over the windows, None with a single window
    sealed_bits: per element of a sealed page, including metadata
    bits, bytes_per_token: at the measured context, including exact windows at 16 bits
    bits_at_32k: the same at 32,768 tokens
    """

    kv_format: str
    perplexity: float
    loss: float
    kl_nats: float
    kl_error_nats: float | None
    sealed_bits: float
    bits: float
    bits_at_32k: float
    bytes_per_token: float
    sink_pages: int
    recent_pages: int


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """Results of one run: the same windows for all formats, `exact` first."""

    model: str
    model_revision: str
    dtype: str
    weight_format: str
    page_size: int
    context: int
    windows: int
    predictions: int
    formats: list[FormatPerplexity]


@dataclass(frozen=True, slots=True)
class FormatRecall:
    """accuracy: share of the second copy's tokens predicted, mean over the passages;
    difference: to that of exact KV; kl_nats: mean KL(exact ‖ format) on the second copy"""

    kv_format: str
    length: int
    accuracy: float
    difference: float
    kl_nats: float


@dataclass(frozen=True, slots=True)
class RecallReport:
    """passages: per length, in the order of the formats' results, `exact` first"""

    model: str
    model_revision: str
    dtype: str
    weight_format: str
    page_size: int
    passages: dict[int, int]
    figures: list[FormatRecall]


@dataclass(frozen=True, slots=True)
class FormatPasskey:
    """found: out of `asked` numbers, those in the first ten tokens of greedy output;
    missed_depths: relative positions of the numbers that were not found"""

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
    weight_format: str
    page_size: int
    depths: int
    seeds: int
    figures: list[FormatPasskey]


@dataclass(frozen=True, slots=True)
class FormatRuler:
    """score: mean share of a prompt's answers that greedy output has; error: its standard error,
    None of one sample"""

    kv_format: str
    length: int
    task: str
    score: float
    error: float | None


@dataclass(frozen=True, slots=True)
class RulerReport:
    """figures: by length, then format, `exact` first, then task

    rope: scaling instead of the model's own, None for that; samples: of each figure
    """

    model: str
    model_revision: str
    dtype: str
    weight_format: str
    page_size: int
    rope: str | None
    samples: int
    seed: int
    figures: list[FormatRuler]
