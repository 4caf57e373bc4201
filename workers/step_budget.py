"""How large chunks of prompts may be, so that sequences that decode do not wait long for a step.

A step's time is fitted to the steps seen, least squares of the relative error, old ones fading:

    seconds = a + b · prompt tokens + c · pairs + d · context        a, b, c, d ≥ 0

where pairs are those of (query, key) in chunks, and context is what decoding sequences read. The
first step of a kind may compile kernels: it counts for little, as its relative error is divided
by its time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DEFAULT_MAX_STEP_S = 0.1  # on GPUs
FADE = 0.99  # of what is known, with each step
RIDGE = 1e-6  # of each coefficient's own weight; decides between those that always vary together
# Where decoding alone takes long already, a step may take this many times as long.
MIN_STRETCH = 2.0
UNLIMITED = 1 << 62

Vector = npt.NDArray[np.float64]


@dataclass(slots=True)
class StepWork:
    """What a step computes. pairs: of (query, key), in chunks of prompts"""

    decoding: int = 0
    context_tokens: int = 0
    prompt_tokens: int = 0
    pairs: float = 0.0

    def add(self, start: int, end: int, sign: int = 1) -> None:
        """Count a chunk of the tokens [start, end) of a sequence, or with -1 no longer. One of a
        single token is a sequence that decodes, or costs as little."""
        count = end - start
        if count == 1:
            self.decoding += sign
            self.context_tokens += sign * end
        else:
            self.prompt_tokens += sign * count
            self.pairs += sign * count * (start + 0.5 * count)

    def vector(self) -> Vector:
        return np.array([1.0, self.prompt_tokens, self.pairs, self.context_tokens])


class StepBudget:
    """Learns from the steps of one engine.

    max_step_s: what a step may take while sequences decode
    """

    def __init__(self, max_step_s: float) -> None:
        self._max_step_s = max_step_s
        self._products = np.zeros((4, 4))
        self._sums = np.zeros(4)
        self._coefficients: Vector | None = np.zeros(4)  # None: to be fitted again

    def learn(self, work: StepWork, seconds: float) -> None:
        """A step with this work was executed in this time, which is more than 0."""
        row = work.vector() / seconds
        self._products = FADE * self._products + np.outer(row, row)
        self._sums = FADE * self._sums + row
        self._coefficients = None

    def chunk_tokens(self, work: StepWork, start: int) -> int:
        """How many tokens of a prompt fit in a step that has this work already, 0 if none.

        start: of the chunk; whether any fit does not depend on it. A large number if nothing
        decodes, or nothing is known of prompts yet.
        """
        constant, token_s, pair_s, context_s = self._fitted()
        if not work.decoding or token_s + pair_s == 0.0:
            return UNLIMITED
        decode_s = constant + context_s * work.context_tokens
        limit_s = max(self._max_step_s, MIN_STRETCH * decode_s)
        left_s = limit_s - decode_s - token_s * work.prompt_tokens - pair_s * work.pairs
        if left_s <= 0.0:
            return 0
        # pair_s / 2 · n² + (token_s + pair_s · start) · n = left_s
        linear = token_s + pair_s * start
        count = 2.0 * left_s / (linear + math.sqrt(linear**2 + 2.0 * pair_s * left_s))
        return max(1, int(count))

    def _fitted(self) -> Vector:
        if self._coefficients is None:
            self._coefficients = _non_negative(self._products, self._sums)
        return self._coefficients


def _non_negative(products: Vector, sums: Vector) -> Vector:
    """Solve products · x = sums, where coefficients that would be negative are 0."""
    solution = np.zeros(len(sums))
    kept = np.flatnonzero(np.diag(products) > 0.0)
    while kept.size:
        square = products[np.ix_(kept, kept)]
        found = np.linalg.solve(square + RIDGE * np.diag(np.diag(square)), sums[kept])
        if (found >= 0.0).all():
            solution[kept] = found
            break
        kept = np.delete(kept, int(np.argmin(found * np.diag(square) ** 0.5)))
    return solution
