"""The log-likelihood of a text, or of what follows one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvmesh.client import AsyncClient
from kvmesh.client.errors import InvalidRequestError
from kvmesh.client.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds the scored tokens, each after all before it.

    tokens: that are scored: all of a continuation, otherwise all but the first, which nothing
        predicts. Each has the model's own best token in `top`
    prompt_tokens: before them
    """

    tokens: tuple[TokenLogprobs, ...]
    prompt_tokens: int

    @property
    def logprob(self) -> float:
        """Natural log of the probability of all tokens together."""
        return math.fsum(token.chosen.logprob for token in self.tokens)

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would have generated these tokens."""
        return all(token.chosen.logprob >= token.top[0].logprob for token in self.tokens)

    @property
    def perplexity(self) -> float:
        """Of a token, on average; NaN if none is scored."""
        if not self.tokens:
            return math.nan
        return math.exp(-self.logprob / len(self.tokens))


async def score(client: AsyncClient, prompt: Any, continuation: Any) -> Score:
    """The score of a continuation; of the prompt itself if there is none. Both are text or ids."""
    ids, prompt_tokens = await _tokens(client, prompt, continuation)
    # As a stream, because one reply holds the scores of some hundred thousand tokens.
    async with client.generate_stream(ids, max_tokens=0, prompt_logprobs=1) as stream:
        async for _ in stream:
            pass
    return Score(stream.completion.prompt_logprobs[prompt_tokens - 1 :], prompt_tokens)


async def _tokens(client: AsyncClient, prompt: Any, continuation: Any) -> tuple[Sequence[int], int]:
    """All tokens, and how many come before those that are scored."""
    if continuation is None:
        return await _ids(client, prompt), 1
    if isinstance(prompt, str) is not isinstance(continuation, str):
        raise InvalidRequestError.of(
            "continuations", "must be text after text, and token ids after token ids"
        )
    if not len(continuation):
        raise InvalidRequestError.of("continuations", "must not be empty")
    if not isinstance(prompt, str):
        ids, before = [*prompt, *continuation], len(prompt)
    else:
        ids, before = await _tokens_of_text(client, prompt, continuation)
    if not before:
        raise InvalidRequestError.of(
            "continuations",
            "begins in the first token of the text, which nothing predicts; use a longer prompt",
        )
    return ids, before


async def _tokens_of_text(
    client: AsyncClient, prompt: str, continuation: str
) -> tuple[list[int], int]:
    # Tokens of the whole text: a model sees it so, and a token may begin before the continuation.
    ids = await _ids(client, prompt + continuation)
    if not prompt:
        return ids, 0
    same = [a == b for a, b in zip(ids, await _ids(client, prompt), strict=False)]
    return ids, [*same, False].index(False)


async def _ids(client: AsyncClient, prompt: Any) -> list[int]:
    return list((await client.tokenize(prompt)).token_ids) if isinstance(prompt, str) else prompt
