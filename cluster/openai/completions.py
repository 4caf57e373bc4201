"""POST /v1/completions: the request, the reply and its stream."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import msgspec
from pydantic import Discriminator, Tag

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.openai import sse
from kvmesh.cluster.openai.call import EventSource
from kvmesh.cluster.openai.finish import finish_of
from kvmesh.cluster.openai.names import Renames
from kvmesh.cluster.openai.sampling import GenerationBody, put
from kvmesh.cluster.openai.structured import RENAMES, VLLM_RENAMES, ResponseFormat, add_format
from kvmesh.cluster.openai.tokens import ScoredToken, TextOffsets, scored, shown
from kvmesh.cluster.openai.usage import RunningUsage, TokenUsage
from kvmesh.v1 import kvmesh_pb2 as pb

MAX_PROMPTS = 1024
ID_CHARS = 112  # at most, of a request's id to which more is added for each prompt


def _short(request_id: str) -> str:
    """Of at most ID_CHARS characters, and as different from others as the whole."""
    if len(request_id) <= ID_CHARS:
        return request_id
    digest = hashlib.blake2s(request_id.encode(), digest_size=8).hexdigest()
    return f"{request_id[: ID_CHARS - len(digest) - 1]}.{digest}"


def _kind(prompt: object) -> str:
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], list):
            return "[lists of token ids]"
        return "[texts]" if isinstance(prompt[0], str) else "[token ids]"
    return "[text]"


CompletionPrompt = Annotated[
    Annotated[str, Tag("[text]")]
    | Annotated[list[str], Tag("[texts]")]
    | Annotated[list[int], Tag("[token ids]")]
    | Annotated[list[list[int]], Tag("[lists of token ids]")],
    Discriminator(_kind),
]


class CompletionBody(GenerationBody):
    """What POST /v1/completions takes."""

    prompt: CompletionPrompt
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None

    def to_contract(self, headers: Mapping[str, str], request_id: str) -> list[pb.GenerateRequest]:
        """A request for each prompt. Raises InvalidFieldError."""
        self._check()
        prompts = self._prompts()
        places = self.places(len(prompts))
        requests = []
        stem = _short(request_id)
        for index, prompt in enumerate(prompts):
            own_id = f"{stem}-{index}" if len(prompts) > 1 else request_id
            request = self.base_request(headers, own_id)
            if self.max_tokens == 0 and not self.echo and not request.HasField("pin_s"):
                refuse("max_tokens", "must be at least 1, unless echo or pin_s is set")
            params = request.sampling_params
            put(params, "max_tokens", self.max_tokens)
            put(params, "logprobs", self.logprobs)
            if self.echo and (self.logprobs is not None or self.max_tokens == 0):
                params.prompt_logprobs = params.logprobs
            if self.response_format is not None:
                add_format(request, self.response_format.to_contract())
            _fill(request.prompt, places[index], prompt)
            requests.append(request)
        return requests

    def places(self, number: int) -> list[str]:
        """Where each of the prompts is in the body."""
        return [f"prompt[{index}]" for index in range(number)] if self._listed else ["prompt"]

    @property
    def renames(self) -> Renames:
        """Of fields of the contract, for errors."""
        return RENAMES if self.structured_outputs is None else VLLM_RENAMES

    def _check(self) -> None:
        if self.suffix:
            raise UnsupportedFieldError("suffix", "is not supported by this server")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UnsupportedFieldError(
                "best_of", f"must be equal to n, which is {self.n or 1}; got {self.best_of}"
            )

    def _prompts(self) -> list[str | list[int]]:
        if not self._listed:
            return [cast("str | list[int]", self.prompt)]
        if len(self.prompt) > MAX_PROMPTS:
            refuse("prompt", f"must have at most {MAX_PROMPTS} prompts, got {len(self.prompt)}")
        return list(cast("Sequence[str | list[int]]", self.prompt))

    @property
    def _listed(self) -> bool:
        """Whether there is a list of prompts, even if it has one."""
        prompt: Sequence[object] = self.prompt
        return isinstance(prompt, list) and any(isinstance(x, str | list) for x in prompt[:1])


def _fill(prompt: pb.Prompt, field: str, given: str | list[int]) -> None:
    """In place: a million ids take 20 ms to copy."""
    if isinstance(given, str):
        prompt.text = given
        return
    try:
        prompt.token_ids.ids.extend(given)
    except ValueError:
        refuse(field, "must have token ids from 0 to 2^31 - 1")
    if not given:
        prompt.token_ids.SetInParent()


class CompletionLogprobs(msgspec.Struct):
    """Columns, one entry a token. top_logprobs: with the token itself; null without alternatives"""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """stop_reason: the stop string, or the stop token's id, that ended it"""

    index: int
    text: str
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: CompletionLogprobs | None


