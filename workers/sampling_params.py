"""How the next token is sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.workers.errors import InvalidFieldError

MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one sequence, with the usual meanings.

    temperature: 0 is greedy; otherwise logits are divided by it
    top_k: 0 keeps all tokens
    top_p, min_p: nucleus, and the minimum probability relative to the most likely token's
    repetition_penalty: > 1 discourages tokens of prompt and output (CTRL, arXiv 1909.05858)
    presence_penalty, frequency_penalty: subtracted for tokens of the output (OpenAI's)
    seed: 64 bits; the draw at position i depends only on (seed, i), so that a sequence
        that moves to another engine continues with the same tokens
    max_tokens, min_tokens: of output; before min_tokens no stop token is sampled
    stop_token_ids: end the sequence, like the model's end-of-sequence tokens
    logit_bias: token id -> bias added to its logit
    logprobs: None for none, n for the chosen token's and the n best alternatives'
    Raises InvalidFieldError naming the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidFieldError(name, f"must be from {low:g} to {high:g}, got {value}")
        if self.repetition_penalty <= 0:
            raise InvalidFieldError(
                "repetition_penalty", f"must be greater than 0, got {self.repetition_penalty}"
            )
        if self.top_p <= 0:
            raise InvalidFieldError("top_p", f"must be greater than 0, got {self.top_p}")
        if self.min_tokens > self.max_tokens:
            raise InvalidFieldError(
                "min_tokens",
                f"must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}",
            )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidFieldError(
                "stop_token_ids",
                f"must have at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids)}",
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidFieldError(
                "logit_bias",
                f"must have at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}",
            )
        for token_id, bias in self.logit_bias.items():
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise InvalidFieldError(
                    "logit_bias", f"must be from -100 to 100, got {bias} for token {token_id}"
                )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidFieldError(
                "logprobs", f"must be from 0 to {MAX_TOP_LOGPROBS}, got {self.logprobs}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


# name, minimum, maximum
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 2**31 - 1),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("seed", 0, 2**64 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
)
