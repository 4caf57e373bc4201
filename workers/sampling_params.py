"""How the next token is sampled, and the ranges of all numbers in a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.workers.errors import InvalidFieldError

MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
# Logits are divided by the temperature in fp32: at lower ones only the best token would be left.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class NumberRange:
    """The values that a field of a request may have; never NaN or an infinity.

    above: `low` itself is excluded
    """

    low: float
    high: float
    above: bool = False

    def check(self, field: str, value: float, part: str = "") -> None:
        """Raise InvalidFieldError unless the value is within the range.

        part: which part of the field has the value, for the message
        """
        # Every comparison with NaN is false.
        if not self.low <= value <= self.high or (self.above and value == self.low):
            low = f"greater than {self.low}" if self.above else f"from {self.low}"
            joint = " and at most" if self.above else " to"
            message = f"must be {low}{joint} {self.high}, got {value}{part}"
            raise InvalidFieldError(field, message)


# Far from what fp32 can represent: a logit of 100 stays finite under any of these.
RANGES: Mapping[str, NumberRange] = {
    "temperature": NumberRange(0, 100),
    "top_p": NumberRange(0, 1, above=True),
    "top_k": NumberRange(0, 2**31 - 1),
    "min_p": NumberRange(0, 1),
    "repetition_penalty": NumberRange(0.01, 100),
    "presence_penalty": NumberRange(-100, 100),
    "frequency_penalty": NumberRange(-100, 100),
    "logit_bias": NumberRange(-100, 100),
    "seed": NumberRange(0, 2**64 - 1),
    "max_tokens": NumberRange(1, 2**31 - 1),
    "min_tokens": NumberRange(0, 2**31 - 1),
    "logprobs": NumberRange(0, 20),
    "prompt_tokens": NumberRange(1, 2**40),
    "timeout_s": NumberRange(0, 30 * 24 * 3600, above=True),
    "pin_s": NumberRange(0, 24 * 3600),
}
_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one sequence, with the usual meanings, in the ranges of `RANGES`.

    temperature: below MIN_TEMPERATURE it is greedy; otherwise logits are divided by it
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
    prompt_logprobs: the same for the tokens of the prompt; max_tokens may then be 0
    output_optional: max_tokens may be 0 without them, too
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
    prompt_logprobs: int | None = None
    output_optional: bool = False

    def __post_init__(self) -> None:
        optional = self.output_optional or self.prompt_logprobs is not None
        only_prompt = optional and self.max_tokens == 0
        for name in _NUMBERS:
            if not (only_prompt and name == "max_tokens"):
                RANGES[name].check(name, getattr(self, name))
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
            RANGES["logit_bias"].check("logit_bias", bias, f" for token {token_id}")
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                RANGES["logprobs"].check(name, count)

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE
