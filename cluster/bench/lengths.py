"""Distributions of lengths in tokens, as an option names them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

MAX_TOKENS: Final = 1 << 31
FORMS: Final = "N, uniform:LOW,HIGH, normal:MEAN,SD[,LOW,HIGH] or lognormal:MEAN,SIGMA[,LOW,HIGH]"
_NUMBERS: Final = {"fixed": (1,), "uniform": (2,), "normal": (2, 4), "lognormal": (2, 4)}


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """Lengths in tokens, each at least `low` and at most `high`.

    kind: fixed (mean), uniform (low to high, both included), normal (mean, spread: the standard
        deviation), lognormal (mean of the lengths, not of their logarithms; spread: sigma of the
        logarithm). Draws outside low and high become low or high.
    """

    kind: str
    mean: float
    spread: float = 0.0
    low: int = 1
    high: int = MAX_TOKENS

    @classmethod
    def parse(cls, text: str) -> LengthDistribution:
        """Raises ValueError that says what forms there are."""
        kind, colon, rest = text.partition(":")
        kind, rest = (kind, rest) if colon else ("fixed", text)
        try:
            numbers = [float(part) for part in rest.split(",")]
            if len(numbers) not in _NUMBERS[kind]:
                raise ValueError
            return cls._of(kind, numbers)
        except (KeyError, ValueError):
            raise ValueError(f"must be {FORMS}, in tokens from 1; got {text!r}") from None

    @classmethod
    def _of(cls, kind: str, numbers: list[float]) -> LengthDistribution:
        first, *others = numbers
        spread = others[0] if kind in ("normal", "lognormal") else 0.0
        low, high = 1.0, float(MAX_TOKENS)
        if kind == "uniform":
            low, high = numbers
        elif len(numbers) == 4:
            low, high = numbers[2:]
        mean = (low + high) / 2 if kind == "uniform" else first
        whole = [low, high, *([mean] if kind == "fixed" else ())]
        if not all(math.isfinite(x) for x in numbers) or any(x != int(x) for x in whole):
            raise ValueError
        if not (1 <= low <= high <= MAX_TOKENS and 1 <= mean <= MAX_TOKENS and spread >= 0):
            raise ValueError
        return cls(kind, mean, spread, int(low), int(high))

    def draw(self, random: np.random.Generator, count: int) -> Tokens:
        """`count` lengths."""
        match self.kind:
            case "fixed":
                drawn = np.full(count, self.mean)
            case "uniform":
                drawn = random.integers(self.low, self.high + 1, count).astype(float)
            case "normal":
                drawn = random.normal(self.mean, self.spread, count)
            case _:
                location = math.log(self.mean) - self.spread**2 / 2
                drawn = random.lognormal(location, self.spread, count)
        whole: Tokens = np.clip(drawn.round(), self.low, self.high).astype(np.int64)
        return whole


# ShareGPT's published means (Kwon et al., "Efficient Memory Management for Large Language Model
# Serving with PagedAttention", 2023, figure 11). The spread is our choice.
SHAREGPT_LONGEST: Final = 2048
SHAREGPT_PROMPTS: Final = LengthDistribution("lognormal", 161.31, 1.0, 4, SHAREGPT_LONGEST // 2)
SHAREGPT_OUTPUTS: Final = LengthDistribution("lognormal", 337.99, 0.7, 4, SHAREGPT_LONGEST)