class CompletionReply(msgspec.Struct):
    """A reply, or a chunk of a stream."""

    id: str
    model: str
    choices: list[CompletionChoice]
    created: int
    usage: TokenUsage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "text_completion"


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt, with which a choice begins. first_token: its bytes, if tokens are shown"""

    text: str = ""
    first_token: bytes | None = None

    def tokens(self, scores: pb.Logprobs) -> list[ScoredToken]:
        """scores: of the prompt's tokens from its second on"""
        if self.first_token is None:
            return []
        return [ScoredToken(self.first_token, None), *scored(scores)]


class ScoredText:
    """The text of a choice with its tokens, as OpenAI's columns. width: asked for alternatives"""

    def __init__(self, width: int, start: int = 0) -> None:
        self._width = width
        self._offsets = TextOffsets(start)

    def columns(self, tokens: Sequence[ScoredToken]) -> CompletionLogprobs:
        """Of the next tokens."""
        return CompletionLogprobs(
            [shown(token.text) for token in tokens],
            [token.logprob for token in tokens],
            [_alternatives(token) for token in tokens] if self._width else None,
            [self._offsets.next(token.text) for token in tokens],
        )


def _alternatives(token: ScoredToken) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for text, logprob in token.top:  # the likeliest first
        found.setdefault(shown(text), logprob)
    # Where tokens look the same, the one that was chosen counts.
    found[shown(token.text)] = token.logprob
    return found


def completion_reply(
    body: CompletionBody,
    request_id: str,
    generated: Sequence[pb.GenerateResponse],
    echoes: Sequence[Echo],
    usage: TokenUsage,
) -> CompletionReply:
    """generated, echoes: of each prompt"""
    choices = [
        _choice(body, choice, number * (body.n or 1), echo, reply.prompt_logprobs)
        for number, (reply, echo) in enumerate(zip(generated, echoes, strict=True))
        for choice in reply.choices
    ]
    return CompletionReply(
        f"cmpl-{request_id}",
        generated[0].model,
        choices,
        int(time.time()),
        usage,
    )


def _choice(
    body: CompletionBody, choice: pb.Choice, first: int, echo: Echo, prompt: pb.Logprobs
) -> CompletionChoice:
    finish = finish_of(choice)
    scores = None
    if body.logprobs is not None:
        tokens = [*echo.tokens(prompt), *scored(choice.logprobs)]
        scores = ScoredText(body.logprobs).columns(tokens)
    return CompletionChoice(
        first + choice.index, echo.text + choice.text, finish.reason, finish.stop, scores
    )


class CompletionChunks:
    """The stream of the events of one or more prompts."""

    def __init__(self, body: CompletionBody, request_id: str, echoes: Sequence[Echo]) -> None:
        self._body = body
        self._echoes = echoes
        self._usage = RunningUsage()
        self._chunk = CompletionReply(f"cmpl-{request_id}", "", [], int(time.time()))
        self._texts: dict[int, ScoredText] = {}
        self._prompts: defaultdict[int, pb.Logprobs] = defaultdict(pb.Logprobs)

    async def read(self, source: EventSource) -> AsyncIterator[bytes]:
        async for number, event in source:
            self._usage.note(number, event)
            for chunk in self._chunks(number, event):
                yield chunk
        if self._body.include_usage:
            self._chunk.choices, self._chunk.usage = [], self._usage.final
            yield sse.data(self._chunk)
        yield sse.DONE

    def _chunks(self, number: int, event: pb.GenerateStreamResponse) -> Iterator[bytes]:
        first = number * (self._body.n or 1)
        match event.WhichOneof("event"):
            case "started":
                self._chunk.model = event.started.model
            case "prompt_logprobs":
                self._prompts[number].MergeFrom(event.prompt_logprobs)
            case "delta":
                delta = event.delta
                index = first + delta.index
                yield from self._echo(number, index)
                if delta.text or delta.HasField("logprobs"):
                    yield self._said(index, delta.text, list(scored(delta.logprobs)))
            case "choice_finished":
                finish = finish_of(event.choice_finished)
                index = first + event.choice_finished.index
                yield from self._echo(number, index)
                yield self._said(index, "", (), finish.reason, finish.stop)
            case _:
                if (comment := sse.comment(event)) is not None:
                    yield comment

    def _echo(self, number: int, index: int) -> Iterator[bytes]:
        """The prompt, before the first output of a choice."""
        if index in self._texts:
            return
        self._texts[index] = ScoredText(self._body.logprobs or 0)
        if self._body.echo:
            echo = self._echoes[number]
            yield self._said(index, echo.text, echo.tokens(self._prompts[number]))

    def _said(
        self,
        index: int,
        text: str,
        tokens: Sequence[ScoredToken],
        reason: str | None = None,
        stop: str | int | None = None,
    ) -> bytes:
        scores = self._texts[index].columns(tokens) if tokens else None
        self._chunk.choices = [CompletionChoice(index, text, reason, stop, scores)]
        if self._body.usage_everywhere:
            self._chunk.usage = self._usage.so_far
        elif self._body.include_usage:
            self._chunk.usage = None
        return sse.data(self._chunk)
