"""Prompts of a given length, as token ids or as words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.cluster.bench.workload import BenchRequest

# Frequent words, each of which is one token with the space before it in the usual vocabularies.
_TEXT = (
    "the of and to in is was for on that with as by at from it an are be this which or not his "
    "have had has were their one all two also who after but when more first can new time into "
    "some other people would may most only between many such these been about over no some out "
    "then made used part during where any three while year years city world life day work state "
    "name place house water small large long high old great different same number group school "
    "war country north south east west land river line end side area public law right early "
    "white black red open close left hand head man men woman child family music game team play "
    "book story form point case system power order local national common general main second "
    "last next known called found given took came went set built held kept left made put read"
)
WORDS = _TEXT.split()


# Streams of random numbers, so that no two parts of prompts are alike by chance.
_PREFIX, _BLOCK, _OWN = range(3)


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Makes a request's prompt; the same request has the same prompt in every run.

    low, high: token ids are from `low` to `high` - 1; below are special tokens in many
        vocabularies, and most have this many
    prefix_tokens: at the start of every prompt, the same for all; part of its length
    words: text instead of token ids, a word for a token
    """

    seed: int
    low: int = 100
    high: int = 30_000
    prefix_tokens: int = 0
    words: bool = False

    def make(self, request: BenchRequest) -> str | list[int]:
        if request.text is not None:
            return request.text
        parts = [self._draw(min(self.prefix_tokens, request.prompt_tokens), _PREFIX)]
        parts += [self._draw(request.block_tokens, _BLOCK, block) for block in request.blocks]
        left = request.prompt_tokens - sum(map(len, parts))
        whole = np.concatenate([*parts, self._draw(max(left, 0), _OWN, request.number)])
        ids: list[int] = whole[: request.prompt_tokens].tolist()
        return " ".join(WORDS[index] for index in ids) if self.words else ids

    def _draw(self, count: int, *stream: int) -> npt.NDArray[np.int64]:
        low, high = (0, len(WORDS)) if self.words else (self.low, self.high)
        return np.random.default_rng([self.seed, *stream]).integers(low, high, count)
